"""The interactive chat: a session of messages and commands, and two backends that answer.

ChatSession      the conversation, its commands, and the loop that reads lines (session.py)
ChatBackend      the interface: describes media, begins turns (backend.py)
LocalBackend     a loaded LLM (local_backend.py)
ServerBackend    an OpenAI-compatible server (server_backend.py); imports no torch
"""

from __future__ import annotations
