"""Offline batches: many requests of a file, answered into another one without HTTP.

BatchInput      the lines of a file in OpenAI's batch form, one request each (requests.py)
BatchOperator   answers them by the handlers of the server (operations.py)
RecordFile      the answers: appended, and resumed after any end of the process (record_file.py)
run_jobs        a bounded number of jobs at a time, which keeps the engine's batch full (runner.py)

(vLLM: run_batch.)
"""

from __future__ import annotations
