"""Parts of `qwen2vl batch`: its two inputs, and what it prints.

answer_requests   a file of requests in OpenAI's batch form (request_batch.py)
answer_images     one question about each of many images (image_batch.py)
list_images       the images of folders and patterns (image_files.py)
open_answers      the file of answers, of which errors are removed to be repeated (answers.py)
batch_identity    what decides the answers; a resumed batch must have the same (identity.py)
BatchReport       progress bar, summary and exit code (report.py)
"""

from __future__ import annotations
