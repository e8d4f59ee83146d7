"""Plain benchmark server: FastAPI, one lock, transformers' `generate`, an OpenAI-like route.

    PYTHONPATH=benchmarks python -m serve.plain_server --model DIR --port PORT [--dtype bfloat16]

What a user writes in an afternoon: requests are answered one after another. Images are processed by
the processor of transformers, before the lock is taken. The number of threads of torch is the one
of 1 and all cores at which `generate` was faster at start, unless --threads is given.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import threading
import time
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION = "<|vision_start|>{}<|vision_end|>"
PAD = "<|image_pad|>"


class PlainModel:
    """Model, tokenizer and image processor of transformers behind one lock."""

    def __init__(self, folder: str, dtype: str) -> None:
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.model = model.eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.lock = threading.Lock()

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the inputs of `generate` for messages with text and data: URLs of images."""
        pictures: list[Image.Image] = []
        turns = []
        for message in messages:
            content = message["content"]
            parts: list[Any] = (
                [{"type": "text", "text": content}] if isinstance(content, str) else content
            )
            text = ""
            for part in parts:
                if part["type"] == "text":
                    text += part["text"]
                else:
                    data = part["image_url"]["url"].partition(",")[2]
                    pictures.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
                    text += VISION.format(PAD)
            turns.append(f"<|im_start|>{message['role']}\n{text}<|im_end|>\n")
        text = "".join(turns) + "<|im_start|>assistant\n"
        found: dict[str, Any] = {}
        if pictures:
            found = dict(self.images(images=pictures, return_tensors="pt"))
            for grid in found["image_grid_thw"]:
                count = int(grid.prod()) // 4
                text = text.replace(VISION.format(PAD), VISION.format("\0" * count), 1)
            text = text.replace("\0", PAD)
        found |= dict(self.tokenizer(text, return_tensors="pt"))
        found["mm_token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).int()
        return found

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer one request, greedy, with exactly `max_tokens` tokens."""
        inputs = self.inputs(body["messages"])
        count = inputs["input_ids"].shape[1]
        new = body["max_tokens"]
        least = {"min_new_tokens": new} if body.get("ignore_eos") else {}
        with self.lock, torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=new, do_sample=False, **least)
        text = self.tokenizer.decode(ids[0, count:], skip_special_tokens=True)
        made = ids.shape[1] - count
        return {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": count, "completion_tokens": made},
        }

    def choose_num_threads(self) -> int:
        """Return the number of threads, of 1 and all cores, at which an answer is faster."""
        body = {"messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 16}
        seconds = {}
        for count in (1, os.cpu_count() or 1) * 2:  # the second measurement replaces the first
            torch.set_num_threads(count)
            start = time.perf_counter()
            self.answer(body | {"ignore_eos": True})
            seconds[count] = time.perf_counter() - start
        return min(seconds, key=seconds.__getitem__)


def create_app(model: PlainModel) -> FastAPI:
    """Return the app: the chat route and /ready."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        return model.answer(body)

    @app.get("/ready")
    def ready() -> dict[str, Any]:
        return {"threads": torch.get_num_threads()}

    return app


def main() -> None:
    """Load the model and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    model = PlainModel(given.model, given.dtype)
    torch.set_num_threads(given.threads or model.choose_num_threads())
    uvicorn.run(create_app(model), host="127.0.0.1", port=given.port, access_log=False)


if __name__ == "__main__":
    main()
