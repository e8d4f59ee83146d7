"""Sample sources with random access: JSON lines, parquet, packed text and the synthetic world.

`source.open_source` opens the right one for a SourceConfig.
"""
