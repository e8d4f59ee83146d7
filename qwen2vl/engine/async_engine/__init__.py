"""Parts of AsyncLLM: the thread that owns the engine, and the streams that it delivers to.

`EngineThread` runs engine steps and operations; `AsyncDeltaStream` is the output of one request in
the caller's event loop. async_llm.py connects them.
"""
