"""Rows of the public benchmarks, in the formats in which they are published, as items to score.

    a parquet, TSV or JSON file --readers--> rows --image_sets, choice_sets, video_sets (lmms-lab's
    columns) or tsv_sets (VLMEvalKit's)--> PublicItem --a model--> answers --scoring--> scores

The user brings the data: nothing is downloaded. Prompts are those of the harness whose format is
read. `SETS` has every set by name. (docs/guides/paper-tables.md has the protocol.)
"""

from qwen2vl.eval.public_sets.items import PublicItem
from qwen2vl.eval.public_sets.readers import read_json_rows, read_parquet_rows, read_tsv_rows
from qwen2vl.eval.public_sets.scoring import score_item, score_set
from qwen2vl.eval.public_sets.sets import SETS, PublicSet

__all__ = [
    "SETS",
    "PublicItem",
    "PublicSet",
    "read_json_rows",
    "read_parquet_rows",
    "read_tsv_rows",
    "score_item",
    "score_set",
]
