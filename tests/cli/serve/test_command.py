"""Unknown options: those of vLLM are answered together, others as click does."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Run


def test_all_options_of_vllm_are_answered_at_once(run: Run) -> None:
    options = ["--tensor-parallel-size", "2", "--enable-lora", "--gpu_memory_utilization=0.9"]
    result = run("serve", "nano", *options, "--max-num-seqs", "4")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    names = ["--tensor-parallel-size", "--enable-lora", "--gpu_memory_utilization"]
    assert [name in line for name, line in zip(names, lines, strict=True)] == [True] * 3
    assert "--max-num-seqs:" not in result.stderr


@pytest.mark.parametrize("option", ["--max_model_len", "--prot"])
def test_others_get_a_suggestion(run: Run, option: str) -> None:
    result = run("serve", option, "1")
    assert (result.exit_code, "Did you mean" in result.stderr) == (2, True)
