"""Beside others on the same machine: transformers, llama.cpp and OpenVINO GenAI, by turns.

    python benchmarks/peers.py [--full] [--only-install] [--rounds 3]

All answer on the official 2B shape with random weights: a picture of 448 x 448 and 50 tokens of
text, 32 tokens long; with --full also 1344 x 1008 and text alone. Measured are the time from a
prompt that is ready to its first token, and the time between two tokens. Each peer and precision
is a process of its own that answers when it is its turn, once unmeasured and once measured; every
question has another picture and other words, so that no cache answers. Of ours a second question
on the same picture is measured as well. Then all sprint: a few tokens each, in quick turns, so
that steps are compared in the same minutes. Those who are compared stay in memory together
(GROUPS). Prints one line for results.md; needs 20 GB of memory that nobody else uses, and the
first time 25 GB of disk and half an hour to install the peers (peers_install.py).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
from peers_figures import SPRINT, Figures, summary, versions
from peers_install import WORKERS, InstallError, Kitchen
from record import ROOT, line

FOLDER = ROOT / "build" / "official_2b"
CACHE = Path.home() / ".cache" / "qwen2vl" / "peers"

NEW_TOKENS = 32
WARM_TOKENS = 4
SECOND_TOKENS = 8  # of the answer to a second question on a picture
SPRINT_TOKENS = 16
SPRINTS = 4  # for each round

# A worker stays between its turns while so much memory is free after them.
KEEP_FREE = 3 * 2**30

# Who is compared with whom, one group after another: together their weights fit in memory, so that
# none that are mapped from a file have to be read again. transformers is the fastest with pictures.
GROUPS = {
    "16 bits": (
        "ours/bf16",
        "ours/bf16 compiled",
        "transformers/bf16",
        "llama.cpp/bf16",
        "OpenVINO/bf16",
    ),
    "8 bits": (
        "ours/int8",
        "ours/int8 compiled",
        "transformers/bf16",
        "llama.cpp/Q8_0",
        "OpenVINO/int8",
    ),
    "4 bits": ("ours/int4", "ours/int4 compiled", "llama.cpp/Q4_K_M", "OpenVINO/int4"),
}

# Each one token with the space before it; drawn at random, they give prompts that share nothing.
WORDS = (
    "the of and to in is was for that on with as by at from are were this be have not which one "
    "all new two more when would about time people first water long little very after words called "
    "just where most know get through back much before right good man our want same tell boy came "
    "show form three small set put end does another well large must big even such because turn here"
).split()

UNMEASURED = {
    "vLLM": "no build for CPUs in the package registry",
    "SGLang": "no build for CPUs in the package registry",
}


class WorkerError(Exception):
    """A worker has ended; the text says how."""


@dataclass(frozen=True)
class Shape:
    """A kind of question."""

    num_words: int
    size: tuple[int, int] | None = None  # height and width of the picture

    @property
    def num_tokens(self) -> int:
        """Count the prompt: words, vision tokens and their two marks."""
        return self.num_words + (self.size[0] * self.size[1] // 784 + 2 if self.size else 0)


SHAPES = {
    "448x448": Shape(50, (448, 448)),
    "1344x1008": Shape(50, (1344, 1008)),
    "text": Shape(300),
    # llama.cpp decodes after a prompt of the same length where its vision tower is not measured.
    "448x448, words only": Shape(50 + 256 + 2),
    # Asked in quick turns, so that all decode in the same minutes of a machine that is shared.
    SPRINT: Shape(32),
}


@dataclass
class Contestant:
    """One peer at one precision: how to start it, and what it is asked."""

    peer: str
    precision: str
    script: str
    prepare: Callable[[], tuple[Path, dict[str, Any]]]  # interpreter, options
    shapes: tuple[str, ...]
    worker: Worker | None = None
    times: dict[str, list[Figures]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name it in figures."""
        return f"{self.peer}/{self.precision}"


class Worker:
    """A process that answers questions, one JSON line each."""

    def __init__(self, contestant: Contestant, threads: int, log: Path) -> None:
        python, options = contestant.prepare()
        options |= {"precision": contestant.precision, "threads": threads}
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [str(python), str(WORKERS / contestant.script), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            )
        self.about: dict[str, Any] = self._hear("ready")

    def ask(self, case: dict[str, Any]) -> Figures:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"case": case}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; how, is found out below
        return self._hear("figures")

    def _hear(self, key: str) -> Any:
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        message = json.loads(said) if said else {}
        if key in message:
            return message[key]
        code = self.process.wait()
        why = message.get("error") or " ".join(self.log.read_text().strip().splitlines()[-1:])
        raise WorkerError(f"ended with {code}: {why[:200]}")

    def close(self) -> None:
        """End it: a worker stops when nothing more can come."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it never read is still in the buffer
            self.process.stdin.close()
        self.process.wait()


class Questions:
    """Draws questions that share nothing with those before."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.seeds = itertools.count(1)

    def draw(self, shape: Shape, new_tokens: int, *, seed: int | None = None) -> dict[str, Any]:
        """Ask about the picture of `seed`, or a new one, in new words."""
        own = next(self.seeds)
        text = "".join(f" {word}" for word in random.Random(own).choices(WORDS, k=shape.num_words))
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) == shape.num_words, "a word of WORDS is not one token"
        return {
            "text": text,
            "ids": ids,
            "size": shape.size,
            "seed": own if seed is None else seed,
            "new_tokens": new_tokens,
        }


class Race:
    """Lets the contestants answer by turns."""

    def __init__(
        self, contestants: list[Contestant], folder: Path, logs: Path, threads: int
    ) -> None:
        self.contestants = contestants
        self.questions = Questions(folder)
        self.logs = logs
        self.threads = threads
        self.unmeasured: dict[str, str] = {}

    def run(self, rounds: int) -> None:
        """Ask everybody `rounds` times, changing who goes first."""
        for number in range(rounds):
            for contestant in list(self.contestants)[:: 1 if number % 2 else -1]:
                try:
                    self._turn(contestant)
                except (InstallError, WorkerError) as error:
                    self.give_up(contestant, error)
        self._sprint(SPRINTS * rounds)
        for contestant in self.contestants:
            self._dismiss(contestant)

    def _sprint(self, rounds: int) -> None:
        """Ask everybody for a few tokens, one right after the other; the first turn warms up."""
        for number in range(rounds + 1):
            for contestant in list(self.contestants)[:: 1 if number % 2 else -1]:
                try:
                    self._wake(contestant)
                    note = SPRINT if number else None
                    self._ask(contestant, SPRINT, SPRINT_TOKENS, note=note)
                except WorkerError as error:
                    self.give_up(contestant, error)

    def give_up(self, contestant: Contestant, error: Exception) -> None:
        """Go on without one, and say why; the line is for everybody, so folders are not named."""
        self._dismiss(contestant)
        self.unmeasured[contestant.name] = str(error).replace(str(Path.home()), "~")
        self.contestants.remove(contestant)
        print(f"{contestant.name} is not measured: {error}", file=sys.stderr)

    def _wake(self, contestant: Contestant) -> None:
        if contestant.worker is None:
            log = self.logs / f"{contestant.name.replace('/', '-')}.log"
            contestant.worker = Worker(contestant, self.threads, log)
            contestant.about = contestant.worker.about

    def _turn(self, contestant: Contestant) -> None:
        self._wake(contestant)
        for name in contestant.shapes:
            self._ask(contestant, name, WARM_TOKENS)
            case = self._ask(contestant, name, NEW_TOKENS, note=name)
            if contestant.peer == "ours" and SHAPES[name].size:
                seen = case["seed"]
                self._ask(contestant, name, SECOND_TOKENS, note=f"{name}, again", seed=seen)
        if memory_free() < KEEP_FREE:
            self._dismiss(contestant)

    def _ask(
        self,
        contestant: Contestant,
        shape: str,
        new_tokens: int,
        *,
        note: str | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Put a question, and keep the figures under the name `note`."""
        assert contestant.worker is not None
        case = self.questions.draw(SHAPES[shape], new_tokens, seed=seed)
        figures = contestant.worker.ask(case)
        asked = (SHAPES[shape].num_tokens, new_tokens)
        if (figures["prompt_tokens"], figures["new_tokens"]) != asked:
            raise WorkerError(f"{shape}: {figures} for a prompt and an answer of {asked} tokens")
        if note is not None:
            contestant.times.setdefault(note, []).append(figures)
            print(contestant.name, note, json.dumps(figures), file=sys.stderr, flush=True)
        return case

    def _dismiss(self, contestant: Contestant) -> None:
        if contestant.worker is not None:
            contestant.worker.close()
            contestant.worker = None


def memory_free() -> int:
    """Give the bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(text.split()[1]) for text in lines if text.startswith("MemAvailable"))


def contestants(kitchen: Kitchen, *, full: bool) -> Iterator[Contestant]:
    """List who takes part."""
    seen = ("448x448", "1344x1008", "text") if full else ("448x448",)
    own = Path(sys.executable)
    folder = {"model": str(kitchen.model)}
    for precision in ("bf16", "bf16 compiled", "int8", "int8 compiled", "int4", "int4 compiled"):
        yield Contestant("ours", precision, "run_ours.py", lambda: (own, dict(folder)), seen)
    yield Contestant(
        "transformers", "bf16", "run_transformers.py", lambda: (own, dict(folder)), seen
    )
    for kind in ("bf16", "Q8_0", "Q4_K_M"):
        shapes = seen if full else ("448x448, words only",)
        yield Contestant("llama.cpp", kind, "run_llama.py", llama(kitchen, kind, full), shapes)
    for kind in ("fp16", "int8", "int4") if full else ("int8", "int4"):
        # Weights of 16 bits are stored as fp16; the arithmetic is bf16 where there is any.
        precision = "bf16" if kind == "fp16" else kind
        yield Contestant("OpenVINO", precision, "run_openvino.py", openvino(kitchen, kind), seen)


def llama(kitchen: Kitchen, kind: str, full: bool) -> Callable[[], tuple[Path, dict[str, Any]]]:
    def prepare() -> tuple[Path, dict[str, Any]]:
        options = {"model": str(kitchen.gguf(kind))}
        if full:
            options["mmproj"] = str(kitchen.gguf("mmproj"))
        return kitchen.python("llama"), options

    return prepare


def openvino(kitchen: Kitchen, kind: str) -> Callable[[], tuple[Path, dict[str, Any]]]:
    return lambda: (kitchen.python("openvino"), {"model": str(kitchen.openvino(kind))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--full", action="store_true", help="more pictures, more of the peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="ours, ours/int8, 8 bits")
    parser.add_argument("--only-install", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)  # for the line alone: nothing is computed here
    if not given.model.is_dir():
        build = [sys.executable, str(ROOT / "benchmarks" / "official_2b.py")]
        subprocess.run([*build, "--folder", str(given.model)], check=True, stdout=sys.stderr)
    kitchen = Kitchen(given.cache, given.model)
    numbers: dict[str, Any] = {}
    used: dict[str, str] = {}
    unmeasured = dict(UNMEASURED)
    for group, names in GROUPS.items():
        chosen = [
            contestant
            for contestant in contestants(kitchen, full=given.full)
            if contestant.name in names
            and (not given.only or {contestant.peer, contestant.name, group} & set(given.only))
        ]
        race = Race(chosen, given.model, given.cache, given.threads)
        for contestant in list(race.contestants):
            try:
                contestant.prepare()
            except InstallError as error:
                race.give_up(contestant, error)
        if not given.only_install and race.contestants:
            race.run(given.rounds)
            numbers[group] = summary(race.contestants)
            used |= versions(race.contestants)
        unmeasured |= race.unmeasured
    if numbers:
        print(line({**numbers, "versions": used, "unmeasured": unmeasured}))


if __name__ == "__main__":
    main()
