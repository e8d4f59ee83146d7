"""Eyes and words joined: patches and ids -> hidden states -> logits.

Vision tokens overwrite the embeddings of the placeholders; from there on a token is a token. The
model takes every index as data (geometry.py) and never searches ids, so training, prefill and
decode are the same `forward`. Parameter names are the names of the official checkpoints.
(Qwen2-VL Fig. 2; HF: Qwen2VLForConditionalGeneration.) Back up: load.py fills it from a folder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.geometry import AttnMeta, VisionMeta
from qwen2vl.model.attention import KVCache, SharedCache
from qwen2vl.model.text import TextModel
from qwen2vl.model.vision import VisionTower

__all__ = ["Qwen2VL"]


class Qwen2VL(nn.Module):
    """The whole network; build it on the meta device and fill it, or initialize it to train."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = TextModel(config.text)
        # A tied head (2B) is the embedding: no second parameter, as in the files.
        self.lm_head = (
            None
            if config.text.tie_word_embeddings
            else nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; matrices may be stored in fewer bits, norms never are."""
        return self.model.norm.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def encode(self, patches_NP: Tensor, vision_meta: VisionMeta) -> Tensor:
        """Turn patches into vision_MD, the rows that will stand at the placeholders."""
        return self.visual(patches_NP, vision_meta)

    def embed(self, input_ids_T: Tensor, vision_MD: Tensor | None, pad_index_M: Tensor) -> Tensor:
        """Look up the ids, then overwrite token pad_index_M[m] with row m of `vision_MD`.

        A training batch without a picture brings the one row of a null item and an empty index:
        the row goes nowhere, and the tower's gradients are exact zeros.
        """
        num_rows = 0 if vision_MD is None else len(vision_MD)
        if vision_MD is not None and num_rows == 1 and len(pad_index_M) == 0:
            vision_MD, num_rows = vision_MD[:0], 0
        assert num_rows == len(pad_index_M), (
            f"{num_rows} vision tokens for {len(pad_index_M)} placeholders"
        )
        embeds_TD = self.model.embed_tokens(input_ids_T)
        if vision_MD is None:
            return embeds_TD
        return embeds_TD.index_copy(0, pad_index_M, vision_MD.to(embeds_TD.dtype))

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_3T: Tensor,
        meta: AttnMeta,
        *,
        patches_NP: Tensor | None = None,
        vision_meta: VisionMeta | None = None,
        vision_MD: Tensor | None = None,
        pad_index_M: Tensor | None = None,
        caches: Sequence[KVCache] | SharedCache | None = None,
    ) -> Tensor:
        """Compute hidden_TD, normed and ready for `logits`.

        Pictures come either as patches with their meta (training), or as rows encoded before
        (`vision_MD`, answering); never both. Either way `pad_index_M` says where rows go.
        `caches` hold what came before, one for each segment of `meta`, or one for all.
        """
        if patches_NP is not None:
            assert vision_MD is None and vision_meta is not None
            vision_MD = self.encode(patches_NP, vision_meta)
        if pad_index_M is None:
            assert vision_MD is None, "vision tokens need pad_index_M"
            embeds_TD = self.model.embed_tokens(input_ids_T)
        else:
            embeds_TD = self.embed(input_ids_T, vision_MD, pad_index_M)
        return self.model(embeds_TD, position_ids_3T, meta, caches)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Score every word of the vocabulary: logits_TV, in the dtype of the weights."""
        if self.lm_head is None:
            return F.linear(hidden_TD, self.model.embed_tokens.weight)
        return self.lm_head(hidden_TD)
