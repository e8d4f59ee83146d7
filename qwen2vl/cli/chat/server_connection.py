"""ServerConnection: the HTTP client of `qwen2vl chat --server`.

Lists the models of an OpenAI-compatible server and streams chat completions (server-sent events).
Redirects are not followed: the API key goes to the address that was given, and nowhere else.
Texts from the server are shortened and escaped before they reach a terminal.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from qwen2vl.cli import terminal
from qwen2vl.cli.chat.backend import ChatServerError
from qwen2vl.errors import InputError

__all__ = ["ServerConnection"]

CONNECT_TIMEOUT = 10.0  # seconds
# Seconds between two pieces of an answer: the prefill of a long video on a CPU takes minutes.
READ_TIMEOUT = 900.0
WRITE_TIMEOUT = 60.0
MAX_ERROR_BYTES = 65_536  # read of an error response
MAX_ERROR_TEXT = 500  # characters shown of it
BUSY = (429, 503)
API_KEY_REMEDY = "give the server's key by --api-key or QWEN2VL_API_KEY"


class ServerConnection:
    """A client of one OpenAI-compatible server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Make the client; nothing is sent.

        Args:
            url: "http://host:port", "host:port", or either with a path such as "/v1".
            api_key: sent as `Authorization: Bearer KEY`.

        Raises:
            InputError: the URL or the key is malformed.
        """
        parsed = _parse_url(url)
        path = parsed.path.rstrip("/")
        if not path.endswith("/v1"):
            path += "/v1"
        self.url = str(parsed.copy_with(path=path, query=None, fragment=None))
        headers = {"Accept": "application/json, text/event-stream"}
        if api_key:
            if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
                raise InputError(f"the API key has characters that no key has; {API_KEY_REMEDY}")
            headers["Authorization"] = f"Bearer {api_key}"
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(
                CONNECT_TIMEOUT, read=READ_TIMEOUT, write=WRITE_TIMEOUT, pool=CONNECT_TIMEOUT
            ),
            trust_env=not _is_loopback(parsed.host),  # no proxy for this machine itself
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def list_models(self) -> list[str]:
        """Return the ids of the models that the server lists (/v1/models).

        Raises:
            InputError: the server refused it, or is no OpenAI-compatible server.
            ChatServerError: it cannot be reached, or failed.
        """
        ids = [entry.get("id") for entry in self._list_model_cards()]
        return [name for name in ids if isinstance(name, str)]

    def max_model_len(self, model: str) -> int | None:
        """Return the context of a model in tokens, which vLLM and `qwen2vl serve` list.

        Returns:
            Tokens of a prompt and its answer; None: the server does not list them.

        Raises:
            As `list_models` does.
        """
        lengths = {card.get("id"): card.get("max_model_len") for card in self._list_model_cards()}
        length = lengths.get(model)
        return length if type(length) is int and length > 0 else None

    def _list_model_cards(self) -> list[dict[str, Any]]:
        """Return what the server lists of each model, unchecked."""
        with self._open("GET", "/models", timeout=CONNECT_TIMEOUT) as response:
            body = _parse_json(_read_bounded(response, 64 * MAX_ERROR_BYTES))
        entries = body.get("data") if isinstance(body, dict) else None
        if not isinstance(entries, list):
            raise InputError(
                f"{self.url}/models: the answer is no list of models; give the address of an "
                "OpenAI-compatible server"
            )
        return [entry for entry in entries if isinstance(entry, dict)]

    def stream_chat(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Send a chat completion with `stream: true`; yield its chunks.

        Closing the generator closes the connection, and so aborts the request.

        Raises:
            InputError: the server refused the request.
            ChatServerError: it cannot be reached, failed, or its stream broke off.
        """
        with self._open("POST", "/chat/completions", body=body) as response:
            if "text/event-stream" not in response.headers.get("content-type", ""):
                raise ChatServerError(f"{self.url}: the server did not stream its answer")
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                chunk = _parse_json(event.data)
                if not isinstance(chunk, dict):
                    raise ChatServerError(f"{self.url}: the server sent an event that is no JSON")
                if error := _error_text(chunk):
                    raise ChatServerError(f"the server broke the answer off: {error}")
                yield chunk

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Iterator[httpx2.Response]:
        """Send a request; yield its response if it was accepted."""
        url = self.url + path
        options: dict[str, Any] = {} if body is None else {"json": body}
        if timeout is not None:
            options["timeout"] = timeout
        try:
            with self._client.stream(method, url, **options) as response:
                if response.status_code != 200:
                    raise _refusal(response, url)
                yield response
        except httpx2.ConnectError as error:
            raise ChatServerError(
                f"cannot connect to {self.url}; check the address, and whether the server runs"
            ) from error
        except httpx2.TimeoutException as error:
            raise ChatServerError(f"{url}: the server did not answer in time") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise ChatServerError(f"{url}: the connection to the server broke") from error


def _parse_url(text: str) -> httpx2.URL:
    if "://" not in text:
        text = f"http://{text}"
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError) as error:
        raise InputError(
            f"--server {text:.100}: is no URL; give http://HOST:PORT, as `serve` prints it"
        ) from error
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise InputError(
            f"--server: {url.scheme}://{url.host} cannot be used; give http://HOST:PORT, and a key "
            "by --api-key"
        )
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refusal(response: httpx2.Response, url: str) -> InputError | ChatServerError:
    """Return the exception for a response that is not 200."""
    status = response.status_code
    content = _read_bounded(response, MAX_ERROR_BYTES)
    text = _error_text(_parse_json(content)) or _shown(content) or response.reason_phrase
    if status in (401, 403):
        return InputError(f"the server refused access ({status}): {text}; {API_KEY_REMEDY}")
    if response.has_redirect_location:
        return InputError(
            f"{url} redirects to {_shown(response.headers['location'])}; give that address"
        )
    if status in BUSY:
        wait = response.headers.get("retry-after", "")
        later = f"try again in {wait} s" if wait.isdecimal() else "try again later"
        return ChatServerError(f"the server is busy ({status}): {text}; {later}")
    if 400 <= status < 500:
        return InputError(f"the server refused the request ({status}): {text}")
    return ChatServerError(f"the server failed ({status}): {text}")


def _read_bounded(response: httpx2.Response, limit: int) -> str:
    content = b""
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > limit:
            break
    return content[:limit].decode("utf-8", errors="replace")


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _error_text(body: Any) -> str:
    """Return the text of an error body of OpenAI, vLLM or FastAPI; "" if it is none."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error")
    if error is None and body.get("object") != "error" and "detail" not in body:
        return ""
    if isinstance(error, dict):
        error = error.get("message")
    return _shown(error or body.get("message") or body.get("detail") or "")


def _shown(text: Any) -> str:
    """Return what is shown of a text of the server: one line of printable characters."""
    line = " ".join(str(text).split())
    line = line if len(line) <= MAX_ERROR_TEXT else line[: MAX_ERROR_TEXT - 3] + "..."
    return terminal.escape_control_characters(line)
