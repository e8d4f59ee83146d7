"""`qwen2vl eval`: notes on parts that are left out, and on an interrupted run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwen2vl.cli.main import main
from qwen2vl.errors import ConfigError
from qwen2vl.eval.suites.frozen_suite import FrozenSuite, open_frozen_suite
from tests.cli.commands.test_eval import OracleLLM, oracle_llm, use_llm

# The package exports the command under the name of its module.
command = import_module("qwen2vl.cli.commands.eval")


def test_parts_that_lack_the_same_are_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_part(self: FrozenSuite, part: str) -> None:
        if part != "still":
            raise ConfigError("the dataset is absent; fetch it")

    monkeypatch.setattr(FrozenSuite, "check_part", check_part)
    suite = open_frozen_suite("clips")
    assert command._drawable_parts(suite, suite.parts) == ["still"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "qwen2vl: direction, direction_shuffled and 5 more parts are left out: the dataset is "
        "absent; fetch it"
    )
    with pytest.raises(ConfigError, match="fetch it"):
        command._drawable_parts(suite, suite.parts[:2])
    assert capsys.readouterr().err == ""


def test_an_interrupted_run_says_how_many_answers_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    llm: OracleLLM = oracle_llm("counting")
    answer = llm.generate_prepared

    def interrupted(*args: object, **options: object) -> object:
        if len(llm.batch_sizes) == 2:
            raise KeyboardInterrupt
        return answer(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(llm, "generate_prepared", interrupted)
    use_llm(monkeypatch, llm)
    output = tmp_path / "r.jsonl"
    result = CliRunner().invoke(main, ["eval", "--task", "counting", "-o", str(output)])
    assert result.exit_code != 0
    assert f"128 of 150 answers are in {output}; the same command continues" in result.stderr
    assert len(output.read_text(encoding="utf-8").splitlines()) == 129
