"""Installation of the peers that peers.py measures: environments and model files in a cache folder.

    CACHE/llama, CACHE/openvino      one virtual environment each, separate from our dependencies
    CACHE/sources                    of llama-cpp-python, with the converter to GGUF
    CACHE/models/NAME-DIGEST         the random 2B in the format of each peer

Finished environments and files are reused; an environment whose pins have changed is rebuilt.
Compilation uses all cores unless CMAKE_BUILD_PARALLEL_LEVEL is set. torch is the build that pip
finds: point it to a CPU build (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) to avoid gigabytes for CUDA.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["InstallError", "PeerEnvironments"]

WORKERS = Path(__file__).resolve().parent / "peer"

LLAMA = "llama-cpp-python==0.3.36"

# With native AMX its quantized kernels crash (0.3.36); it is built with AVX-512 and its bf16 and
# int8 instructions instead.
LLAMA_FLAGS = (
    "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON "
    "-DGGML_AVX512_BF16=ON"
)


class InstallError(Exception):
    """A peer cannot be installed here; the text has the reason."""


@dataclass(frozen=True)
class Environment:
    """Packages to install, in this order: torch first, so that nothing pulls in a CUDA build."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    variables: Mapping[str, str] = field(default_factory=dict)


ENVIRONMENTS = {
    "llama": Environment(
        "llama",
        (
            ("torch==2.13.0",),
            ("transformers==4.57.1", "sentencepiece", "protobuf"),
            ("--no-binary", "llama-cpp-python", LLAMA),
        ),
        {"CMAKE_ARGS": LLAMA_FLAGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
    ),
    # torchvision is the version for this torch: another would install its own torch.
    "openvino": Environment(
        "openvino",
        (
            ("torch==2.13.0",),
            (
                "torch==2.13.0",
                "torchvision==0.28.0",
                "optimum-intel==2.2.0",
                "transformers==4.57.1",
                "openvino-genai==2026.4.1.0",
            ),
        ),
    ),
}


class PeerEnvironments:
    """Creates environments and model files of the peers on demand."""

    def __init__(self, cache: Path, model: Path) -> None:
        self.cache = cache
        self.model = model
        digest = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()[:8]
        self.models = cache / "models" / f"{model.name}-{digest}"
        self.models.mkdir(parents=True, exist_ok=True)

    def python(self, name: str) -> Path:
        """Return the interpreter of an environment, installing it if needed.

        Raises:
            InstallError: pip could not install it.
        """
        environment = ENVIRONMENTS[name]
        folder = self.cache / name
        python = folder / "bin" / "python"
        stamp = folder / "installed.json"
        wanted = json.dumps([environment.steps, LLAMA_FLAGS if name == "llama" else ""])
        if stamp.is_file() and stamp.read_text() == wanted:
            return python
        self._run([sys.executable, "-m", "venv", "--clear", str(folder)])
        for step in environment.steps:
            pip = [str(python), "-m", "pip", "install", "--quiet", *step]
            self._run(pip, {**environment.variables, **os.environ})
        stamp.write_text(wanted)
        return python

    def gguf(self, kind: str) -> Path:
        """Return the GGUF file for llama.cpp: bf16, Q8_0, Q4_K_M, or mmproj (vision tower).

        Raises:
            InstallError: it could not be converted.
        """
        target = self.models / f"{kind}.gguf"
        if target.is_file():
            return target
        python, partial = str(self.python("llama")), target.with_suffix(".half")
        if kind in ("bf16", "mmproj"):
            converter = self._llama_sources() / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
            args = ["--outtype", "bf16", "--outfile", str(partial)]
            args += ["--mmproj"] if kind == "mmproj" else []
            self._run([python, str(converter), str(self.model), *args])
        else:
            quantize = str(WORKERS / "quantize_llama.py")
            self._run([python, quantize, str(self.gguf("bf16")), str(partial), kind])
        partial.rename(target)
        return target

    def openvino(self, kind: str) -> Path:
        """Return the OpenVINO model: fp16, int8 or int4, with the defaults of optimum-intel.

        Raises:
            InstallError: it could not be exported.
        """
        target = self.models / f"openvino-{kind}"
        if target.is_dir():
            return target
        partial = target.with_suffix(".half")
        shutil.rmtree(partial, ignore_errors=True)
        export = [str(WORKERS / "export_openvino.py"), "export", "openvino"]
        args = ["--model", str(self.model), "--weight-format", kind]
        args += ["--task", "image-text-to-text", str(partial)]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._run([str(self.python("openvino")), *export, *args], variables)
        partial.rename(target)
        return target

    def _llama_sources(self) -> Path:
        name = LLAMA.replace("-", "_").replace("==", "-")
        folder = self.cache / "sources" / name
        if folder.is_dir():
            return folder
        python = str(self.python("llama"))
        args = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder.parent)]
        self._run([python, "-m", "pip", "download", *args, LLAMA])
        with tarfile.open(folder.parent / f"{name}.tar.gz") as archive:
            archive.extractall(folder.parent, filter="data")
        return folder

    def _run(self, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        """Run a command with its output in CACHE/install.log."""
        log = self.cache / "install.log"
        print("+", *command, file=sys.stderr)
        with log.open("ab") as out:
            done = subprocess.run(command, env=variables, stdout=out, stderr=out)
        if done.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise InstallError(f"{Path(command[0]).name} {command[1]}: {' '.join(last)[:200]}")
