"""Latency comparison with transformers, llama.cpp and OpenVINO GenAI on the same machine.

    python benchmarks/peers.py [--full] [--only-install] [--rounds 3]

All peers run the architecture of the official 2B with random weights on a prompt of one image of
448 x 448 and 50 text tokens, with 32 output tokens; with --full also 1344 x 1008 and text alone.
Measured are the time to first token (TTFT) of a preprocessed prompt and the time per output token
(step). Each peer and precision is a worker process; workers run in turns, once for warm-up and once
measured, and every prompt has another image and other text, so that no prefix or encoder cache
hits. For qwen2vl, a second prompt on the same image is measured as well. Then follow interleaved
paired runs: all workers decode a few tokens in quick succession, so that steps are compared within
the same minutes. The workers of a comparison stay in memory together (GROUPS). Prints one line for
results.md. Requires 20 GB of unused memory, and on the first run 25 GB of disk and half an hour to
install the peers (peers_install.py).
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
from peers_figures import PAIRED_RUNS, Figures, summary, versions
from peers_install import WORKERS, InstallError, PeerEnvironments
from record import ROOT, format_result

FOLDER = ROOT / "build" / "official_2b"
CACHE = Path.home() / ".cache" / "qwen2vl" / "peers"

NEW_TOKENS = 32
WARMUP_TOKENS = 4
SECOND_PROMPT_TOKENS = 8  # of the output for a second prompt on the same image
PAIRED_TOKENS = 16
PAIRED_ROUNDS = 4  # paired runs for each round

# A worker is stopped after its turn if less memory than this is available.
MIN_FREE_MEMORY = 3 * 2**30

# Peers that are compared with each other, one group after another: the weights of a group fit in
# memory together, so that memory-mapped ones are not read again. transformers is the fastest peer
# on prompts with images.
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

# Each is one token with the preceding space; random sequences of them share no prefix.
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
    """A worker process has ended; the text has the reason."""


@dataclass(frozen=True)
class PromptShape:
    """Size of a prompt: text tokens and image."""

    num_text_tokens: int
    size: tuple[int, int] | None = None  # height and width of the image

    @property
    def num_tokens(self) -> int:
        """Number of prompt tokens: text, vision tokens, vision start and end."""
        return self.num_text_tokens + (self.size[0] * self.size[1] // 784 + 2 if self.size else 0)


SHAPES = {
    "448x448": PromptShape(50, (448, 448)),
    "1344x1008": PromptShape(50, (1344, 1008)),
    "text": PromptShape(300),
    # llama.cpp decodes after a text prompt of the same length where its vision tower is not run.
    "448x448, words only": PromptShape(50 + 256 + 2),
    # Run in quick succession, so that all peers decode within the same minutes of a shared machine.
    PAIRED_RUNS: PromptShape(32),
}


@dataclass
class PeerRun:
    """One peer at one precision: its worker script, prompts and measurements."""

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
        """Key in the results."""
        return f"{self.peer}/{self.precision}"


class Worker:
    """A worker process: one JSON line per request and response (see peer/protocol.py)."""

    def __init__(self, peer_run: PeerRun, threads: int, log: Path) -> None:
        python, options = peer_run.prepare()
        options |= {"precision": peer_run.precision, "threads": threads}
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [str(python), str(WORKERS / peer_run.script), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            )
        self.about: dict[str, Any] = self._receive("ready")

    def request(self, case: dict[str, Any]) -> Figures:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"case": case}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker has ended; `_receive` raises the reason
        return self._receive("figures")

    def _receive(self, key: str) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        message = json.loads(line) if line else {}
        if key in message:
            return message[key]
        code = self.process.wait()
        reason = message.get("error") or " ".join(self.log.read_text().strip().splitlines()[-1:])
        raise WorkerError(f"ended with {code}: {reason[:200]}")

    def close(self) -> None:
        """Close the input of the worker, which ends it, and wait for its exit."""
        assert self.process.stdin is not None
        with contextlib.suppress(
            BrokenPipeError
        ):  # a request that was never read is still in the buffer
            self.process.stdin.close()
        self.process.wait()


class PromptSampler:
    """Samples prompts without a common prefix or image."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.seeds = itertools.count(1)

    def draw(
        self, shape: PromptShape, new_tokens: int, *, seed: int | None = None
    ) -> dict[str, Any]:
        """Sample a prompt with new text, about the image of `seed` or a new one."""
        new_seed = next(self.seeds)
        text = "".join(
            f" {word}" for word in random.Random(new_seed).choices(WORDS, k=shape.num_text_tokens)
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) == shape.num_text_tokens, "a word of WORDS is not one token"
        return {
            "text": text,
            "ids": ids,
            "size": shape.size,
            "seed": new_seed if seed is None else seed,
            "new_tokens": new_tokens,
        }


class PeerBenchmark:
    """Runs the workers of a group in turns and collects their measurements."""

    def __init__(self, peer_runs: list[PeerRun], folder: Path, logs: Path, threads: int) -> None:
        self.peer_runs = peer_runs
        self.prompts = PromptSampler(folder)
        self.logs = logs
        self.threads = threads
        self.unmeasured: dict[str, str] = {}

    def run(self, rounds: int) -> None:
        """Measure all peers `rounds` times in alternating order, then the paired runs."""
        for number in range(rounds):
            for peer_run in list(self.peer_runs)[:: 1 if number % 2 else -1]:
                try:
                    self._measure(peer_run)
                except (InstallError, WorkerError) as error:
                    self.drop(peer_run, error)
        self._measure_paired_runs(PAIRED_ROUNDS * rounds)
        for peer_run in self.peer_runs:
            self._stop_worker(peer_run)

    def _measure_paired_runs(self, rounds: int) -> None:
        """Decode a few tokens with each peer in quick succession; the first round is a warm-up."""
        for number in range(rounds + 1):
            for peer_run in list(self.peer_runs)[:: 1 if number % 2 else -1]:
                try:
                    self._start_worker(peer_run)
                    note = PAIRED_RUNS if number else None
                    self._run_prompt(peer_run, PAIRED_RUNS, PAIRED_TOKENS, note=note)
                except WorkerError as error:
                    self.drop(peer_run, error)

    def drop(self, peer_run: PeerRun, error: Exception) -> None:
        """Remove a peer and record the reason, without the home folder's path."""
        self._stop_worker(peer_run)
        self.unmeasured[peer_run.name] = str(error).replace(str(Path.home()), "~")
        self.peer_runs.remove(peer_run)
        print(f"{peer_run.name} is not measured: {error}", file=sys.stderr)

    def _start_worker(self, peer_run: PeerRun) -> None:
        if peer_run.worker is None:
            log = self.logs / f"{peer_run.name.replace('/', '-')}.log"
            peer_run.worker = Worker(peer_run, self.threads, log)
            peer_run.about = peer_run.worker.about

    def _measure(self, peer_run: PeerRun) -> None:
        self._start_worker(peer_run)
        for name in peer_run.shapes:
            self._run_prompt(peer_run, name, WARMUP_TOKENS)
            case = self._run_prompt(peer_run, name, NEW_TOKENS, note=name)
            if peer_run.peer == "ours" and SHAPES[name].size:
                seed = case["seed"]
                self._run_prompt(
                    peer_run, name, SECOND_PROMPT_TOKENS, note=f"{name}, again", seed=seed
                )
        if available_memory() < MIN_FREE_MEMORY:
            self._stop_worker(peer_run)

    def _run_prompt(
        self,
        peer_run: PeerRun,
        shape: str,
        new_tokens: int,
        *,
        note: str | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """Run one prompt, and store its measurement under the name `note`."""
        assert peer_run.worker is not None
        case = self.prompts.draw(SHAPES[shape], new_tokens, seed=seed)
        figures = peer_run.worker.request(case)
        expected = (SHAPES[shape].num_tokens, new_tokens)
        if (figures["prompt_tokens"], figures["new_tokens"]) != expected:
            raise WorkerError(f"{shape}: {figures} for a prompt and an output of {expected} tokens")
        if note is not None:
            peer_run.times.setdefault(note, []).append(figures)
            print(peer_run.name, note, json.dumps(figures), file=sys.stderr, flush=True)
        return case

    def _stop_worker(self, peer_run: PeerRun) -> None:
        if peer_run.worker is not None:
            peer_run.worker.close()
            peer_run.worker = None


def available_memory() -> int:
    """Return the memory available without swapping, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(text.split()[1]) for text in lines if text.startswith("MemAvailable"))


def peer_runs(environments: PeerEnvironments, *, full: bool) -> Iterator[PeerRun]:
    """List all peers and precisions."""
    shapes = ("448x448", "1344x1008", "text") if full else ("448x448",)
    python = Path(sys.executable)
    folder = {"model": str(environments.model)}
    for precision in ("bf16", "bf16 compiled", "int8", "int8 compiled", "int4", "int4 compiled"):
        yield PeerRun("ours", precision, "run_ours.py", lambda: (python, dict(folder)), shapes)
    yield PeerRun(
        "transformers", "bf16", "run_transformers.py", lambda: (python, dict(folder)), shapes
    )
    for kind in ("bf16", "Q8_0", "Q4_K_M"):
        llama_shapes = shapes if full else ("448x448, words only",)
        yield PeerRun(
            "llama.cpp", kind, "run_llama.py", llama(environments, kind, full), llama_shapes
        )
    for kind in ("fp16", "int8", "int4") if full else ("int8", "int4"):
        # 16-bit weights are stored as fp16; the arithmetic is bf16 where the CPU supports it.
        precision = "bf16" if kind == "fp16" else kind
        yield PeerRun(
            "OpenVINO", precision, "run_openvino.py", openvino(environments, kind), shapes
        )


def llama(
    environments: PeerEnvironments, kind: str, full: bool
) -> Callable[[], tuple[Path, dict[str, Any]]]:
    def prepare() -> tuple[Path, dict[str, Any]]:
        options = {"model": str(environments.gguf(kind))}
        if full:
            options["mmproj"] = str(environments.gguf("mmproj"))
        return environments.python("llama"), options

    return prepare


def openvino(
    environments: PeerEnvironments, kind: str
) -> Callable[[], tuple[Path, dict[str, Any]]]:
    return lambda: (environments.python("openvino"), {"model": str(environments.openvino(kind))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--full", action="store_true", help="all prompt shapes and all peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="peers, runs or groups: ours, ours/int8, 8 bits"
    )
    parser.add_argument("--only-install", action="store_true")
    args = parser.parse_args()
    # Only for the machine entry of the result: nothing is computed here.
    torch.set_num_threads(args.threads)
    if not args.model.is_dir():
        build = [sys.executable, str(ROOT / "benchmarks" / "official_2b.py")]
        subprocess.run([*build, "--folder", str(args.model)], check=True, stdout=sys.stderr)
    environments = PeerEnvironments(args.cache, args.model)
    numbers: dict[str, Any] = {}
    used: dict[str, str] = {}
    unmeasured = dict(UNMEASURED)
    for group, names in GROUPS.items():
        chosen = [
            peer_run
            for peer_run in peer_runs(environments, full=args.full)
            if peer_run.name in names
            and (not args.only or {peer_run.peer, peer_run.name, group} & set(args.only))
        ]
        benchmark = PeerBenchmark(chosen, args.model, args.cache, args.threads)
        for peer_run in list(benchmark.peer_runs):
            try:
                peer_run.prepare()
            except InstallError as error:
                benchmark.drop(peer_run, error)
        if not args.only_install and benchmark.peer_runs:
            benchmark.run(args.rounds)
            numbers[group] = summary(benchmark.peer_runs)
            used |= versions(benchmark.peer_runs)
        unmeasured |= benchmark.unmeasured
    if numbers:
        print(format_result({**numbers, "versions": used, "unmeasured": unmeasured}))


if __name__ == "__main__":
    main()
