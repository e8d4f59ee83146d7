"""Long videos over the engine.

One question is answered window by window, and the answers are joined. What a prompt holds of a
video is processor/video.
"""

from qwen2vl.video.windows import Window, answer_windows, join_windows

__all__ = ["Window", "answer_windows", "join_windows"]
