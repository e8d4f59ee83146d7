"""Sample sources: JSON lines, parquet, packed text and synthetic data, each read by index.

`source.py` opens the right one for a configured source.
"""
