"""Videos on the command line.

`options.py` adds what chooses frames, segments and subtitles; `windows.py` answers a question about
a long video part by part.
"""
