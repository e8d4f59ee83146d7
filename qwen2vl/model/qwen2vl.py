"""Qwen2-VL: vision tower and language model, from patches and token ids to logits.

Vision embeddings overwrite the embeddings of the placeholder tokens (<|image_pad|>, <|video_pad|>);
the decoder then treats all tokens alike. Every index is an input (geometry.py), so training,
prefill and decode call the same `forward`. Parameter names are those of the official checkpoints;
qwen2vl/loading.py fills them. (Qwen2-VL Fig. 2; HF: Qwen2VLForConditionalGeneration.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import ConfigError, abbreviate
from qwen2vl.geometry import AttnMeta, VisionMeta
from qwen2vl.model.kv_cache import BatchKVCache
from qwen2vl.model.text import TextModel
from qwen2vl.model.vision import VisionTower

__all__ = ["Qwen2VL", "meta_model"]


class Qwen2VL(nn.Module):
    """The complete network: vision tower, decoder and language-model head."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        if not isinstance(config, Qwen2VLConfig):
            raise ConfigError(
                f"config: got {abbreviate(config)}, must be a Qwen2VLConfig; `load` builds a "
                "model from a folder"
            )
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = TextModel(config.text)
        # With tied embeddings (2B) there is no lm_head parameter, as in the checkpoints.
        self.lm_head = (
            None
            if config.text.tie_word_embeddings
            else nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype, read from a norm: linear layers may be quantized, norms never are."""
        return self.model.norm.weight.dtype

    @property
    def lm_head_weight(self) -> Tensor:
        """Output embedding matrix (V, D); the input embedding if tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def encode(self, patches_NP: Tensor, vision_meta: VisionMeta) -> Tensor:
        """Encode patches into vision_MD, the embeddings for the placeholder tokens."""
        return self.visual(patches_NP, vision_meta)

    def embed(
        self, input_ids_T: Tensor, vision_MD: Tensor | None, placeholder_index_M: Tensor
    ) -> Tensor:
        """Embed the ids, then overwrite token placeholder_index_M[m] with vision_MD[m].

        A training batch without images passes the single vision token of a null item and an empty
        index: the token is dropped, and the vision tower's gradients are exact zeros.
        """
        num_vision_tokens = 0 if vision_MD is None else len(vision_MD)
        if vision_MD is not None and num_vision_tokens == 1 and len(placeholder_index_M) == 0:
            vision_MD, num_vision_tokens = vision_MD[:0], 0
        assert num_vision_tokens == len(placeholder_index_M), (
            f"{num_vision_tokens} vision tokens for {len(placeholder_index_M)} placeholders"
        )
        embeds_TD = self.model.embed_tokens(input_ids_T)
        if vision_MD is None:
            return embeds_TD
        return embeds_TD.index_copy(0, placeholder_index_M, vision_MD.to(embeds_TD.dtype))

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_3T: Tensor,
        meta: AttnMeta,
        *,
        patches_NP: Tensor | None = None,
        vision_meta: VisionMeta | None = None,
        vision_MD: Tensor | None = None,
        placeholder_index_M: Tensor | None = None,
        caches: BatchKVCache | None = None,
    ) -> Tensor:
        """Compute hidden_TD after the final norm, the input of `logits`.

        Args:
            input_ids_T: token ids, sequences concatenated.
            position_ids_3T: M-RoPE positions (geometry.mrope_positions).
            meta: bounds of the sequences.
            patches_NP: patches of all items, to be encoded here (training); needs `vision_meta`.
            vision_meta: positions and attention bounds of the patches.
            vision_MD: vision embeddings encoded before (inference); excludes `patches_NP`.
            placeholder_index_M: which tokens the vision embeddings overwrite.
            caches: KV caches of the preceding tokens of each segment; the new tokens are appended.
        """
        if patches_NP is not None:
            assert vision_MD is None and vision_meta is not None
            vision_MD = self.encode(patches_NP, vision_meta)
        if placeholder_index_M is None:
            assert vision_MD is None, "vision tokens need placeholder_index_M"
            embeds_TD = self.model.embed_tokens(input_ids_T)
        else:
            embeds_TD = self.embed(input_ids_T, vision_MD, placeholder_index_M)
        return self.model(embeds_TD, position_ids_3T, meta, caches)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Compute logits_TV over the vocabulary, in the dtype of the weights."""
        if self.lm_head is None:
            return F.linear(hidden_TD, self.model.embed_tokens.weight)
        return self.lm_head(hidden_TD)


def meta_model(config: Qwen2VLConfig) -> Qwen2VL:
    """Build the model on the meta device: names and shapes of its parameters without memory."""
    with torch.device("meta"), _SkipInit():
        return Qwen2VL(config)


class _SkipInit(TorchFunctionMode):
    """Skips torch.nn.init, whose normal_ on the meta device imports torch._dynamo (a second)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
