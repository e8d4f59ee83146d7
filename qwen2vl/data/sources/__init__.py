"""Sample sources with random access: files, packaged datasets and the synthetic world.

`source.open_source` opens the right one for a SourceConfig.
"""
