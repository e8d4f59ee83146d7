"""Image formats: what Pillow's plugins leave out or do in another way, one module a format.

`formats.py` has the list of formats; `plugins.py` opens and loads a file. `tiff.py` with
`tiff_samples.py`, `bmp.py`, `gif.py` and `pnm.py` extend Pillow's plugins; `png.py` corrects what
Pillow has read and opens files with bad metadata; `jpeg.py` refuses what costs too much or cannot
be read, and opens files without their end marker; `samples.py` has their arithmetic.
docs/pixels.md compares the results with those of ImageMagick.
"""
