"""Registration of the model in lmms-eval, by the entry point group `lmms_eval.models`.

lmms-eval is no dependency of this package: it is imported when lmms-eval itself calls `manifest`.
The model class is in lmms_model.py. (docs/guides/lmms-eval.md)
"""

from __future__ import annotations

from typing import Any

__all__ = ["FAILED", "MODEL_CLASS", "MODEL_ID", "manifest"]

MODEL_ID = "qwen2vl"  # as in `--model qwen2vl`; "qwen2_vl" is the class of transformers
MODEL_CLASS = "qwen2vl.eval.lmms_model.Qwen2VLModel"

# Beginning of the text that lmms-eval scores in place of the answer to a request that failed.
FAILED = "[LMMS_EVAL_REQUEST_FAILED"


def manifest() -> Any:
    """Return the ModelManifest of this package, for `lmms_eval --model qwen2vl`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id=MODEL_ID, chat_class_path=MODEL_CLASS)
