"""Media loading: images and videos are read within limits and decoded to upright RGB frames.

`source.py` resolves paths, URLs, bytes and arrays (`download.py` fetches URLs, `sniff.py` names the
type of a file, `arrays.py` reads arrays and tensors); `rgb.py` decodes images; `video_source.py`
opens videos; `video_packets.py`, `video_reader.py` and `video_frame.py` decode video files (PyAV).
"""
