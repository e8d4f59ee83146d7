"""Handlers of /v1/models and /v1/models/{model}.

The base model is listed under each of its served names, then each LoRA adapter with the base model
as its parent. Capabilities and limits are those of this server. (vLLM: OpenAIServingModels.)
"""

from __future__ import annotations

from qwen2vl.server.protocol.models import ModelCapabilities, ModelCard, ModelLimits, ModelList
from qwen2vl.server.protocol.sampling import MAX_N
from qwen2vl.server.state import ServerState

__all__ = ["get_model", "list_models"]


def list_models(state: ServerState) -> ModelList:
    """Return all models that requests may name."""
    config = state.config
    names = (*config.served_model_names, *config.lora_modules)
    return ModelList(data=[_card(state, name) for name in names])


def get_model(state: ServerState, model: str) -> ModelCard:
    """Return one model.

    Raises:
        APIError: 404 model_not_found.
    """
    state.adapter_of(model)
    return _card(state, model)


def _card(state: ServerState, name: str) -> ModelCard:
    config, llm = state.config, state.engine.llm
    base = config.served_model_names[0]
    is_adapter = state.adapter_of(name) is not None
    limits = config.limit_mm_per_prompt
    return ModelCard(
        id=name,
        created=int(state.started_at),
        root=name if is_adapter else base,
        parent=base if is_adapter else None,
        max_model_len=llm.max_model_len,
        capabilities=ModelCapabilities(),
        limits=ModelLimits(
            max_images=limits.get("image"),
            max_videos=limits.get("video"),
            max_image_pixels=config.max_image_pixels,
            min_pixels=llm.processor.pixels.min_pixels,
            max_pixels=llm.processor.pixels.max_pixels,
            resize_factor=llm.config.vision.factor,
            max_body_bytes=config.max_body_bytes,
            max_completions=min(MAX_N, llm.engine_config.max_num_seqs),
        ),
    )
