"""Media that a request names: remote URLs and local files, read into bytes under the policy.

`MediaConnector` counts and measures the media of a request, and replaces each http(s):// and
file:// source by bytes; the processor of a server reads neither. Remote media are off unless hosts
are allowed, local files unless a root is. (vLLM: MediaConnector.)
"""

from __future__ import annotations

from qwen2vl.server.media.connector import MediaConnector

__all__ = ["MediaConnector"]
