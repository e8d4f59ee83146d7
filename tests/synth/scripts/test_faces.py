"""Typefaces by script: installed, covering, and none of an evaluation."""

from __future__ import annotations

from random import Random

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.eval.suites.frozen_suite import open_frozen_suite
from qwen2vl.synth import fonts
from qwen2vl.synth.fonts import JUDGE_FAMILIES, VALIDATION_FAMILIES, FontError
from qwen2vl.synth.scripts import faces
from qwen2vl.synth.scripts.alphabets import SCRIPTS
from qwen2vl.synth.scripts.faces import (
    Face,
    check_faces,
    covers,
    faces_of,
    packages_of,
    sample_face,
    unclear_in,
)
from qwen2vl.synth.scripts.tables import MORE_FAMILIES
from tests.requirements import needs_line_fonts

CORE = {  # of which a face may lack none
    "latin": SCRIPTS["latin"].letters + "0123456789.,!?-:'",
    "latin_accents": "äöüéèçñ",
    "digits": "0123456789.,:-/%",
    "greek": SCRIPTS["greek"].letters,
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяАБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЫЬЭЮЯїєђљћџ",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשת",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهويةىئءؤأإآ",
    "hangul": "가각한국어말글",
    "japanese": "あいうアイウ日本語",
    "han": "一的是不了人我在有",
    "devanagari": "कखगघचजतदनपबमयरलवशसह",
    "bengali": "কখগঘচজতদনপবমযরলশসহ",
    "tamil": "கஙசஞடணதநபமயரலவழளறன",
    "thai": "กขคงจฉชซญดตถทนบปผพฟมยรลวสหอ",
    "khmer": "កខគឃងចឆជឈញដតថទធនបផពភមយរលវ",
    "myanmar": "ကခဂငစဆဇညတထဒနပဖဗဘမယရလဝသဟအ",
    "ethiopic": "ሀለሐመሠረሰሸቀበተቸነኘአከወ",
}


def held_out_packages() -> set[str]:
    header = open_frozen_suite("lines").header
    packages = {font.partition("/")[0] for font in header.held_out["fonts"]}
    tables = (*JUDGE_FAMILIES.values(), *VALIDATION_FAMILIES.values())
    return packages | {package for package, _ in tables}


def test_no_package_of_an_evaluation_is_used() -> None:
    used = {family.package for family in MORE_FAMILIES.values()}
    assert not used & held_out_packages()
    relatives = ("gentium", "didot", "libertine", "texgyre", "hack", "carlito")
    assert not any(name in package for package in used for name in relatives)


def test_no_file_is_in_two_families() -> None:
    files = [file for family in MORE_FAMILIES.values() for file in family.files]
    assert len(files) == len(set(files))
    assert all(set(family.scripts) <= set(SCRIPTS) for family in MORE_FAMILIES.values())


def test_every_script_has_typefaces() -> None:
    for name in SCRIPTS:
        assert packages_of(name)
    assert "fonts-dejavu-core" in packages_of("greek")
    assert packages_of("thai") == ("fonts-noto-core",)


@needs_line_fonts
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_face_covers_its_script(name: str) -> None:
    for family in faces_of(name):
        for face in family:
            clear = "".join(char for char in CORE[name] if char not in face.unclear)
            text = clear.upper() if face.has_capitals_only else clear
            assert covers(face, text), face.file


@needs_line_fonts
def test_typefaces_are_equally_frequent() -> None:
    rng = Random(0)
    names = {face.file: index for index, fs in enumerate(faces_of("digits")) for face in fs}
    counts = [0] * len(faces_of("digits"))
    for _ in range(100 * len(counts)):
        counts[names[sample_face(rng, "digits").file]] += 1
    assert len(counts) >= 45
    assert min(counts) > 60 and max(counts) < 150


def test_covers_what_a_face_draws_clearly() -> None:
    face = Face(file="Cabin-Regular.otf", unclear="1")
    assert covers(face, "Hello World 234")
    assert not covers(face, "123")
    assert not covers(face, "Привет")


def test_an_ambiguous_i_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unclear_in(Face(file="Caladea-Regular.ttf", unclear="1")) == "1"
    assert unclear_in(Face(file="Caladea-Regular.ttf", has_capitals_only=True)) == "I"
    assert unclear_in(Face(file="NotoSansCJK-Regular.ttc#2")) == ""
    monkeypatch.setattr(faces, "stems_look_alike", lambda file: True)
    assert unclear_in(Face(file="Caladea-Bold.ttf", unclear="1")) == "1I"


def test_missing_packages_are_named_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_installed", dict)
    with pytest.raises(FontError, match=r"apt-get install .*fonts-cmu .*fonts-vollkorn"):
        check_faces(["digits"])
    with pytest.raises(FontError, match=r"apt-get install fonts-noto-core$"):
        check_faces(["thai"])
    with pytest.raises(ConfigError, match="scripts name runes"):
        check_faces(["runes"])
