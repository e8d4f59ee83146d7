"""Compile errors of llguidance in one sentence, in the words of the grammar that was given.

llguidance quotes the source over several lines, compiles a regex as a rule of a Lark grammar, and
names options and internal forms of its own. `explain_error` finds the position and the reason.
"""

from __future__ import annotations

import json
import re

__all__ = ["explain_error", "one_line"]

MAX_REASON_CHARS = 200
MAX_RULE_CHARS = 80

_REGEX_ERROR = re.compile(r"regex parse error:\n {4}.*\n {4}( *)\^[\^ ]*\nerror: ([^\n]+)")
_LARK_POSITION = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)", re.DOTALL)
_EBNF_RULE = re.compile(
    r"^[ \t]*<?([A-Za-z_][\w-]*)>?[ \t]*::=[ \t]*(.*(?:\n[ \t]*\|.*)*)", re.MULTILINE
)
_EBNF_TOKEN = re.compile(
    r"""(?P<text>"(?:[^"\\\n]|\\.)*"|'[^'\n]*')|(?P<chars>\[(?:[^]\\]|\\.)+\])|<[A-Za-z_][\w-]*>"""
    r"""|[A-Za-z_][\w-]*"""
)
_ANCHOR = re.compile(r"lookarounds not supported yet; (\w+)")
_ANCHORS = {"Start": "^", "End": "$", "WordUnicode": r"\b", "WordUnicodeNegate": r"\B"}

# What llguidance reports, as a pattern of its text -> what is wrong with the grammar. The first
# match counts; \1 and \2 are groups of the pattern.
_REASONS = (
    (r"NoExtension.*", "no text at all would be allowed; loosen it"),
    (
        r"Unsatisfiable schema: Regex is empty.*",
        "no string fits pattern, format, length and const or enum together; loosen one of them",
    ),
    (r"Unsatisfiable schema: (.*)", r"no value is valid: \1; loosen one of them"),
    (
        r"patternProperty regexes /(.*)/ and /(.*)/ are not disjoint.*",
        r"patternProperties '\1' and '\2' may match the same name; write them as one pattern",
    ),
    (
        r"min/maxProperties only supported.*",
        "minProperties and maxProperties are not supported together with optional properties; "
        "require them, or remove minProperties and maxProperties",
    ),
    (
        r"circular references with sibling keys are not supported: [^#]*(\S*)",
        r"the recursive $ref '\1' has other keywords beside it, which is not supported; move them "
        "into the definition",
    ),
    (
        r"unknown special token: (\S+?);.*",
        r"\1 is not a special token of this model; quote it to allow it as text",
    ),
    (r"unknown name: (.*)", r"\1 is not defined; add a rule of that name"),
    (r"no start rule found", "no rule is named start; rename the rule of the whole output"),
    (r"(lexer error).*", "not a token of Lark's syntax; close every quote and bracket"),
    (r"Expected token ('.*?'), found ('.*?').*", r"expected \1, found \2"),
)


def explain_error(kind: str, text: str, source: str) -> str:
    """Return why a grammar does not compile, in one line of at most 200 characters.

    Args:
        kind: "json_schema", "regex" or "lark".
        text: the message of llguidance.
        source: the text of the grammar.
    """
    reason = _regex_reason(text, source if kind == "regex" else None)
    position = _LARK_POSITION.fullmatch(text)
    if kind == "lark" and (rule := _EBNF_RULE.search(source)):
        return _ebnf_reason(rule)
    if reason is None:
        reason = _known_reason(position[3] if position else text)
    if position is not None and kind == "lark":
        reason = f"line {position[1]}, column {position[2]}: {reason}"
    return one_line(reason)


def _ebnf_reason(rule: re.Match[str]) -> str:
    name = "start" if rule[1] == "root" else _lark_name(rule[1])
    body = _EBNF_TOKEN.sub(_lark_token, " ".join(rule[2].split()))
    if len(body) > MAX_RULE_CHARS:
        body = f"{body[:MAX_RULE_CHARS]}..."
    return (
        f"the grammar is read in Lark syntax, and EBNF with ::= is not; write {name}: {body} and "
        "the other rules alike"
    )


def _lark_token(token: re.Match[str]) -> str:
    """Return a token of EBNF in Lark's syntax: "text", /[chars]/ or a name of a rule."""
    if token["chars"]:
        return f"/{token[0]}/"
    if token["text"]:
        return token[0] if token[0][0] == '"' else json.dumps(token[0][1:-1], ensure_ascii=False)
    return _lark_name(token[0].strip("<>"))


def _lark_name(name: str) -> str:
    return name.replace("-", "_").lower()


def one_line(text: str) -> str:
    """Join the lines of a message, and shorten it to 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON_CHARS else f"{line[: MAX_REASON_CHARS - 3]}..."


def _regex_reason(text: str, pattern: str | None) -> str | None:
    """Return the reason of a regex error, with its position in `pattern`; None for others."""
    if anchor := _ANCHOR.search(text):
        return (
            f"{_ANCHORS.get(anchor[1], 'an anchor')} is not supported here: word boundaries are "
            "nowhere, ^ and $ only where the text begins or ends; write the pattern without it"
        )
    error = _REGEX_ERROR.search(text)
    if error is None:
        return None
    if pattern is None:
        return f"{error[2]} at character {len(error[1]) + 1} of the regex"
    at = _position_in_source(pattern, len(error[1]))
    return f"{error[2]} at character {at + 1}, {pattern[at : at + 20]!r}"


def _position_in_source(pattern: str, column: int) -> int:
    """Convert a column of the quoted pattern, in which control characters and / take two."""
    width = 0
    for at, char in enumerate(pattern):
        width += 1 + (char in "\n\r\t/" and not (char == "/" and pattern[at - 1 : at] == "\\"))
        if width > column:
            return at
    return len(pattern)


def _known_reason(text: str) -> str:
    line = " ".join(text.split("\n   1 | ")[0].split())
    for pattern, reason in _REASONS:
        if match := re.fullmatch(pattern, line):
            return match.expand(reason)
    return f"{line}; change that part of it"
