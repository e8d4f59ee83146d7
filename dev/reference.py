"""Markdown extension of the documentation site: reference pages are generated from the code.

A line `<!-- generated: KIND ARGUMENTS -->` of a page is replaced, when the site is built, by

    commands                      every command of the CLI with its arguments and options (click)
    fields CLASS [PREFIX]         a table of a dataclass's fields: key, type, default, comment
    results                       the runs of benchmarks/results.md, one section each

A line that ends in `<!-- in a checkout -->` is for readers of the source, and left out. A citation
of a run, `[rN]`, becomes a link to its section, and the mark of a block that no test
runs, `<!-- not tested: needs ... -->` (tests/flows/test_docs.py), becomes visible.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from xml.etree.ElementTree import Element, SubElement

import click
from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from markdown.treeprocessors import Treeprocessor
from markdown.util import AtomicString

__all__ = ["FieldRow", "ReferenceExtension", "expand", "field_rows", "makeExtension"]

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^<!-- generated: (\w+)((?: \S+)*) -->$")
RESULT = re.compile(r"^- \*\*(r\d+)\*\* `(\{.*\})`$", re.MULTILINE)
CHECKOUT_ONLY = "<!-- in a checkout -->"
MIN_BROKEN_NAME = 24  # characters; shorter names stay in one line
CITATION = re.compile(r"\[(r\d+)\]")
UNTESTED = re.compile(r"^<!-- not tested: (needs [\w ]+) -->$")


# Dataclasses --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FieldRow:
    """One field of a dataclass as the site shows it; `comment` is empty if the source has none."""

    name: str
    type: str
    default: str
    comment: str


def field_rows(cls: type) -> list[FieldRow]:
    """List the fields of a dataclass, in order, with the comments of its source."""
    source = textwrap.dedent(inspect.getsource(cls))
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    statements = {
        node.target.id: node
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    comments, hints = _comments(source), get_type_hints(cls)
    return [
        FieldRow(
            name=field.name,
            type=format_type(hints[field.name]),
            default=_format_default(field, statements[field.name]),
            comment=_comment_of(statements[field.name], comments) or _summary(hints[field.name]),
        )
        for field in dataclasses.fields(cls)
    ]


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Return line number -> comment, and whether the line holds nothing else."""
    return {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }


def _comment_of(node: ast.AnnAssign, comments: Mapping[int, tuple[str, bool]]) -> str:
    """Return the comment in the lines of a statement, else the comment lines directly above it."""
    last = node.end_lineno or node.lineno
    own = [comments[line][0] for line in range(node.lineno, last + 1) if line in comments]
    above: list[str] = []
    line = node.lineno - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    return " ".join(own or above)


def _summary(hint: Any) -> str:
    """Return the first sentence of the docstring of a nested dataclass."""
    for cls in (hint, *get_args(hint)):
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            return (inspect.getdoc(cls) or "").partition("\n")[0]
    return ""


def format_type(hint: Any) -> str:
    """Write a type hint as a reader would: choices of a Literal, unions with |, bare names."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(map(format_type, arguments))
    if hint is type(None):
        return "None"
    if hint is Ellipsis:
        return "..."
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(format_type, arguments))}]"
    return getattr(hint, "__name__", str(hint))


def _format_default(field: dataclasses.Field[Any], node: ast.AnnAssign) -> str:
    if node.value is None:
        return "required"
    if isinstance(node.value, ast.BinOp):  # 512 * MIB is easier to read than its value
        return ast.unparse(node.value)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    if dataclasses.is_dataclass(field.default):
        return "its defaults"
    return json.dumps(field.default) if isinstance(field.default, str) else repr(field.default)


def _fields(name: str, prefix: str = "") -> Iterator[str]:
    """Write the table of a dataclass, named by its dotted path."""
    cls = resolve_name(name)
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for row in field_rows(cls):
        default = row.default if row.default in ("required", "its defaults") else _code(row.default)
        cells = (_code(prefix + row.name), _code(row.type), default, _text(row.comment))
        yield f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _text(text: str) -> str:
    """Escape a plain text for a cell of a table; code in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        x if x.startswith("`") else re.sub(r"([*_|\\\[])", r"\\\1", x.replace("<", "&lt;"))
        for x in parts
    )


# Commands -----------------------------------------------------------------------------------------


def _commands() -> Iterator[str]:
    """Write a section for each command of the CLI."""
    from qwen2vl.cli.main import COMMANDS, main

    assert isinstance(main, click.Group)
    # With the settings of a real call: click keeps the help option of a command's first context.
    parent = click.Context(main, info_name="qwen2vl", **main.context_settings)
    for name in COMMANDS:
        command = main.get_command(parent, name)
        assert command is not None
        yield from _command(command, click.Context(command, parent, info_name=name))


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    yield from (f"## {context.info_name}", "")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from ("```text", usage, "```", "")
    yield from _help(inspect.cleandoc(command.help or ""))
    yield from ("| option | value | default | meaning |", "|---|---|---|---|")
    for option in command.get_params(context):
        if isinstance(option, click.Option):
            names = ", ".join(_code(name) for name in [*option.opts, *option.secondary_opts])
            cells = (names, _value(option), _default(option), _text(option.help or ""))
            yield f"| {' | '.join(cells)} |"
    yield ""


def _help(text: str) -> Iterator[str]:
    """Write click's help text: paragraphs, and blocks marked by a backspace as commands."""
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b"):
            yield from ("```sh", *paragraph.splitlines()[1:], "```", "")
        else:
            yield from (_text(" ".join(paragraph.split())), "")


def _value(option: click.Option) -> str:
    """Write what an option takes: its choices, its metavar or its type; nothing for a flag."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return _code(" | ".join(map(str, option.type.choices)))
    return _code(option.metavar or option.type.name.partition(" ")[0])


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    return _code(str(option.default)) if option.show_default else ""


# Results ------------------------------------------------------------------------------------------


def _results() -> Iterator[str]:
    """Write a section for each run of benchmarks/results.md."""
    for name, line in RESULT.findall((ROOT / "benchmarks" / "results.md").read_text("utf-8")):
        run = json.loads(line)
        yield from (
            f"## {name}",
            "",
            f"{run['date']}, commit {run['commit']}, {run['machine']}",
            "",
        )
        yield from ("```text", run["command"], "```", "", "```json", "{")
        numbers = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in run["numbers"].items()]
        yield from (*",\n".join(numbers).splitlines(), "}", "```", "")


# The extension ------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., Iterator[str]]] = {
    "commands": _commands,
    "fields": _fields,
    "results": _results,
}


def expand(lines: list[str]) -> list[str]:
    """Replace the directives of a page by what they stand for, and citations by links."""
    expanded: list[str] = []
    is_code = False
    for line in lines:
        is_code ^= line.lstrip().startswith("```")
        if is_code:
            expanded.append(line)
        elif line.endswith(CHECKOUT_ONLY):
            continue
        elif directive := DIRECTIVE.match(line):
            expanded += ["", *KINDS[directive[1]](*directive[2].split()), ""]
        elif mark := UNTESTED.match(line):
            expanded += [f"<small>{mark[1]}; not run by the tests</small>", ""]
        else:
            expanded.append(CITATION.sub(r"[\\[\1\\]][\1]", line))
    return expanded


class _Expander(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return expand(lines)


class _NameBreaker(Treeprocessor):
    """Allow line breaks after the dots of long names in tables: `package.module.Class`."""

    def run(self, root: Element) -> None:
        for code in (code for cell in root.iter("td") for code in cell.iter("code")):
            head, *tail = re.split(r"(?<=[./])(?=\w)", code.text or "")
            if len(code.text or "") < MIN_BROKEN_NAME or " " in (code.text or ""):
                continue
            code.text = AtomicString(head)
            for part in tail:
                SubElement(code, "wbr").tail = AtomicString(part)


class ReferenceExtension(Extension):
    """Python-Markdown extension that expands the directives of this module."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802, the name is Python-Markdown's
        """Expand before fenced code and HTML comments are read; break names after code spans."""
        md.preprocessors.register(_Expander(md), "reference", 200)
        md.treeprocessors.register(_NameBreaker(md), "reference_names", 5)


def makeExtension(**config: Any) -> ReferenceExtension:  # noqa: N802, the name is Python-Markdown's
    """Return the extension; Python-Markdown calls this by name."""
    return ReferenceExtension(**config)
