"""The package of one platform brings kernels that load where there is no compiler."""

from __future__ import annotations

import ctypes
import zipfile
from pathlib import Path

import pytest

from dev.binary_package import build_package
from qwen2vl.linear.cpu import build as build_module
from tests.requirements import needs_kernels


@pytest.mark.slow
@needs_kernels
def test_the_package_has_compiled_kernels(tmp_path: Path) -> None:
    build_package("linux_x86_64", tmp_path)
    (package,) = tmp_path.glob("*-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(package) as archive:
        library = archive.extract("qwen2vl/linear/cpu/kernels/kernels.so", tmp_path)
    assert ctypes.CDLL(library).qwen2vl_detect_isa() >= 0
    assert not build_module.PREBUILT.exists(), "a compiled file in the source would become stale"
