"""vLLM's option names are answered; none of them is an option here."""

from __future__ import annotations

import pytest

from qwen2vl.cli.serve.vllm_options import VLLM_OPTIONS, describe_vllm_options
from tests.flows.test_docs import options_of

NAMES = [name for names in VLLM_OPTIONS for name in names.split()]


def test_each_name_is_answered_once() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert not {f"--{name}" for name in NAMES} & options_of("serve")


@pytest.mark.parametrize("hint", VLLM_OPTIONS.values())
def test_answers_name_options_that_exist(hint: str) -> None:
    words = hint.replace(";", " ").replace(",", " ").split()
    assert {word for word in words if word.startswith("--")} <= options_of("serve")


@pytest.mark.parametrize(
    "argument",
    [
        *("--tensor-parallel-size", "--tensor_parallel_size", "--tensor-parallel-size=2", "-tp"),
        "tensor_parallel_size",
    ],
)
def test_spellings(argument: str) -> None:
    option = argument.partition("=")[0]
    hint = "not supported: a server uses one device"
    assert (describe_vllm_options([argument]) or "").startswith(f"{option}: {hint}")


def test_negations() -> None:
    hint = describe_vllm_options(["--no-enable-chunked-prefill"])
    assert hint is not None and "always on" in hint


def test_options_of_one_answer_are_in_one_line() -> None:
    given = ["--ssl-keyfile", "key", "--enable-lora", "--ssl-certfile", "cert", "--ssl-keyfile"]
    hint = describe_vllm_options(given)
    assert hint is not None
    first, second = hint.splitlines()
    assert first.startswith("--ssl-keyfile, --ssl-certfile: ")
    assert second.startswith("--enable-lora: ")


def test_others_have_no_answer() -> None:
    assert describe_vllm_options(["--prot", "nano", "--", ""]) is None
