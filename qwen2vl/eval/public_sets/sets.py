"""The public sets by name: where they are published, and the function that parses their rows.

Names are those of the tasks of lmms-eval. Nothing is downloaded: the user gives the files. TSV
files of VLMEvalKit are parsed by `tsv_sets.tsv_parser` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen2vl.eval.public_sets import choice_sets, image_sets, video_sets
from qwen2vl.eval.public_sets.items import PublicItem, Row

__all__ = ["SETS", "PublicSet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSet:
    """A published set, or one split of it."""

    repo: str  # data set of the Hugging Face hub
    config: str = "default"  # MVBench: one for each task
    split: str = "test"
    parse: Callable[[Row, Path], list[PublicItem]]  # a row, and the folder of the clips
    max_tokens: int  # of an answer, as in lmms-eval
    is_scored_by_server: bool = False  # the references are not published


LAB = "lmms-lab-encoder"
VIDEO = "lmms-eval"

SETS: Mapping[str, PublicSet] = {
    **{
        f"{name}_{short}": PublicSet(
            repo=f"{LAB}/DocVQA",
            config=config,
            split=split,
            parse=image_sets.parse_docvqa,
            max_tokens=32,
            is_scored_by_server=split == "test",
        )
        for name, config in (("docvqa", "DocVQA"), ("infovqa", "InfographicVQA"))
        for short, split in (("val", "validation"), ("test", "test"))
    },
    "chartqa": PublicSet(repo=f"{LAB}/ChartQA", parse=image_sets.parse_chartqa, max_tokens=16),
    "textvqa_val": PublicSet(
        repo=f"{LAB}/textvqa", split="validation", parse=image_sets.parse_textvqa, max_tokens=1024
    ),
    "ocrbench": PublicSet(repo="echo840/OCRBench", parse=image_sets.parse_ocrbench, max_tokens=128),
    "ai2d": PublicSet(repo=f"{LAB}/ai2d", parse=choice_sets.parse_ai2d, max_tokens=16),
    "mme": PublicSet(repo=f"{LAB}/MME", parse=image_sets.parse_mme, max_tokens=16),
    **{
        f"mmbench_{config}_{split}": PublicSet(
            repo=f"{LAB}/MMBench",
            config=config,
            split=split,
            parse=parse,
            max_tokens=1024,
            is_scored_by_server=split == "test",
        )
        for config, parse in (
            ("en", choice_sets.parse_mmbench),
            ("cn", choice_sets.parse_mmbench_cn),
        )
        for split in ("dev", "test")
    },
    "mmstar": PublicSet(
        repo="Lin-Chen/MMStar", split="val", parse=choice_sets.parse_mmstar, max_tokens=1024
    ),
    "mmmu_val": PublicSet(
        repo=f"{LAB}/MMMU", split="validation", parse=choice_sets.parse_mmmu, max_tokens=128
    ),
    **{
        f"mmt_{split}": PublicSet(
            repo=f"{LAB}/MMT-Benchmark",
            split=split,
            parse=choice_sets.parse_mmt_bench,
            max_tokens=8,
            is_scored_by_server=split == "test",
        )
        for split in ("val", "test")
    },
    "realworldqa": PublicSet(
        repo=f"{LAB}/RealWorldQA", parse=choice_sets.parse_realworldqa, max_tokens=16
    ),
    "hallusion_bench_image": PublicSet(
        repo=f"{LAB}/HallusionBench",
        split="image",
        parse=image_sets.parse_hallusion_bench,
        max_tokens=128,
    ),
    "mtvqa": PublicSet(repo="ByteDance/MTVQA", parse=image_sets.parse_mtvqa, max_tokens=64),
    **{
        f"{name}_{split}": PublicSet(
            repo=f"{LAB}/{repo}", split=split, parse=image_sets.parse_refcoco, max_tokens=64
        )
        for name, repo, splits in (
            ("refcoco", "RefCOCO", ("val", "testA", "testB")),
            ("refcoco_plus", "RefCOCOplus", ("val", "testA", "testB")),
            ("refcocog", "RefCOCOg", ("val", "test")),
        )
        for split in splits
    },
    "mvbench": PublicSet(
        repo="OpenGVLab/MVBench", split="train", parse=video_sets.parse_mvbench, max_tokens=16
    ),
    "perceptiontest_val": PublicSet(
        repo=f"{VIDEO}/PerceptionTest_Val",
        config="mc_question_val",
        split="validation",
        parse=video_sets.parse_perception_test,
        max_tokens=16,
    ),
    "egoschema_subset": PublicSet(
        repo=f"{VIDEO}/egoschema",
        config="Subset",
        parse=video_sets.parse_egoschema,
        max_tokens=16,
    ),
    "videomme": PublicSet(
        repo=f"{VIDEO}/Video-MME", parse=video_sets.parse_video_mme, max_tokens=16
    ),
    "videomme_w_subtitle": PublicSet(
        repo=f"{VIDEO}/Video-MME", parse=video_sets.parse_video_mme_subtitles, max_tokens=16
    ),
}
