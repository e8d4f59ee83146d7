"""Make the environment of an evaluation harness: torch first, under our constraints.

    python benchmarks/harness_install.py lmms-eval FOLDER
    python benchmarks/harness_install.py vlmeval FOLDER

lmms-eval gets this package beside it, for `--model qwen2vl`; VLMEvalKit, which PyPI has as
ms-vlmeval, only talks to a server. torch is that of constraints.txt, and torchvision the one that
fits it; no other build is pulled in. Point pip to a CPU build (PIP_FIND_LINKS,
PIP_EXTRA_INDEX_URL) to avoid gigabytes for CUDA. Prints the interpreter and what does not work.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from record import ROOT

__all__ = ["HARNESSES", "Harness", "allowed_pins", "find_pin", "install"]

TORCHVISION = "torchvision==0.28.0"  # for the torch of constraints.txt


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """An evaluation harness, and the pins of constraints.txt that it excludes."""

    requirement: str
    exclusions: Mapping[str, str]  # package -> reason, and what pip takes instead
    with_this_package: bool  # installed beside it, editable
    keeps_torchvision: bool  # where it cannot be imported: run with harness/run_module.py


HARNESSES = {
    "lmms-eval": Harness(
        requirement="lmms-eval==0.7.3",
        exclusions={
            "av": "lmms-eval 0.7.3 needs av<16; 15.1 fits it and this package",
            "protobuf": "lmms-eval 0.7.3 pins wandb==0.25.0, which needs protobuf<7; 6.33 fits",
        },
        with_this_package=True,
        keeps_torchvision=False,
    ),
    "vlmeval": Harness(
        requirement="ms-vlmeval==0.0.20",
        exclusions={"tenacity": "google-genai 3.6, of ms-vlmeval, needs tenacity<9.2; 9.1 fits"},
        with_this_package=False,
        keeps_torchvision=True,
    ),
}


def allowed_pins(lines: Iterable[str], harness: Harness) -> list[str]:
    """Return the lines of constraints.txt without the pins that a harness excludes."""
    return [line for line in lines if _package(line) not in harness.exclusions]


def find_pin(package: str, lines: Iterable[str]) -> str:
    """Return the pin of a package, as "torch==2.13.0"."""
    return next(line.strip() for line in lines if _package(line) == package)


def install(harness: Harness, folder: Path) -> list[str]:
    """Create the environment, or bring it up to date; return notes on what does not work in it."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    allowed = folder / "constraints.txt"
    allowed.write_text("\n".join(allowed_pins(lines, harness)) + "\n", encoding="utf-8")
    torch = find_pin("torch", lines)
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", str(allowed)]
    _run([*pip, torch])  # alone, so that no other package chooses its build
    ours = ["--editable", str(ROOT)] if harness.with_this_package else []
    _run([*pip, torch, TORCHVISION, harness.requirement, *ours])
    return [*harness.exclusions.values(), *_check_torchvision(harness, python)]


def _check_torchvision(harness: Harness, python: str) -> list[str]:
    """Say what to do where torchvision does not fit the build of torch, as on a CPU."""
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return []
    problem = f"{TORCHVISION} was built for another build of torch and cannot be imported"
    if harness.keeps_torchvision:
        return [f"{problem}: start modules with benchmarks/harness/run_module.py"]
    _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
    return [f"{problem}, so it is uninstalled: send clips as files (pass_video_url=True)"]


def _package(line: str) -> str:
    return re.split(r"[=<>\[; ]", line.strip(), maxsplit=1)[0]


def _run(command: list[str]) -> None:
    print("+", *command, file=sys.stderr)
    subprocess.run(command, check=True)


def main() -> None:
    """Install, and print the interpreter and the notes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("harness", choices=HARNESSES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    folder = given.folder.resolve()
    notes = install(HARNESSES[given.harness], folder)
    print(folder / "bin" / "python")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    main()
