"""A grammar at work: which tokens may come next, while one answer is being written.

The grammar is compiled against the bytes of every token by llguidance, an extra:
`pip install 'qwen2vl[grammar]'`. What compiling and each step may cost is bounded by its limits.
Special tokens never match text: an answer in JSON cannot hold <|im_end|> but as characters, and a
box token only comes where a grammar names it. It must not know the model or sampling; sampler.py
asks for the mask and reports what was chosen. Next room: sampler.py.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.errors import InputError
from qwen2vl.processor.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["GrammarCompiler", "Matcher"]

MAX_FORCED_BYTES = 16_384  # what a grammar may dictate before its first choice
_KEPT = 32  # compiled grammars remembered

# Fuel is spent at about 50,000 a millisecond when compiling and 14,000 in a step; a state of the
# lexer takes about 2 kB. A tenth of llguidance's own: a grammar comes with a stranger's request.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Turn grammars into matchers for one tokenizer; may be asked from any thread.

    The table of its tokens is built when the first grammar comes, and takes two seconds for the
    151,657 official ones. Grammars seen lately stay compiled.
    """

    def __init__(self, tokenizer: Tokenizer, *, end_ids: Collection[int], vocab_size: int) -> None:
        """Prepare for answers that end with any of `end_ids`, and for logits of `vocab_size`."""
        self._tokenizer = tokenizer
        self._end_ids = sorted(end_ids)
        self._vocab_size = vocab_size
        self._table: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, grammar: Grammar) -> Matcher:
        """Begin an answer.

        Raises:
            InputError: the grammar is malformed, too costly, or allows nothing; or llguidance is
                not installed.
        """
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return Matcher(self._compiled[grammar].deep_copy(), self._vocab_size)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        library = _llguidance()
        if self._table is None:
            words = library.TokenizerWrapper(_Words(self._tokenizer, self._end_ids[0]))
            self._table = library.LLTokenizer(words, eos_token=self._end_ids)
        try:
            source = _source(library, grammar)
        except ValueError as error:
            raise _refusal(grammar, str(error)) from None
        limits = library.LLParserLimits(**_LIMITS)
        compiled = library.LLMatcher(self._table, source, log_level=0, limits=limits)
        forced = compiled.compute_ff_bytes()
        compiled.compute_bitmask()  # only now does it turn out that nothing is allowed
        if compiled.is_error():
            raise _refusal(grammar, compiled.get_error())
        if len(forced) > MAX_FORCED_BYTES:
            raise _refusal(
                grammar,
                f"it dictates more than {MAX_FORCED_BYTES:,} bytes before anything can be chosen; "
                "a rule that contains itself needs a way to end",
            )
        return compiled


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def finished(self) -> bool:
        """Tell whether the answer is whole, so that nothing but an end token may follow."""
        return self._matcher.is_stopped()

    def mask(self) -> Tensor:
        """Say which tokens may come next: (V,) bool on the CPU, never all False.

        Raises:
            InputError: this step costs more than the limits allow.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask_V = np.zeros(self._vocab_size, dtype=np.bool_)  # the last rows may be no tokens
        bits = np.unpackbits(packed, bitorder="little")[: self._vocab_size]
        mask_V[: len(bits)] = bits
        return torch.from_numpy(mask_V)

    def accept(self, token: int) -> None:
        """Take the token that was chosen, which the mask allowed.

        Raises:
            InputError: this step costs more than the limits allow.
        """
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        """List the tokens that the grammar dictates next, as the tokenizer would cut them.

        Guesses, not orders: the mask may also allow another cut of the same text.
        """
        return self._matcher.compute_ff_tokens()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(
                f"the answer's grammar cannot be followed further: "
                f"{_one_line(self._matcher.get_error())}; simplify it"
            )


class _Words:
    """The tokenizer as llguidance wants it: the bytes of every token, and text -> ids."""

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_id
        self.bos_token_id = None
        self.tokens = [tokenizer.bytes_of(token) for token in range(len(tokenizer))]
        self.special_token_ids = list(tokenizer.special_ids.values())

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # llguidance tries bytes first, and then keeps to text
            raise TypeError("text only")
        return self._tokenizer.encode_text(text, special="none")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise InputError(
            "a grammar for the answer needs llguidance, which cannot be imported; "
            "pip install 'qwen2vl[grammar]'"
        ) from None
    return llguidance


def _source(library: Any, grammar: Grammar) -> str:
    """Write a grammar as llguidance reads it."""
    if grammar.kind == "json_schema":
        return library.LLMatcher.grammar_from_json_schema(grammar.text, overrides=_ONE_LINE)
    if grammar.kind == "regex":
        return library.LLMatcher.grammar_from_regex(grammar.text)
    return library.LLMatcher.grammar_from_lark(grammar.text)


def _refusal(grammar: Grammar, reason: str) -> InputError:
    name = {"json_schema": "JSON schema", "regex": "regex", "lark": "grammar"}[grammar.kind]
    return InputError(f"{name}: {_one_line(reason)}")


def _one_line(text: str) -> str:
    """Shorten a message of llguidance, which quotes the grammar over several lines."""
    if text.startswith("NoExtension"):
        return "no text at all would be allowed"
    words = " ".join(text.split())
    return words if len(words) <= 200 else f"{words[:197]}..."
