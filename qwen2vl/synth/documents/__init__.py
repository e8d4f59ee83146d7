"""Documents as pictures with facts to ask for: receipts, tables, charts, displays and screens.

    sample = sample_receipt(rng, mixture)       a DocumentSample, or None if it does not fit
    sample.picture                              a Composite
    sample.facts                                tasks of the grammar with fields and answers

`layout.py` has what they share; `vocabulary.py` reads words.json. The task family `documents`
words the facts as questions.
"""

from __future__ import annotations

from qwen2vl.synth.documents.charts import sample_chart
from qwen2vl.synth.documents.displays import sample_display
from qwen2vl.synth.documents.layout import DocumentSample, Fact
from qwen2vl.synth.documents.receipts import demo_receipt, sample_receipt
from qwen2vl.synth.documents.screens import sample_screen
from qwen2vl.synth.documents.tables import sample_table

__all__ = [
    "DocumentSample",
    "Fact",
    "demo_receipt",
    "sample_chart",
    "sample_display",
    "sample_receipt",
    "sample_screen",
    "sample_table",
]
