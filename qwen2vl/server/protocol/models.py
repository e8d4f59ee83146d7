"""The list of models: the base model under its served names, and each LoRA adapter.

`capabilities` and `limits` are additions to OpenAI's form; `root`, `parent` and `max_model_len` are
vLLM's. (vLLM: ModelCard, ModelList.)
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

__all__ = ["ModelCapabilities", "ModelCard", "ModelLimits", "ModelList"]


class ModelCapabilities(BaseModel):
    """What requests to a model may contain and ask for."""

    vision: bool = True
    video: bool = True
    audio: bool = False
    tools: bool = True
    structured_output: bool = True
    logprobs: bool = True
    embeddings: bool = True
    grounding: bool = True


class ModelLimits(BaseModel):
    """Limits of one request."""

    max_images: int | None = Field(description="Of one request; null: only the context limits it.")
    max_videos: int | None
    max_image_pixels: int = Field(description="Of an image as sent.")
    min_pixels: int = Field(description="Default of an image as the model sees it.")
    max_pixels: int
    resize_factor: int = Field(description="Sides of a resized image are multiples of it.")
    max_body_bytes: int = Field(description="Of a request, as sent.")
    max_completions: int = Field(description="n")


class ModelCard(BaseModel):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen2vl"
    root: str = Field(description="The base model's name; of an adapter, its own.")
    parent: str | None = Field(default=None, description="Of an adapter: the base model.")
    max_model_len: int
    capabilities: ModelCapabilities
    limits: ModelLimits


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
