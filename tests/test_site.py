"""The documentation site: pages in its navigation, what is generated, and what pages load.

`make docs` builds the site itself, strictly; code blocks are tested in tests/flows/test_docs.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

import pytest
import yaml
from markdown import markdown

import qwen2vl
from dev.external_resources import external_resources
from dev.external_resources import main as check_site
from dev.reference import ReferenceExtension, expand, field_rows
from qwen2vl.cli.main import COMMANDS
from tests.flows.test_docs import options_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SETTINGS: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def navigation(entry: Any) -> Iterator[str]:
    """Yield the pages of an entry of the navigation: a page, a titled one, or a section."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from navigation(part)


def test_the_navigation_has_every_page_once() -> None:
    pages = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(navigation(SETTINGS["nav"])) == pages


def test_decisions_are_numbered_and_listed() -> None:
    names = sorted(path.name for path in (DOCS / "decisions").glob("0*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    index = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{4}) \| \[(.+)\]\((.+)\) \|$", index, re.M)
    assert [name for _, _, name in rows] == names
    for number, title, name in rows:
        text = (DOCS / "decisions" / name).read_text(encoding="utf-8")
        assert text.startswith(f"# {number}: {title}\n\n**Question.** ")
        assert "**Decision.** " in text and "**Consequences.** " in text


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: qwen2vl\.(\w+)$", page, re.M))
    assert set(qwen2vl.__all__) <= shown


# Generated pages --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """An example."""

    needed: int  # without a default
    # Above it,
    # in two lines.
    choice: Literal["a", "b"] | None = None
    size: int = 2 * 1024  # with `code`
    many: dict[str, int] = field(default_factory=dict)


def test_fields_are_read_from_the_source() -> None:
    rows = [(row.name, row.type, row.default, row.comment) for row in field_rows(Settings)]
    assert rows == [
        ("needed", "int", "required", "without a default"),
        ("choice", '"a" | "b" | None', "None", "Above it, in two lines."),
        ("size", "int", "2 * 1024", "with `code`"),
        ("many", "dict[str, int]", "{}", ""),
    ]


def documented_classes() -> list[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    return re.findall(r"^<!-- generated: fields (\S+)", text, re.M)


@pytest.mark.parametrize("name", documented_classes())
def test_every_field_has_a_comment(name: str) -> None:
    assert not [row.name for row in field_rows(resolve_name(name)) if not row.comment]


def test_every_class_of_a_training_config_is_documented() -> None:
    from qwen2vl.data import config as data_config
    from qwen2vl.train import config as train_config

    classes = {
        f"{module.__name__}.{name}"
        for module in (train_config, data_config)
        for name in module.__all__
        if name.endswith("Config") or name == "Stage"
    }
    assert classes <= set(documented_classes())


def test_every_command_and_option_is_listed() -> None:
    text = "\n".join(expand(["<!-- generated: commands -->"]))
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert list(sections) == list(COMMANDS)
    for name, section in sections.items():
        assert not [
            option
            for option in options_of(name)
            if option.startswith("-") and f"`{option}`" not in section
        ]


def test_examples_of_the_help_have_these_options() -> None:
    text = "\n".join(expand(["<!-- generated: commands -->"]))
    examples = re.findall(r"^qwen2vl ([a-z-]+) (?!\[OPTIONS)(.*)$", text, re.M)
    assert len(examples) > 5
    for name, arguments in examples:
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments)) <= options_of(name)


def test_results_have_one_section_each() -> None:
    cited = set()
    for path in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        cited |= set(re.findall(r"\[(r\d+)\]", path.read_text(encoding="utf-8")))
    sections = {line[3:] for line in expand(["<!-- generated: results -->"]) if line[:4] == "## r"}
    assert cited <= sections


def test_a_checkout_shows_where_the_results_are() -> None:
    page = DOCS / "reference" / "results.md"
    text = page.read_text(encoding="utf-8")
    (target,) = re.findall(r"`results\.md` of the folder \[benchmarks\]\((.*)\)", text)
    assert (page.parent / target).resolve() == ROOT / "benchmarks"
    assert target not in "\n".join(expand(text.splitlines())), "the site has no such page"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](benchmarks/results.md)" in readme


def test_tables_and_marks_become_html() -> None:
    page = "<!-- not tested: needs a GPU -->\n```sh\nx [r1]\n```\n\n2.1 % [r1]\n\n"
    page += "<!-- generated: fields qwen2vl.train.config.MeshConfig mesh. -->\n"
    html = markdown(page, extensions=[ReferenceExtension(), "tables", "fenced_code"])
    assert "needs a GPU; not run by the tests" in html
    assert "x [r1]" in html, "code is shown as it is"
    assert "<td><code>mesh.dp_replicate</code></td>" in html
    names = "| a | b |\n|---|---|\n| `qwen2vl.engine.engine_core.EngineCore` | `x.y` |\n"
    html = markdown(names, extensions=[ReferenceExtension(), "tables"])
    broken = "qwen2vl.<wbr />engine.<wbr />engine_core.<wbr />EngineCore"
    assert f"<code>{broken}</code>" in html and "<code>x.y</code>" in html
    assert expand(["2.1 % [r1]"]) == [r"2.1 % [\[r1\]][r1]"]


# What pages load --------------------------------------------------------------------------------


def test_the_theme_loads_no_fonts() -> None:
    assert SETTINGS["theme"]["font"] is False


@pytest.mark.parametrize(
    "loaded",
    [
        '<script src="https://example.com/a.js"></script>',
        '<script src="//example.com/a.js"></script>',
        '<link rel="stylesheet" href="https://example.com/a.css">',
        '<link rel="preconnect" href="https://example.com">',
        '<link rel="icon" href="http://example.com/a.png">',
        '<img alt="" src="https://example.com/a.png">',
        '<img alt="" srcset="a.png 1x, https://example.com/b.png 2x">',
        '<iframe src="https://example.com"></iframe>',
        "<style>@import 'https://example.com/a.css';</style>",
        '<p style="background: url(https://example.com/a.png)">x</p>',
    ],
)
def test_what_is_loaded_from_other_hosts_is_found(
    loaded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text(f"<html>{loaded}</html>", encoding="utf-8")
    assert [path.name for path, _ in external_resources(tmp_path)] == ["index.html"]
    assert check_site(str(tmp_path)) == 1
    assert "example.com" in capsys.readouterr().out


def test_links_and_local_files_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<a href="https://example.com">x</a><link rel="canonical" href="https://example.com">'
        '<img alt="" src="a.png"><script src="../a.js"></script><svg xmlns="http://x.org"></svg>',
        encoding="utf-8",
    )
    assert not list(external_resources(tmp_path))
    assert check_site(str(tmp_path)) == 0


def test_fonts_of_style_sheets_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("@font-face { src: url('https://x.org/a.woff2') }", "utf-8")
    assert [address for _, address in external_resources(tmp_path)] == ["https://x.org/a.woff2"]


def test_an_empty_site_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_site(str(tmp_path)) == 1
    assert "make docs" in capsys.readouterr().out
