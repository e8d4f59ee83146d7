"""The input of a batch: one request a line, in OpenAI's form, read lazily.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

Every line has one answer, also one that is no request. The `id` of an answer has the number of its
line, a digest of it, and one of the options, by which a batch is resumed: what is answered is
skipped, lines may be appended, and answers of another input or other options are recognized. The
answer to a line that repeats a custom_id has none, so that each custom_id has one answer.
(vLLM: BatchRequestInput.)
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from qwen2vl.errors import InputError, abbreviate, suggest
from qwen2vl.server.batch.input_format import check_format
from qwen2vl.server.errors import APIError
from qwen2vl.server.middleware.json_parsing import parse_json

__all__ = ["BATCH_URLS", "BatchInput", "BatchRequest"]

# Routes that a batch has, as OpenAI's.
BATCH_URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
_ID = re.compile(r"batch_req_([1-9][0-9]{0,17})_([0-9a-f]{16})([0-9a-f]{8})")
_READ_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANKS = b" \t\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """One line of the input: a request, or why it is none."""

    number: int  # of the line, from 1
    id: str  # of its answer
    custom_id: str | None = None
    url: str = ""
    body: Any = None
    error: APIError | None = None  # why it is no request

    @property
    def request_id(self) -> str:
        """The id under which the log has the request."""
        return self.id.removeprefix("batch_")


class BatchInput:
    """The requests of a file that have no answer; iterate over them.

    Memory grows by some 100 bytes a line, for the ids that were seen.

    Args:
        path: of the file.
        max_bytes: of a line.
        max_depth: how deep lists and objects of a line may be nested.
        options: eight hexadecimal digits of everything that decides the answers besides the lines,
            such as the model: answers of other options are refused.
        describe_options: says which options other digits stand for, as "with --compile".
        flag: option that names the file, for errors.

    Raises:
        InputError: the file cannot be read, or has another format.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        max_depth: int,
        options: str = "00000000",
        describe_options: Callable[[str], str] = lambda digits: "with other options",
        flag: str = "-i",
    ) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._max_depth = max_depth
        self._where = f"{flag} {path}"
        self._options = options
        self._describe_options = describe_options
        self._digests = array("Q")  # by line number - 1, of the lines that are answered; 0: is not
        self._done_ids = array("Q")  # digests of their custom ids
        self._seen: set[int] = set()  # digests of custom ids
        self._repeated: set[int] = set()  # lines that are answered, and to be answered again
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{self._where}: {what}; give a file of JSON lines")
        try:
            self._size = path.stat().st_size
            check_format(path, self._where)
        except OSError as error:
            raise self._cannot_be_read(error) from error

    def mark_answered(
        self, number: int, record: Mapping[str, Any], *, is_repeated: bool = False
    ) -> None:
        """Skip the line of an answer.

        Args:
            number: of the answer's line, for errors.
            record: the answer.
            is_repeated: do not skip the line: the answer will be replaced. The line may have been
                corrected, and the options may be others.

        Raises:
            InputError: it is none of this command, answers another input, is of other options, or
                is there twice.
        """
        match = _ID.fullmatch(str(record.get("id")))
        if match is None:
            raise InputError(
                f"line {number} of the output was not written by this command, or by another "
                "version of it; give another file"
            )
        line, digest = int(match[1]), int(match[2], 16)
        if match[3] != self._options and not is_repeated:
            raise InputError(
                f"line {number} of the output was written {self._describe_options(match[3])}; give "
                "the same options, or another file to -o"
            )
        if line > self._size:
            raise self._other_input(line)
        missing = line - len(self._digests)
        if missing > 0:
            self._digests.extend(_zeros(missing))
            self._done_ids.extend(_zeros(missing))
        if self._digests[line - 1]:
            raise InputError(
                f"line {number} of the output answers line {line} of the input again; delete it"
            )
        self._digests[line - 1] = digest
        if is_repeated:
            self._repeated.add(line)
        custom_id = record.get("custom_id")
        self._done_ids[line - 1] = _digest_of(custom_id) if isinstance(custom_id, str) else 0

    def check(self) -> None:
        """Read the whole file, and compare its lines with those that are answered.

        Raises:
            InputError: as iterating does.
        """
        for _ in self:
            pass

    def __iter__(self) -> Iterator[BatchRequest]:
        """Yield the requests without an answer.

        Raises:
            InputError: a line differs from the one that was answered, or the file cannot be read.
                A line whose answer is replaced may differ, but not in its custom_id.
        """
        number = 0
        self._seen.clear()
        try:
            with self.path.open("rb") as file:
                for number, (line, digest) in enumerate(self._read_lines(file), 1):
                    done = self._digests[number - 1] if number <= len(self._digests) else 0
                    if done and number not in self._repeated:
                        if done != digest:
                            raise self._other_input(number)
                        self._seen.add(self._done_ids[number - 1])
                    elif line != b"":
                        yield self._check_same_id(self._parse(number, line, digest))
        except OSError as error:
            raise self._cannot_be_read(error) from error
        if number < len(self._digests):
            raise self._other_input(len(self._digests))

    def _check_same_id(self, request: BatchRequest) -> BatchRequest:
        """Check that a line whose answer is replaced is still the one that was answered."""
        if request.number in self._repeated and request.custom_id is not None:
            done_id = self._done_ids[request.number - 1]
            if done_id not in (0, _digest_of(request.custom_id)):
                raise self._other_input(request.number)
        return request

    def _read_lines(self, file: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
        """Yield content and digest of each line; the content of a too long one is None."""
        is_first = True
        while head := file.readline(self._max_bytes + 2):
            is_long = not head.endswith(b"\n") and len(head) > self._max_bytes
            line = head.removeprefix(_BOM).strip(_BLANKS) if is_first else head.strip(_BLANKS)
            is_first = False
            digest = blake2b(line, digest_size=8)
            is_cut = is_long or len(line) > self._max_bytes
            while is_long and (part := file.readline(_READ_CHUNK)):
                digest.update(part.rstrip(b"\r\n"))
                is_long = not part.endswith(b"\n")
            yield None if is_cut else line, int.from_bytes(digest.digest()) or 1

    def _parse(self, number: int, line: bytes | None, digest: int) -> BatchRequest:
        answer_id = f"batch_req_{number}_{digest:016x}{self._options}"
        custom_id = None
        try:
            fields = self._parse_fields(number, line)
            custom_id = self._check_custom_id(number, fields)
            return BatchRequest(
                number=number,
                id=answer_id,
                custom_id=custom_id,
                url=self._check_url(number, fields),
                body=_check_body(number, fields),
            )
        except APIError as error:
            return BatchRequest(number=number, id=answer_id, custom_id=custom_id, error=error)

    def _parse_fields(self, number: int, line: bytes | None) -> dict[str, Any]:
        if line is None:
            raise APIError(
                413,
                f"line {number}: has more than {self._max_bytes:,} bytes, which is the limit; give "
                "media as file:// URLs, with --allowed-local-media-path",
                code="body_too_large",
            )
        fields = parse_json(line, max_depth=self._max_depth + 1, where=f"line {number}")
        if not isinstance(fields, dict):
            text = f"got {abbreviate(fields)}, must be an object with custom_id, url and body"
            raise _refusal(number, text, None)
        return fields

    def _check_custom_id(self, number: int, fields: Mapping[str, Any]) -> str:
        value = fields.get("custom_id")
        if not isinstance(value, str) or not value:
            got = f"got {abbreviate(value)}" if "custom_id" in fields else "is missing"
            raise _refusal(number, f"custom_id: {got}, must be a text", "custom_id")
        digest = _digest_of(value)
        if digest in self._seen:
            text = f"custom_id: {abbreviate(value)} is also that of an earlier line; give another"
            raise _refusal(number, text, "custom_id")
        self._seen.add(digest)
        return value

    def _check_url(self, number: int, fields: Mapping[str, Any]) -> str:
        method, url = fields.get("method", "POST"), fields.get("url")
        if method != "POST":
            raise _refusal(number, f"method: got {abbreviate(method)}, must be POST", "method")
        if url not in BATCH_URLS:
            known = ", ".join(BATCH_URLS)
            if not isinstance(url, str):
                got = f"got {abbreviate(url)}" if "url" in fields else "is missing"
                raise _refusal(number, f"url: {got}, must be one of {known}", "url")
            text = f"url: got {abbreviate(url)}, which a batch does not have"
            raise _refusal(number, f"{text}; {suggest(url, BATCH_URLS)}", "url")
        return url

    def _other_input(self, line: int) -> InputError:
        return InputError(
            f"{self._where}: line {line} is not the one that the output has an answer to: the "
            "output is of another input; give another file to -o"
        )

    def _cannot_be_read(self, error: OSError) -> InputError:
        return InputError(f"{self._where}: cannot be read: {error.strerror}")


def _zeros(count: int) -> array[int]:
    """Return an array of zeros."""
    return array("Q", bytes(8 * count))


def _check_body(number: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    body = fields.get("body")
    if not isinstance(body, dict):
        got = f"got {abbreviate(body)}" if "body" in fields else "is missing"
        raise _refusal(number, f"body: {got}, must be an object", "body")
    if body.get("stream"):
        text = "body: stream: got true, but answers of a batch are not streamed; leave it out"
        raise _refusal(number, text, "stream")
    return body


def _digest_of(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def _refusal(number: int, text: str, param: str | None) -> APIError:
    return APIError(400, f"line {number}: {text}", param=param, code="invalid_value")
