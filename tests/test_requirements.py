"""QWEN2VL_REQUIRE: absent resources skip tests, unless they are required."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import requirements
from tests.requirements import check_requirements, required_resources, skip_or_fail


def item_needing(mark: pytest.MarkDecorator) -> Any:
    return SimpleNamespace(iter_markers=lambda name: [mark.mark] if name == mark.name else [])


def test_names_are_read_and_nothing_is_required_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN2VL_REQUIRE", raising=False)
    monkeypatch.setenv("CI", "true")
    assert required_resources() == set()
    monkeypatch.setenv("QWEN2VL_REQUIRE", "fonts, tokenizer,")
    assert required_resources() == {"fonts", "tokenizer"}


def test_an_unknown_resource_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_REQUIRE", "fonts,tesserakt")
    with pytest.raises(pytest.UsageError, match="unknown tesserakt; known are fonts, tesseract"):
        required_resources()


def test_an_absent_resource_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_REQUIRE", "tesseract")
    with pytest.raises(pytest.skip.Exception, match="no fonts"):
        skip_or_fail("fonts", "no fonts")
    with pytest.raises(pytest.fail.Exception, match=r"no OCR \(QWEN2VL_REQUIRE names tesseract\)"):
        skip_or_fail("tesseract", "no OCR")


@pytest.mark.parametrize(
    ("mark", "resource", "package"),
    [
        (requirements.needs_tesseract, "tesseract", "tesseract-ocr"),
        (requirements.needs_imagemagick, "imagemagick", "imagemagick"),
    ],
)
def test_marked_tests_are_checked_when_they_run(
    monkeypatch: pytest.MonkeyPatch, mark: pytest.MarkDecorator, resource: str, package: str
) -> None:
    item = item_needing(mark)
    monkeypatch.setenv("QWEN2VL_REQUIRE", "")
    monkeypatch.setattr(requirements.shutil, "which", lambda name: f"/bin/{name}")
    check_requirements(item)
    monkeypatch.setattr(requirements.shutil, "which", lambda _: None)
    with pytest.raises(pytest.skip.Exception, match=f"apt-get install {package}"):
        check_requirements(item)
    monkeypatch.setenv("QWEN2VL_REQUIRE", resource)
    with pytest.raises(pytest.fail.Exception, match=f"apt-get install {package}"):
        check_requirements(item)
