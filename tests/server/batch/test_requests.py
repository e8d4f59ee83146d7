"""BatchInput: which lines are requests, why others are none, and which have an answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.errors import InputError
from qwen2vl.server.batch.requests import BATCH_URLS, BatchInput, BatchRequest

URLS = BATCH_URLS
BODY = {"messages": []}


def line(**fields: Any) -> str:
    return json.dumps({"custom_id": "a", "method": "POST", "url": URLS[0], "body": BODY} | fields)


def open_input(path: Path, options: str = "00000000") -> BatchInput:
    return BatchInput(
        path,
        max_bytes=1000,
        max_depth=8,
        options=options,
        describe_options=lambda digits: f"with {digits}",
    )


def read(path: Path, *lines: str | bytes, end: bytes = b"\n") -> list[BatchRequest]:
    path.write_bytes(end.join(one if isinstance(one, bytes) else one.encode() for one in lines))
    return list(open_input(path))


def answers(requests: list[BatchRequest]) -> list[dict[str, Any]]:
    return [{"id": one.id, "custom_id": one.custom_id} for one in requests]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


def test_requests_of_a_file(path: Path) -> None:
    first, second = read(
        path, b"\xef\xbb\xbf" + line().encode(), "", "  ", line(custom_id="b"), end=b"\r\n"
    )
    assert (first.number, first.custom_id, first.url, first.body) == (1, "a", URLS[0], BODY)
    assert (second.number, second.custom_id) == (4, "b")
    assert re.fullmatch(r"batch_req_4_[0-9a-f]{16}00000000", second.id)
    assert f"batch_{second.request_id}" == second.id
    assert first.error is second.error is None


def test_a_method_may_be_left_out_and_other_keys_are_ignored(path: Path) -> None:
    fields = {"custom_id": "a", "url": URLS[0], "body": BODY, "comment": "mine"}
    (request,) = read(path, json.dumps(fields))
    assert request.error is None


@pytest.mark.parametrize(
    ("text", "message", "param"),
    [
        ("{", "line 1 is not JSON: error at column 2", None),
        (b"\xff", "line 1 is not UTF-8: byte 0 is invalid", None),
        ('{"url": 1, "url": 2}', "line 1 gives the key 'url' twice in one object", None),
        ("[1]", "line 1: got [1], must be an object with custom_id, url and body", None),
        ("1", "line 1: got 1, must be an object", None),
        ("[" * 10 + "]" * 10, "line 1 nests lists and objects more than 9 deep", None),
        (line(custom_id=None), "line 1: custom_id: got None, must be a text", "custom_id"),
        (line(custom_id=""), "line 1: custom_id: got '', must be a text", "custom_id"),
        ('{"url": "x"}', "line 1: custom_id: is missing, must be a text", "custom_id"),
        (line(method="GET"), "line 1: method: got 'GET', must be POST", "method"),
        (line(url="/v1/chat/completion"), "did you mean '/v1/chat/completions'?", "url"),
        (line(url=None), "line 1: url: got None, must be one of /v1/chat/completions,", "url"),
        (line(body=None), "line 1: body: got None, must be an object", "body"),
        (line(body=[1]), "line 1: body: got [1], must be an object", "body"),
        (line(body={"stream": True}), "line 1: body: stream: got true, but answers", "stream"),
    ],
)
def test_lines_that_are_no_requests(
    path: Path, text: str | bytes, message: str, param: str | None
) -> None:
    bad, good = read(path, text, line(custom_id="next"))
    assert bad.error is not None
    assert message.replace("'", "") in bad.error.message.replace("'", "")
    assert (bad.error.status, bad.error.param) == (400, param)
    assert good.error is None


def test_a_long_line_is_refused_and_skipped(path: Path) -> None:
    exact = line(custom_id="x", body={"a": ""})
    exact = line(custom_id="x", body={"a": "y" * (1000 - len(exact))})
    long = line(body={"a": "y" * 3_000_000})
    lines = [exact, exact.replace('"y', '"yy'), long, " " * 2000 + line(), line(custom_id="b")]
    fits, above, longer, blanks, last = read(path, *lines)
    assert fits.error is None and last.error is None
    for one in (above, longer, blanks):
        assert one.error is not None and one.error.status == 413
        assert "has more than 1,000 bytes" in one.error.message
    assert [one.number for one in (fits, above, longer, blanks, last)] == [1, 2, 3, 4, 5]


def test_the_first_of_equal_ids_is_the_request(path: Path) -> None:
    lines = [line(), line(custom_id="b"), line(), line(custom_id="b")]
    first, second, *repeated = requests = read(path, *lines)
    assert first.error is None and second.error is None
    for one in repeated:
        assert one.error is not None and "is also that of an earlier line" in one.error.message
        assert one.custom_id is None, "the id is that of one answer only"
    assert len({one.id for one in requests}) == 4
    # And also if any of them has an answer.
    for mask in range(16):
        batch = open_input(path)
        done = [one for one in answers(requests) if mask >> int(one["id"].split("_")[2]) - 1 & 1]
        for number, record in enumerate(done, 1):
            batch.mark_answered(number, record)
        rest = list(batch)
        assert [one.id for one in rest] == [r.id for r in requests if r.id not in str(done)]
        assert all((one.error is None) == (one.number <= 2) for one in rest)


def test_lines_may_be_appended_but_not_changed(path: Path) -> None:
    requests = read(path, line(), line(custom_id="b"))
    with path.open("a") as file:
        file.write("\n" + line(custom_id="c"))
    batch = open_input(path)
    batch.mark_answered(1, answers(requests)[1])
    assert [one.custom_id for one in batch] == ["a", "c"]
    path.write_text(line() + "\n" + line(custom_id="B") + "\n")
    batch = open_input(path)
    batch.mark_answered(1, answers(requests)[1])
    with pytest.raises(InputError, match="line 2 is not the one that the output has an answer to"):
        list(batch)
    path.write_text(line())
    batch = open_input(path)
    batch.mark_answered(1, answers(requests)[1])
    with pytest.raises(InputError, match="line 2 is not the one"):
        list(batch)


def test_failed_requests_are_read_again(path: Path) -> None:
    requests = read(path, line(), line(custom_id="b"), line(custom_id="c"), line())
    batch = open_input(path)
    for number, record in enumerate(answers(requests), 1):
        batch.mark_answered(number, record, is_repeated=number in (1, 4))
    batch.check()  # and it is not read up
    first, last = list(batch)
    assert (first.id, first.error) == (requests[0].id, None)
    assert (last.id, last.custom_id) == (requests[3].id, None)
    assert last.error is not None and "is also that of an earlier line" in last.error.message
    path.write_text(path.read_text().replace('"b"', '"B"'))
    with pytest.raises(InputError, match="line 2 is not the one"):
        batch.check()


def test_answers_of_other_options_are_refused(path: Path) -> None:
    (request,) = read(path, line())
    batch = open_input(path, options="0000000a")
    with pytest.raises(InputError, match="line 7 of the output was written with 00000000; give"):
        batch.mark_answered(7, answers([request])[0])


def test_failed_requests_are_repeated_with_other_options_and_corrected_lines(path: Path) -> None:
    lines = [line(url="x"), "{", line(custom_id="b")]
    requests = read(path, *lines)
    path.write_text("\n".join([line(), line(custom_id="c"), lines[2]]))

    def open_marked(*repeated: int) -> BatchInput:
        batch = open_input(path, options="0000000a")
        for number in repeated:
            batch.mark_answered(number, answers(requests)[number - 1], is_repeated=True)
        return batch

    batch = open_marked(1, 2, 3)
    batch.check()
    found = list(batch)
    assert [(one.custom_id, one.error) for one in found] == [("a", None), ("c", None), ("b", None)]
    assert all(one.id.endswith("0000000a") for one in found)
    path.write_text("\n".join([line(custom_id="other"), "{", lines[2]]))
    with pytest.raises(InputError, match="line 1 is not the one that the output has an answer to"):
        open_marked(1, 2, 3).check()
    open_marked(2, 3).check()


@pytest.mark.parametrize("answer_id", [None, "", "vllm-1", "batch_req_0_" + "0" * 24])
def test_answers_of_others_are_refused(path: Path, answer_id: str | None) -> None:
    read(path, line())
    with pytest.raises(InputError, match="line 7 of the output was not written by this command"):
        open_input(path).mark_answered(7, {"id": answer_id})


def test_answers_of_no_line_or_twice_are_refused(path: Path) -> None:
    (request,) = read(path, line())
    batch = open_input(path)
    with pytest.raises(InputError, match="line 99999999999 is not the one"):
        batch.mark_answered(1, {"id": f"batch_req_99999999999_{'1' * 16}00000000"})
    batch.mark_answered(1, answers([request])[0])
    with pytest.raises(InputError, match="line 2 of the output answers line 1 of the input again"):
        batch.mark_answered(2, answers([request])[0])


def test_the_input_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give a file of JSON lines"):
        open_input(tmp_path / "none")
    with pytest.raises(InputError, match="is not a file"):
        open_input(tmp_path)


def test_reading_is_lazy(path: Path) -> None:
    path.write_text("".join(line(custom_id=str(i)) + "\n" for i in range(10)))
    requests = iter(open_input(path))
    assert next(requests).custom_id == "0"
    with path.open("a") as file:
        file.write(line(custom_id="last") + "\n")
    assert [one.custom_id for one in requests][-1] == "last"
