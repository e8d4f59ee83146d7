"""Media in: sources are read within limits and decoded into upright RGB frames.

`source.py` finds and reads what the user names; `rgb.py` decodes images; `video_reader.py` and `clip.py`
supply the frames of videos.
"""
