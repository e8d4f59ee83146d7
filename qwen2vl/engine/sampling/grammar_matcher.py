"""Structured output with llguidance: grammar compiler and token masks of one request.

Grammars are compiled against the bytes of every token by llguidance, an optional dependency:
`pip install 'qwen2vl[grammar]'`. Its limits bound the cost of compilation and of each step. Special
tokens never match text: JSON output cannot contain <|im_end|> except as characters, and box tokens
are allowed only where a grammar names them. The sampler applies the mask and passes back each
sampled token. (xgrammar: GrammarCompiler, GrammarMatcher; vLLM: structured outputs.)
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.engine.sampling.grammar_errors import explain_error, one_line
from qwen2vl.engine.sampling.json_schema import patterns_of
from qwen2vl.engine.sampling.tool_grammar import JSON_OPTIONS
from qwen2vl.errors import InputError
from qwen2vl.processor.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["GrammarCompiler", "GrammarMatcher"]

MAX_JUMP_FORWARD_BYTES = 16_384  # limit of forced text before the first choice
_MAX_COMPILED = 32  # size of the LRU cache of compiled grammars

# Fuel is consumed at about 50,000 per millisecond in compilation and 14,000 in a step; a lexer
# state takes about 2 kB. A tenth of llguidance's defaults: grammars come from untrusted requests.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_NAME_OF = {"json_schema": "JSON schema", "regex": "regex", "lark": "grammar", "tools": "tools"}


class GrammarCompiler:
    """Compiles grammars for one tokenizer, with an LRU cache; thread-safe.

    The token table is built for the first grammar, which takes two seconds for the 151,657 official
    tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, end_ids: Collection[int], vocab_size: int) -> None:
        """Set up for outputs that end with any of `end_ids`, and logits of `vocab_size`."""
        self._tokenizer = tokenizer
        self._end_ids = sorted(end_ids)
        self._vocab_size = vocab_size
        self._ll_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # of the cache: never held for long
        self._compile_lock = threading.Lock()

    def create_matcher(self, grammar: Grammar) -> GrammarMatcher:
        """Compile a grammar, or reuse it from the cache, and return a matcher for a new output.

        Raises:
            InputError: the grammar is malformed, too costly, or allows nothing; or llguidance is
                not installed.
        """
        matcher = self._copy_compiled(grammar)
        if matcher is not None:  # without waiting for another grammar that is compiled
            return matcher
        with self._compile_lock:
            if (matcher := self._copy_compiled(grammar)) is not None:
                return matcher
            compiled = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = compiled
                if len(self._compiled) > _MAX_COMPILED:
                    self._compiled.popitem(last=False)
                return GrammarMatcher(compiled.deep_copy(), self._vocab_size)

    def _copy_compiled(self, grammar: Grammar) -> GrammarMatcher | None:
        """Return a matcher of a grammar in the cache; None if it is not there."""
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is None:
                return None
            self._compiled.move_to_end(grammar)
            return GrammarMatcher(compiled.deep_copy(), self._vocab_size)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        library = _import_llguidance()
        if self._ll_tokenizer is None:
            wrapper = library.TokenizerWrapper(
                _LLTokenizerAdapter(self._tokenizer, self._end_ids[0])
            )
            self._ll_tokenizer = library.LLTokenizer(wrapper, eos_token=self._end_ids)
        compiled, error = self._try_compile(library, grammar)
        if error is not None:
            where, reason = self._locate_error(library, grammar, error)
            raise InputError(f"{_NAME_OF[grammar.kind]}: {where}{reason}")
        assert compiled is not None
        return compiled

    def _try_compile(self, library: Any, grammar: Grammar) -> tuple[LLMatcher | None, str | None]:
        """Return the compiled grammar, or else why it does not compile."""
        try:
            source = _llguidance_grammar(library, grammar)
        except ValueError as error:
            return None, explain_error(grammar.kind, str(error), grammar.text)
        limits = library.LLParserLimits(**_LIMITS)
        compiled = library.LLMatcher(self._ll_tokenizer, source, log_level=0, limits=limits)
        forced_bytes = compiled.compute_ff_bytes()
        compiled.compute_bitmask()  # sets the error if the grammar allows no text at all
        if compiled.is_error():
            return None, explain_error(grammar.kind, compiled.get_error(), grammar.text)
        if len(forced_bytes) > MAX_JUMP_FORWARD_BYTES:
            return None, (
                f"it forces more than {MAX_JUMP_FORWARD_BYTES:,} bytes before anything can be "
                "chosen; a rule that contains itself needs a way to end"
            )
        return compiled, None

    def _locate_error(self, library: Any, grammar: Grammar, reason: str) -> tuple[str, str]:
        """Return the place of an error in a schema and its reason, if a pattern is the cause."""
        if grammar.kind == "json_schema":
            for where, pattern in patterns_of(json.loads(grammar.text)):
                alone = Grammar("json_schema", json.dumps({"type": "string", "pattern": pattern}))
                _, error = self._try_compile(library, alone)
                if error is not None:
                    return f"{where}: ", error
        return "", reason


class GrammarMatcher:
    """State of one output in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete, so that only an end token may follow."""
        return self._matcher.is_stopped()

    def token_mask(self) -> Tensor:
        """Return the mask of allowed next tokens: (V,) bool on the CPU, never all False.

        Raises:
            InputError: this step exceeds the cost limits.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._raise_on_error()
        mask_V = np.zeros(self._vocab_size, dtype=np.bool_)  # the vocabulary may be padded
        bits = np.unpackbits(packed, bitorder="little")[: self._vocab_size]
        mask_V[: len(bits)] = bits
        return torch.from_numpy(mask_V)

    def accept_token(self, token: int) -> None:
        """Advance by a sampled token, which the mask must have allowed.

        Raises:
            InputError: this step exceeds the cost limits.
        """
        self._matcher.consume_token(token)
        self._raise_on_error()

    def jump_forward_tokens(self) -> list[int]:
        """Return the jump-forward tokens: the text that the grammar forces next, tokenized.

        They are draft tokens: the mask may also allow another tokenization of the same text.
        """
        return self._matcher.compute_ff_tokens()

    def _raise_on_error(self) -> None:
        if self._matcher.is_error():
            raise InputError(
                f"the answer's grammar cannot be followed further: "
                f"{one_line(self._matcher.get_error())}; simplify it"
            )


class _LLTokenizerAdapter:
    """Adapter to llguidance's tokenizer interface: the bytes of every token, and text to ids."""

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_id
        self.bos_token_id = None
        self.tokens = [tokenizer.id_to_bytes(token) for token in range(len(tokenizer))]
        self.special_token_ids = list(tokenizer.special_ids.values())

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # llguidance tries bytes first, then uses text only
            raise TypeError("text only")
        return self._tokenizer.encode_text(text, allowed_special="none")


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise InputError(
            "a grammar for the answer needs llguidance, which cannot be imported; "
            "pip install 'qwen2vl[grammar]'"
        ) from None
    return llguidance


def _llguidance_grammar(library: Any, grammar: Grammar) -> str:
    """Convert a grammar to llguidance's format."""
    if grammar.kind == "json_schema":
        return library.LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)
    if grammar.kind == "regex":
        return library.LLMatcher.grammar_from_regex(grammar.text)
    return library.LLMatcher.grammar_from_lark(grammar.text)
