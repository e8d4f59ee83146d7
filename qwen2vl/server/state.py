"""What the handlers of one server share: engine, configuration, metrics, admission, connector.

`ServerState` is created once per process and kept in `app.state.server`. `Caller` is what a request
knows of its sender: its request id, and the salt that keeps its cache entries apart from those of
other API keys; the middleware creates it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen2vl.errors import abbreviate, suggest
from qwen2vl.server.errors import APIError

if TYPE_CHECKING:
    from qwen2vl.engine import AsyncLLM
    from qwen2vl.server.admission import Admission
    from qwen2vl.server.config import ServerConfig
    from qwen2vl.server.media.connector import MediaConnector
    from qwen2vl.server.metrics import ServerMetrics

__all__ = ["Caller", "ServerState"]


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request, without its secrets."""

    request_id: str = ""
    cache_salt: bytes = b""  # b"" with one API key or none, else derived from the key


@dataclass(slots=True)
class ServerState:
    """The objects that all handlers use; one per process."""

    engine: AsyncLLM
    config: ServerConfig
    metrics: ServerMetrics
    admission: Admission
    connector: MediaConnector
    started_at: float = field(default_factory=time.time)

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused, while running ones finish."""
        return self.admission.is_draining

    def adapter_of(self, model: str | None) -> str | None:
        """Return the LoRA adapter that a model name selects; None for the base model.

        Args:
            model: the `model` field of a request; None for the first served name.

        Raises:
            APIError: 404 model_not_found: no model of that name is served.
        """
        names = self.config.served_model_names
        if model is None or model in names:
            return None
        if model in self.config.lora_modules:
            return model
        known = (*names, *self.config.lora_modules)
        raise APIError(
            404,
            f"the model {abbreviate(model)} does not exist; {suggest(model, known)}",
            param="model",
            code="model_not_found",
        )
