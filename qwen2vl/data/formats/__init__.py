"""Data formats: parses one row of a data file into a sample, in any of the supported layouts.

    row --columns--> used, refused, unused columns
        --sharegpt, pairs--> messages --contents: media, objects--> Conversation
        --documents--> Document

Media are not opened and text is not tokenized here (preprocess.py does that). Every column of a row
is used, refused because it changes what the row means, or reported by name as unused.
(docs/guides/data-formats.md has the layouts; ms-swift: AutoPreprocessor; LLaMA-Factory: converter.)
"""

from qwen2vl.data.formats.rows import parse_row
from qwen2vl.data.formats.samples import (
    Conversation,
    Document,
    Sample,
    SampleError,
    TextTokens,
    describe_reasons,
)

__all__ = [
    "Conversation",
    "Document",
    "Sample",
    "SampleError",
    "TextTokens",
    "describe_reasons",
    "parse_row",
]
