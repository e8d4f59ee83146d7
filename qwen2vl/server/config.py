"""Configuration of the server: names, keys, allow-lists and limits; validated when built.

The command line and its config file fill it in (cli/commands/serve.py). The limits bound what one
client can cost: bytes, time, nesting, media and waiting requests. Standard library only, so that
options are checked before anything is loaded. (vLLM: FrontendArgs; its option names where they
exist.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qwen2vl.errors import ConfigError, abbreviate, suggest

__all__ = ["LogFormat", "ServerConfig"]

LogFormat = Literal["plain", "json"]

KIB = 1024
MB = 1_000_000
MIB = 1024**2

# Field -> smallest and largest value; the largest catch typing errors.
_RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "metrics_port": (0, 65_535),
    "max_model_len": (1, 2**31),
    "max_image_bytes": (1, 2**40),
    "max_video_bytes": (1, 2**40),
    "max_image_pixels": (1, 178_956_970),  # above it Pillow refuses an image by itself
    "max_video_frames": (1, 100_000),
    "max_video_seconds": (0.01, 1e9),
    "max_media_bytes": (1, 2**40),
    "media_fetch_timeout": (0.01, 86_400),
    "media_decode_timeout": (0.01, 86_400),
    "num_media_workers": (1, 256),
    "max_body_bytes": (1, 2**40),
    "max_held_body_bytes": (1, 2**50),
    "body_timeout": (0.01, 86_400),
    "max_header_bytes": (256, 2**30),
    "header_timeout": (0.01, 86_400),
    "keep_alive_timeout": (0.01, 86_400),
    "write_timeout": (0.01, 86_400),
    "max_connections": (1, 2**20),
    "max_json_depth": (4, 500),
    "max_queue": (0, 2**20),
    "max_requests_per_key": (1, 2**20),
    "request_timeout": (0.01, 1e9),
    "engine_timeout": (0.01, 1e9),
    "shutdown_timeout": (0, 1e9),
}
_FRACTIONAL = frozenset(name for name in _RANGES if name.endswith(("_timeout", "_seconds")))
_OPTIONAL = frozenset({"metrics_port", "max_model_len", "max_requests_per_key"})
_MEDIA_KINDS = ("image", "video")
_MAX_ITEMS = 4096  # of a kind of media in a prompt
DEFAULT_MEDIA_LIMITS = {"image": 16, "video": 2}  # of one request
_ORIGIN = re.compile(r"(?:[a-z][a-z0-9+.-]*://[^/\s?#@]+|null|\*)", re.IGNORECASE)
_HOST = re.compile(r"(?:[\w.-]+|\[?[0-9a-f:.]+\]?|\*)", re.IGNORECASE)
_MODEL_NAME = re.compile(r"[^\s\x00-\x1f]{1,256}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the server allows, and under which names it serves.

    Raises:
        ConfigError: a value is out of its range or of the wrong type.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: no key is needed
    served_model_names: tuple[str, ...] = ("nano",)  # the first is the one in responses
    lora_modules: Mapping[str, str] = field(default_factory=dict)  # model name -> adapter folder
    max_model_len: int | None = None
    metrics_port: int | None = None  # None: /metrics is on the main port
    log_format: LogFormat = "plain"
    access_log: bool = True
    page: bool = True  # the page at /, which needs no key

    # Where media may come from; data: URLs are always allowed.
    allowed_local_media_path: Path | None = None  # root of file:// URLs; None: refused
    allowed_media_domains: tuple[str, ...] = ()  # hosts of http(s) URLs; empty: refused
    allowed_origins: tuple[str, ...] = ()  # Origin headers of browsers; "*": any
    allowed_hosts: tuple[str, ...] = ()  # Host headers besides loopback and the bound address

    # Media of one request; a kind that is left out keeps its default.
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=dict)
    max_image_bytes: int = 20 * MB
    max_video_bytes: int = 64 * MB
    max_image_pixels: int = 50_000_000
    max_video_frames: int = 768
    max_video_seconds: float = 3600.0
    max_media_bytes: int = 64 * MB  # of all media of a request, fetched ones included
    media_fetch_timeout: float = 20.0  # seconds of all fetches of one medium, redirects included
    media_decode_timeout: float = 30.0  # seconds of CPU that decoding of one medium may take
    num_media_workers: int = 2  # processes that decode

    # HTTP.
    # An image of max_image_bytes fits as base64. A refused body costs less memory than 32 MB.
    max_body_bytes: int = 30 * MB
    max_held_body_bytes: int = 512 * MIB  # bodies of all requests that run or wait
    body_timeout: float = 30.0  # seconds from the first to the last byte of a body
    max_header_bytes: int = 16 * KIB
    header_timeout: float = 10.0  # seconds from the first byte to the end of the headers
    keep_alive_timeout: float = 30.0  # seconds that an idle connection stays open
    write_timeout: float = 30.0  # seconds in which a client must take what was sent
    max_connections: int = 1024
    max_json_depth: int = 64

    # Load.
    max_queue: int = 128  # requests that wait for the engine; more get 429
    max_requests_per_key: int | None = None  # running and waiting requests of one key; None: any
    request_timeout: float = 600.0  # seconds from admission to the last token
    engine_timeout: float = 120.0  # seconds in one engine step after which /health is 503
    shutdown_timeout: float = 30.0  # seconds that running requests have after SIGTERM

    def __post_init__(self) -> None:
        for name, (minimum, maximum) in _RANGES.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                _check_number(name, getattr(self, name), minimum, maximum)
        if self.log_format not in get_args(LogFormat):
            raise ConfigError(
                f"log_format: got {abbreviate(self.log_format)}, must be one of "
                f"{', '.join(get_args(LogFormat))}"
            )
        if not isinstance(self.host, str) or not self.host or len(self.host) > 255:
            raise ConfigError(f"host: got {abbreviate(self.host)}, must be a name or an address")
        self._check_names()
        self._check_keys()
        self._check_media_limits()
        self._check_access()
        if self.metrics_port is not None and self.metrics_port == self.port != 0:
            raise ConfigError(
                f"metrics_port: got {self.metrics_port}, which is the port of the API; give another"
            )

    def _check_names(self) -> None:
        names = (*_strings("served_model_names", self.served_model_names), *self.lora_modules)
        if not self.served_model_names:
            raise ConfigError("served_model_names: got none, must have at least one")
        for name in names:
            if not isinstance(name, str) or not _MODEL_NAME.fullmatch(name):
                raise ConfigError(
                    f"served_model_names, lora_modules: got {abbreviate(name)}, a name has 1 to "
                    "256 characters and no spaces"
                )
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(
                f"served_model_names, lora_modules: {abbreviate(twice)} is given twice"
            )

    def _check_keys(self) -> None:
        for key in _strings("api_keys", self.api_keys):
            # The key is not repeated in the message.
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                raise ConfigError(
                    "api_keys: a key is empty or has spaces at its ends, control characters or "
                    "characters beyond ASCII; HTTP headers cannot hold it"
                )

    def _check_media_limits(self) -> None:
        for kind, limit in self.limit_mm_per_prompt.items():
            if kind not in _MEDIA_KINDS:
                raise ConfigError(
                    f"limit_mm_per_prompt: {abbreviate(kind)} is not a kind of media; "
                    f"{suggest(str(kind), _MEDIA_KINDS)}"
                )
            if type(limit) is not int or not 0 <= limit <= _MAX_ITEMS:
                raise ConfigError(
                    f"limit_mm_per_prompt: {kind}: got {abbreviate(limit)}, must be a whole number "
                    f"from 0 to {_MAX_ITEMS:,}"
                )
        merged = {**DEFAULT_MEDIA_LIMITS, **self.limit_mm_per_prompt}
        object.__setattr__(self, "limit_mm_per_prompt", merged)

    def _check_access(self) -> None:
        for origin in _strings("allowed_origins", self.allowed_origins):
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allowed_origins: got {abbreviate(origin)}, must be as https://example.com, "
                    "or * for any"
                )
        for host in _strings("allowed_hosts", self.allowed_hosts):
            if not _HOST.fullmatch(host):
                raise ConfigError(
                    f"allowed_hosts: got {abbreviate(host)}, must be a host name or an address "
                    "without port, or * for any"
                )
        _strings("allowed_media_domains", self.allowed_media_domains)
        root = self.allowed_local_media_path
        if root is not None and not Path(root).is_dir():
            raise ConfigError(
                f"allowed_local_media_path: got {abbreviate(str(root))}, must be a folder "
                "that exists"
            )


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """Return a field that is a tuple of strings; a single string would be one a character."""
    if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
        shown = "something else" if name == "api_keys" else abbreviate(value)
        raise ConfigError(f"{name}: got {shown}, must be a tuple of strings")
    return value


def _check_number(name: str, value: Any, minimum: float, maximum: float) -> None:
    kinds: tuple[type, ...] = (int, float) if name in _FRACTIONAL else (int,)
    if type(value) not in kinds or not minimum <= value <= maximum:
        what = "a number" if name in _FRACTIONAL else "a whole number"
        raise ConfigError(
            f"{name}: got {abbreviate(value)}, must be {what} from {minimum:,} to {maximum:,}"
        )
