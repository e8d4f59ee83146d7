"""Builds a binary package (bdist) with the CPU kernels compiled, so that users need no compiler.

    python -m dev.binary_package [--platform manylinux_2_34_x86_64] [--output dist]

It is for one platform (`py3-none-linux_x86_64` and so on); the package of `make dist` is for all of
them and compiles the kernels at first use. An index such as PyPI asks for a manylinux tag, whose
number is the version of the C library on the machine that builds (`ldd --version`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from qwen2vl.linear.cpu.build import PREBUILT, build_for_distribution

ROOT = Path(__file__).parents[1]
BUILD = (sys.executable, "-m", "build", "--no-isolation")


def build_package(platform: str, output: Path) -> None:
    """Compile the kernels and build the package into the folder `output`."""
    with tempfile.TemporaryDirectory() as folder:
        # From a copy of the source: a compiled file that stays in it would be used after changes.
        subprocess.run([*BUILD, "--sdist", "--outdir", folder, str(ROOT)], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        source = Path(folder) / archive.name.removesuffix(".tar.gz")
        build_for_distribution(source / PREBUILT.relative_to(ROOT))
        option = f"--config-setting=--build-option=--plat-name={platform}"
        command = [*BUILD, "-w", option, "--outdir", str(output), str(source)]
        subprocess.run(command, check=True)


def main() -> None:
    """Read the command line, and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    parser.add_argument("--platform", default=default, help="tag of the package (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    build_package(args.platform, args.output)


if __name__ == "__main__":
    main()
