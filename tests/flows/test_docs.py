"""Every code block of README.md and docs/ runs as written, or is marked as one that cannot.

A page is one session: its blocks run in order, in a folder that holds what a reader has (`world`).
`python` blocks share one namespace, and `print(...)  # TEXT` promises TEXT. In an `sh` block (or
one without a language) each `qwen2vl` command runs in this process, and `train` takes one step
unless the page says how many; a `make` target must be one that .ci/run runs. A `text` block
directly after is the output of the last command ("..." stands for any text); elsewhere it shows
something that is not code. A `toml` block is a file, which its first line names.

Where a page names http://127.0.0.1:8000, a server of nano listens: `qwen2vl serve` itself only
parses its options, and `curl` is the program of that name.

Marks, in the line before a block:

    <!-- not tested: needs official weights -->       or another of NEEDS
    <!-- slow test -->                                 runs in the slow set only
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qwen2vl import LLM, AsyncLLM, load
from qwen2vl.cli.main import COMMANDS, main
from qwen2vl.cli.serve.vllm_options import VLLM_OPTIONS
from qwen2vl.errors import ConfigError
from qwen2vl.processor.media.decoder import LOCAL_DECODER
from qwen2vl.recipes import list_recipes, load_recipe
from qwen2vl.server import ServerConfig
from qwen2vl.server.launch import build_state, prepare_llm
from qwen2vl.train.config import override
from qwen2vl.weights import resolve_model
from tests.adapters import TEXT, write_adapter
from tests.server.conftest import running_server

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NEEDS = {"official weights", "a GPU", "several GPUs", "data", "the network", "hours"}
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
PROMISE = re.compile(r"^ *print\(.*\)  # (.+)$", re.M)
WRITES = re.compile(r"^qwen2vl train (?P<arguments>[^#\n]+?) *# writes (?P<path>\S+)$", re.M)
MAKE = re.compile(r"^\s*(?:step )?(?:bare )?make ([\w-]+)", re.M)  # of a command of .ci/run
SERVER = "http://127.0.0.1:8000"  # of the pages; the tests' own listens at another port
TINY = ("stages.0.steps=1", "num_workers=0", "num_threads=1")  # of training commands


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    place: str  # page and line, for failures
    mark: str
    language: str
    code: str
    output: str | None = None  # of the last command of an `sh` block

    @property
    def is_slow(self) -> bool:
        return self.mark == "slow test"

    @property
    def missing(self) -> str:
        """What the test machine lacks, according to the mark."""
        return self.mark.removeprefix("not tested: needs ") if "not tested" in self.mark else ""

    @property
    def commands(self) -> list[list[str]]:
        """The commands of an `sh` block, as words."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    """Read the fenced blocks of a page; outputs are joined to their commands."""
    text = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    end_of_sh = -1
    for match in FENCE.finditer(text):
        follows_sh = end_of_sh >= 0 and not text[end_of_sh : match.start()].strip()
        if follows_sh and match["language"] == "text":
            blocks[-1] = replace(blocks[-1], output=match["code"])
            end_of_sh = -1
            continue
        blocks.append(
            Block(
                place=f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}",
                mark=match["mark"] or "",
                language=match["language"] or "sh",
                code=match["code"],
            )
        )
        end_of_sh = match.end() if blocks[-1].language == "sh" else -1
    return blocks


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with_blocks(*, slow: bool) -> list[Path]:
    return [
        page
        for page in PAGES
        if any(
            b.is_slow == slow and not b.missing and b.language != "text" for b in blocks_of(page)
        )
    ]


# What a reader has ------------------------------------------------------------------------------


def adapter_folder(recipe: str, *overrides: str) -> Path:
    """Return where a training run of LoRA writes its last adapter."""
    config = override(load_recipe(recipe), overrides)
    return Path(config.folder) / f"adapter-{sum(stage.steps for stage in config.stages):06d}"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the files that the pages name: demo images, a photo, conversations, an adapter."""
    folder = tmp_path_factory.mktemp("docs") / "world"
    folder.mkdir()
    with contextlib.chdir(folder):
        assert CliRunner().invoke(main, ["demo"]).exit_code == 0
        shutil.copyfile("out/demo/shapes_2.png", "photo.jpg")
        content = [{"image": "photo.jpg"}, {"text": "What is this?"}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "a shape"},
        ]
        Path("mine.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
        model, _ = load("nano", dtype="float32")
        write_adapter(adapter_folder("lora"), model, TEXT)
        Path("DIR").symlink_to(resolve_model("nano"), target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """Serve nano with the defaults of `qwen2vl serve`, media workers aside."""
    with LLM("nano", dtype="float32", device="cpu") as llm:
        config = ServerConfig()
        prepare_llm(llm, config, LOCAL_DECODER)
        engine = AsyncLLM(llm)
        with running_server(build_state(engine, config)) as live:
            yield live.base_url
        engine.close()


@pytest.fixture
def session(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Enter a fresh copy of the reader's folder; return the namespace of a page's programs."""
    shutil.copytree(world, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {"__name__": "__main__"}


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block; compare its output with what the page promises."""
    if block.language == "python":
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            exec(compile(block.code, block.place, "exec"), namespace)  # our own text
        if promised := PROMISE.findall(block.code):
            assert stdout.getvalue().splitlines() == promised, block.place
    elif block.language == "toml":
        Path(block.code.split("\n", 1)[0].lstrip("# ")).write_text(block.code, encoding="utf-8")
    elif block.language == "sh":
        output = ""
        for words in block.commands:
            if words[0] == "curl":
                output = run_curl(words, block.place)
            else:
                output = run_command(words, block.place) if words[0] == "qwen2vl" else ""
        if block.output is not None:
            pattern = re.escape(block.output.strip()).replace(re.escape("..."), ".*")
            assert re.fullmatch(pattern, output.strip(), re.S), f"{block.place}: printed {output}"


def run_command(words: list[str], place: str) -> str:
    """Run one `qwen2vl` command in this process; return what it printed to stdout."""
    arguments = words[1:]
    if arguments[0] == "serve":  # it would not end
        assert isinstance(main, click.Group)
        command = main.get_command(click.Context(main), "serve")
        assert command is not None
        command.make_context("serve", arguments[1:])  # raises if an option is unknown
        return ""
    if arguments[0] == "train":
        given = {word.partition("=")[0] for word in words}
        arguments += [setting for setting in TINY if setting.partition("=")[0] not in given]
    stdin = b""
    if "<" in arguments:  # a redirection, at the end
        *arguments, _, name = arguments
        stdin = Path(name).read_bytes()
    result = CliRunner().invoke(main, arguments, input=stdin)
    assert result.exit_code == 0, f"{place}: {shlex.join(words)}: {result.stderr}"
    return result.stdout


def run_curl(words: list[str], place: str) -> str:
    """Run curl; a response that is an error fails. Return what it printed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(
        ["curl", "-sS", "--fail-with-body", "--noproxy", "*", *words[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{place}: {done.stdout} {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", pages_with_blocks(slow=False), ids=name_of)
def test_the_blocks_of_a_page_run(
    page: Path, session: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    blocks = [b for b in blocks_of(page) if not b.missing and not b.is_slow]
    if any(SERVER in block.code for block in blocks):
        url = request.getfixturevalue("server_url")
        blocks = [replace(block, code=block.code.replace(SERVER, url)) for block in blocks]
    for block in blocks:
        run(block, session)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with_blocks(slow=True), ids=name_of)
def test_the_slow_blocks_of_a_page_run(page: Path, session: dict[str, Any]) -> None:
    for block in blocks_of(page):
        if block.is_slow:
            run(block, session)


# Which blocks run -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_runs_or_is_marked(page: Path) -> None:
    assert not [problem for block in blocks_of(page) for problem in problems_of(block)]


def problems_of(block: Block) -> Iterator[str]:
    """Yield why a block is neither run nor marked."""
    if block.mark and not block.is_slow and block.missing not in NEEDS:
        yield f"{block.place}: unknown mark {block.mark!r}; needs one of {', '.join(sorted(NEEDS))}"
    if block.missing:
        return
    if block.language not in ("python", "sh", "text", "toml"):
        yield f"{block.place}: {block.language} does not run; use python, sh, text or toml"
    for words in block.commands if block.language == "sh" else ():
        if words[0] == "make":
            if words[1] not in targets_of_ci():
                yield f"{block.place}: .ci/run does not run make {words[1]}; mark the block"
        elif words[0] not in ("qwen2vl", "curl"):
            yield f"{block.place}: {words[0]} is not run; mark the block"


def targets_of_ci() -> set[str]:
    """List the targets of the commands `make TARGET` of .ci/run, comments and texts aside."""
    return set(MAKE.findall((ROOT / ".ci" / "run").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```sh\nqwen2vl demo\n```", None),
        ("```sh\nmake test  # fast\n```", None),
        ("```python\nprint(1)  # 1\n```", None),
        ("```text\nanything\n```", None),
        ("<!-- not tested: needs a GPU -->\n```sh\ntorchrun x\n```", None),
        ("```sh\ntorchrun x\n```", "torchrun is not run"),
        ("```sh\nmake slow\n```", "does not run make slow"),
        ("```sh\nmake tes\n```", "does not run make tes"),
        ("```sh\nmake docs\n```", "does not run make docs"),
        ("```sh\nmake bench\n```", "does not run make bench"),
        ("```rust\nfn\n```", "rust does not run"),
        ("<!-- not tested: needs luck -->\n```sh\nqwen2vl demo\n```", "unknown mark"),
    ],
)
def test_problems_of_blocks(
    text: str, complaint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n", encoding="utf-8")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text(
        'step bare make test | tee "$log"\n# make docs\necho "make bench" # make bench\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    problems = [problem for block in blocks_of(page) for problem in problems_of(block)]
    assert len(problems) == (complaint is not None)
    assert complaint is None or complaint in problems[0]


def test_a_broken_promise_is_found() -> None:
    def block(**fields: Any) -> Block:
        return Block(**{"place": "page", "mark": "", "language": "python", **fields})

    run(block(code="x = 1\nprint(x)  # 1\n"), {})
    with pytest.raises(AssertionError):
        run(block(code="print(1)  # 2\n"), {})
    version = block(language="sh", code="qwen2vl --version\n", output="qwen2vl, version ...\n")
    run(version, {})
    with pytest.raises(AssertionError, match="printed"):
        run(block(language="sh", code="qwen2vl --version\n", output="qwen2vl, version\n"), {})


def promised_adapters(page: Path) -> list[tuple[str, str]]:
    """List the arguments of `qwen2vl train` and the adapters that a page says it writes."""
    return [match for block in blocks_of(page) for match in WRITES.findall(block.code)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_training_writes_the_adapter_that_the_page_names(page: Path) -> None:
    for arguments, path in promised_adapters(page):
        assert Path(path) == adapter_folder(*arguments.split())


def test_the_readme_promises_an_answer_and_an_adapter() -> None:
    assert promised_adapters(PAGES[0])
    assert any(PROMISE.search(b.code) for b in blocks_of(PAGES[0]) if b.language == "python")


# What the prose names ---------------------------------------------------------------------------


def spans_of(page: Path) -> list[str]:
    """List the code spans of a page's prose."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def options_of(name: str) -> set[str]:
    """List the options of a command of `qwen2vl`."""
    assert isinstance(main, click.Group)
    command = main.get_command(click.Context(main), name)
    assert command is not None
    parameters = command.get_params(click.Context(command))
    return {option for p in parameters for option in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_prose_have_these_options(page: Path) -> None:
    wrong = [
        f"{span}: {word}"
        for span in spans_of(page)
        if (words := span.split())[0] == "qwen2vl" and words[1:] and words[1] in COMMANDS
        for word in words[2:]
        if re.fullmatch(r"--?[a-z][\w-]*", word) and word not in options_of(words[1])
    ]
    assert not wrong, "no such options"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_prose_exist(page: Path) -> None:
    known = {option for name in COMMANDS for option in options_of(name)}
    scripts = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")
    )
    known |= {f"--{name}" for names in VLLM_OPTIONS for name in names.split()}  # the guide's table
    options = {word for span in spans_of(page) for word in re.findall(r"^--[a-z][\w-]*", span)}
    assert not {option for option in options - known if f'"{option}"' not in scripts}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_training_keys_in_prose_exist(page: Path) -> None:
    given = [
        word
        for span in spans_of(page)
        for word in span.split()
        if re.fullmatch(r"[a-z_]+(\.\w+)+=[\w.*/-]+", word)
    ]
    assert not [word for word in given if not is_training_key(word)]


def is_training_key(assignment: str) -> bool:
    """Return whether some recipe accepts `key=value`."""
    for recipe in list_recipes():
        with contextlib.suppress(ConfigError):
            override(load_recipe(recipe), [assignment])
            return True
    return False
