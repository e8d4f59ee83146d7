"""llama.cpp's `llama-server` on nano: build, conversion to GGUF, command.

    CACHE/llama-server/build       of the sources in llama-cpp-python (the same as peers_install.py)
    CACHE/llama-server/NAME.gguf   nano in f32 or f16, and its vision tower (mmproj)

The build takes 15 minutes on two cores (CMAKE_BUILD_PARALLEL_LEVEL sets the number of compilers).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers_install import LLAMA, WORKERS, InstallError

__all__ = ["LlamaServer"]

# OpenSSL, the web interface and its download are not needed; native: what the CPU has.
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


@dataclass(frozen=True)
class LlamaServer:
    """Builds and converts on demand; finished files are reused."""

    cache: Path
    model: Path

    @property
    def folder(self) -> Path:
        """Folder of the build and the GGUF files."""
        return self.cache / "llama-server"

    def binary(self) -> Path:
        """Return the program, building it if needed.

        Raises:
            InstallError: it could not be downloaded or built.
        """
        program = self.folder / "build" / "bin" / "llama-server"
        if program.is_file():
            return program
        if shutil.which("cmake") is None:
            raise InstallError("cmake is not installed: pip install cmake ninja, or apt-get")
        build = str(self.folder / "build")
        self._run(["cmake", "-S", str(self._sources()), "-B", build, *FLAGS])
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        self._run(["cmake", "--build", build, "--target", "llama-server", "-j", jobs])
        return program

    def gguf(self, kind: str) -> Path:
        """Return a GGUF file: f32, f16 or mmproj (the vision tower, f32).

        Raises:
            InstallError: it could not be converted.
        """
        target = self.folder / f"{self.model.name}-{kind}.gguf"
        if target.is_file():
            return target
        partial = target.with_suffix(".half")
        options = ["--outtype", "f32", "--mmproj"] if kind == "mmproj" else ["--outtype", kind]
        script = [sys.executable, str(WORKERS / "convert_llama.py"), str(self._sources())]
        self._run([*script, *options, "--outfile", str(partial), str(self.model)])
        partial.rename(target)
        return target

    def command(
        self, port: int, *, kind: str, concurrency: int, threads: int, context: int = 1024
    ) -> list[str]:
        """Return the command: as many slots as clients, `context` tokens each.

        Raises:
            InstallError: see `binary` and `gguf`.
        """
        options = {
            "--model": str(self.gguf(kind)),
            "--mmproj": str(self.gguf("mmproj")),
            "--host": "127.0.0.1",
            "--port": str(port),
            "--parallel": str(concurrency),
            "--ctx-size": str(concurrency * context),
            "--threads": str(threads),
            "--threads-batch": str(threads),
            # The template in nano's folder writes vision tokens; the server puts them itself.
            "--chat-template": "chatml",
        }
        flags = ["--no-webui", "--log-disable", "--offline"]
        pairs = [item for pair in options.items() for item in pair]
        return [str(self.binary()), *pairs, *flags]

    def _sources(self) -> Path:
        """Return the folder of llama.cpp, downloading llama-cpp-python if needed."""
        name = LLAMA.replace("-", "_").replace("==", "-")
        folder = self.cache / "sources"
        sources = folder / name / "vendor" / "llama.cpp"
        if sources.is_dir():
            return sources
        folder.mkdir(parents=True, exist_ok=True)
        args = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), LLAMA]
        self._run([sys.executable, "-m", "pip", "download", *args])
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        return sources

    def _run(self, command: Sequence[str]) -> None:
        """Run a command with its output in CACHE/llama-server/install.log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "install.log"
        print("+", *command, file=sys.stderr)
        with log.open("ab") as out:
            done = subprocess.run(command, stdout=out, stderr=out)
        if done.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise InstallError(f"{Path(command[0]).name} {command[1]}: {' '.join(last)[:200]}")
