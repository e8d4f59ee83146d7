"""check_format: files of other formats are refused with a remedy, JSON lines of any kind pass."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from qwen2vl.errors import InputError
from qwen2vl.server.batch.input_format import check_format
from qwen2vl.server.batch.requests import BatchInput

OBJECT = {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": []}}
LINE = json.dumps(OBJECT)
LINES = f"{LINE}\n{LINE}\n".encode()


@pytest.mark.parametrize(
    ("content", "what", "command"),
    [
        (gzip.compress(LINES, mtime=0), "gzip", "gunzip -k 'my requests'"),
        (bz2.compress(LINES), "bzip2", "bunzip2 -k"),
        (lzma.compress(LINES), "xz", "unxz -k"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "Zstandard", "unzstd"),
        (b"PK\x03\x04" + bytes(9), "a ZIP archive", "unzip"),
        (LINES.decode().encode("utf-16"), "UTF-16", "iconv -f UTF-16 -t UTF-8 'my requests' >"),
        (LINES.decode().encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE"),
        (LINES.decode().encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE"),
        (LINES.decode().encode("utf-32"), "UTF-32", "iconv -f UTF-32 "),
        (b"PAR1" + bytes(99), "a binary file", "give the file of the requests"),
        (json.dumps([OBJECT]).encode(), "one JSON array", "jq -c '.[]' 'my requests' >"),
        (json.dumps([OBJECT], indent=2).encode(), "one JSON array", "jq"),
        (b"\xef\xbb\xbf\r\n [\r\n" + LINE.encode() + b"\r\n]", "one JSON array", "jq"),
        (json.dumps(OBJECT, indent=2).encode(), "spread over several lines", "jq -c . "),
        (b'{ \r\n\t"custom_id": "a"\r\n}', "spread over several lines", "jq -c . "),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, content: bytes, what: str, command: str) -> None:
    path = tmp_path / "my requests"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        BatchInput(path, max_bytes=1000, max_depth=8)
    text = str(caught.value).replace(f"{tmp_path}/", "")
    assert text.startswith("-i my requests: is ") and f"{what}, but" in text
    assert "requests are one JSON object a line; " in text and command in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        LINES,
        b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
        b"\n\n" + LINES,
        b"[1]\n" + LINES,
        b"{\n" + LINES,
        b"no JSON\n" + LINES,
        LINES + b'{"a": "\0"}\n',
        b"\xff\n" + LINES,
    ],
)
def test_lines_pass_also_with_bad_ones(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    check_format(tmp_path / "in", "-i in")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("value", [OBJECT, [OBJECT, OBJECT]])
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_command_converts_the_file(tmp_path: Path, value: object, indent: int | None) -> None:
    path = tmp_path / "in"
    path.write_text(json.dumps(value, indent=indent))
    try:
        check_format(path, "-i in")
    except InputError as error:
        command = str(error).rpartition("convert it: ")[2]
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        path = tmp_path / "requests-lines.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(one) for one in lines] == (value if isinstance(value, list) else [value])
