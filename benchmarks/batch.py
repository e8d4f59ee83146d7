"""`qwen2vl batch` beside LLM.chat: the same small questions, interleaved, each in a process.

    python benchmarks/batch.py [--requests 1000] [--runs 5]

"run" is the time of the questions alone: that of `LLM.chat`, and that which `batch` prints.
"process" is the whole process, with imports and loading, and "cpu" its CPU seconds, which other
processes of the machine disturb less. Ratios are medians of the runs' ratios, batch over chat; the
answers are compared. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from record import format_result

WORDS = "apple river stone cloud table green seven music north paper".split()
MAX_TOKENS = 16
RUN_SECONDS = re.compile(r" failed, in ([\d.]+) s ")

CHAT = """
import json, sys, time
from qwen2vl.threads import limit_spinning
limit_spinning()
from qwen2vl.cli import options
import qwen2vl
requests = [json.loads(line) for line in open("requests.jsonl")]
given = {"model": "nano", "adapters": ()}
llm = options.load_model_from_options(given).llm
params = qwen2vl.SamplingParams(temperature=0, max_tokens=%d, skip_grounding_tokens=True)
began = time.perf_counter()
found = llm.chat([one["body"]["messages"] for one in requests], params)
seconds = time.perf_counter() - began
answers = {r["custom_id"]: c.text for r, c in zip(requests, found)}
json.dump({"seconds": seconds, "answers": answers}, sys.stdout)
"""


def write_requests(path: Path, count: int) -> None:
    """Write requests for nano: words to be reversed."""
    rng = random.Random(5)
    with path.open("w") as file:
        for number in range(count):
            question = f"What is {rng.choice(WORDS)}{number} backwards?"
            messages = [{"role": "user", "content": question}]
            body = {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
            line = {"custom_id": str(number), "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def run(command: list[str], folder: str) -> tuple[str, str, dict[str, float]]:
    """Run a process; return its stdout and stderr, and its wall and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, done.stderr, {"process": seconds, "cpu": cpu}


def run_chat(folder: str) -> tuple[dict[str, str], dict[str, float]]:
    """Answer the requests by LLM.chat; return the answers and the seconds."""
    stdout, _, seconds = run([sys.executable, "-c", CHAT % MAX_TOKENS], folder)
    result = json.loads(stdout)
    return result["answers"], {"run": result["seconds"], **seconds}


def run_batch(folder: str) -> tuple[dict[str, str], dict[str, float]]:
    """Answer the requests by `qwen2vl batch`; return the answers and the seconds."""
    output = Path(folder, "answers.jsonl")
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "qwen2vl", "batch", "requests.jsonl", "-o", output.name]
    _, stderr, seconds = run(command, folder)
    printed = RUN_SECONDS.search(stderr)
    assert printed is not None, stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    answers = {
        one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"]
        for one in lines
    }
    return answers, {"run": float(printed[1]), **seconds}


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    chats: list[dict[str, float]] = []
    batches: list[dict[str, float]] = []
    num_equal = 0
    with TemporaryDirectory() as folder:
        write_requests(Path(folder, "requests.jsonl"), given.requests)
        for number in range(given.runs):
            order = (run_chat, run_batch) if number % 2 == 0 else (run_batch, run_chat)
            results = {one: one(folder) for one in order}
            (expected, chat), (found, batch) = results[run_chat], results[run_batch]
            num_equal = sum(found.get(key) == text for key, text in expected.items())
            chats.append(chat)
            batches.append(batch)
            print(f"chat {chat}  batch {batch}  equal {num_equal}", file=sys.stderr, flush=True)
    numbers: dict[str, object] = {"requests": given.requests, "equal": num_equal}
    for name in ("run", "process", "cpu"):
        numbers[name] = {
            "chat_s": round(median(one[name] for one in chats), 2),
            "batch_s": round(median(one[name] for one in batches), 2),
            "ratio": round(
                median(b[name] / c[name] for b, c in zip(batches, chats, strict=True)), 3
            ),
        }
    print(format_result(numbers))


if __name__ == "__main__":
    main()
