"""Offline batches: many requests of a file, answered into another one without HTTP.

BatchInput           the lines of a file in OpenAI's batch form, one request each (requests.py)
check_format         refuses files of another format: compressed, UTF-16, arrays (input_format.py)
BatchRequestHandler  answers them by the handlers of the server (operations.py)
RecordFile           the answers: appended, resumed after any end of a process (files)
run_jobs             a bounded number of jobs at a time: the engine's batch is full (runner.py)

(vLLM: run_batch.)
"""

from __future__ import annotations
