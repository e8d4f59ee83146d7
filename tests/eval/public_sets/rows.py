"""Drawn rows in the formats of the public sets: columns as published, contents made here."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

from PIL import Image, ImageDraw

__all__ = ["LAB_ROWS", "TSV_ROWS", "draw_image", "encode_base64"]


def draw_image(color: str = "red", size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    """Draw a square; return it as Hugging Face data sets store images."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((8, 8, 24, 24), fill=color)
    stream = BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": "0.png"}


def encode_base64(color: str = "red", size: tuple[int, int] = (64, 48)) -> str:
    """Draw a square; return it as VLMEvalKit's files store images."""
    return base64.b64encode(draw_image(color, size)["bytes"]).decode()


def _hallusion(category: str, figure: str, question: str, answer: str) -> dict[str, Any]:
    ids = {"category": category, "subcategory": "ocr", "set_id": "0"}
    return {
        **ids,
        "figure_id": figure,
        "question_id": question,
        "question": "Is the square red?",
        "gt_answer": answer,
        "image": draw_image(),
    }


def _rotation(index: int, first: str, second: str, answer: str) -> dict[str, Any]:
    options = {"A": first, "B": second, "C": "nan", "D": "nan"}
    shown = {"hint": "nan", "question": "Which color?", "category": "attribute", **options}
    return {**shown, "index": index, "answer": answer, "image": draw_image()}


OPTIONS = ["red", "blue", "green", "white"]
VIDEO_MME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Law",
    "videoID": "clip",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "Which color?",
    "options": [f"{c}. {text}" for c, text in zip("ABCD", OPTIONS, strict=True)],
    "answer": "A",
}
DOCUMENT = {
    "questionId": "7",
    "question": "Which year?",
    "docId": 1,
    "answers": ["1993", "in 1993"],
}

# Name of a set -> its rows, and the answers that are right.
LAB_ROWS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "docvqa_val": ([{**DOCUMENT, "image": draw_image()}], ["1993"]),
    "infovqa_val": ([{**DOCUMENT, "image": draw_image()}], ["In 1993"]),
    "chartqa": (
        [
            {"type": "human_test", "question": "How many?", "answer": "12", "image": draw_image()},
            {"type": "augmented_test", "question": "Who?", "answer": "Yes", "image": draw_image()},
        ],
        ["12.1", "yes"],
    ),
    "textvqa_val": (
        [
            {
                "question_id": 3,
                "question": "WHAT word?",
                "answers": ["stop"] * 10,
                "image": draw_image(),
            }
        ],
        ["Stop"],
    ),
    "ocrbench": (
        [
            {
                "dataset": "HME100k",
                "question": "Write the formula.",
                "question_type": "Handwritten Mathematical Expression Recognition",
                "answer": ["x ^ 2"],
                "image": draw_image(),
            },
            {
                "dataset": "SVT",
                "question": "what is written in the image?",
                "question_type": "Regular Text Recognition",
                "answer": ["STOP"],
                "image": draw_image(),
            },
        ],
        ["x^2", "The text is stop"],
    ),
    "ai2d": (
        [{"question": "Which?", "options": OPTIONS, "answer": "2", "image": draw_image()}],
        ["C"],
    ),
    "mme": (
        [
            {
                "question_id": "OCR/1.png",
                "question": f"Is it {color}? Please answer yes or no.",
                "answer": answer,
                "category": "OCR",
                "image": draw_image(),
            }
            for color, answer in (("red", "Yes"), ("blue", "No"))
        ],
        ["Yes", "No."],
    ),
    "mmbench_en_dev": (
        [_rotation(5, "red", "blue", "A"), _rotation(1_000_005, "blue", "red", "B")],
        ["A", "B. red"],
    ),
    "mmbench_cn_dev": ([_rotation(9, "red", "blue", "B")], ["B"]),
    "mmstar": (
        [
            {
                "index": 4,
                "question": "Which color?\nOptions: A: red, B: blue, C: green, D: white",
                "answer": "A",
                "category": "math",
                "l2_category": "geometry",
                "image": draw_image(),
            }
        ],
        ["A"],
    ),
    "mmmu_val": (
        [
            {
                "id": "validation_Basic_Medical_Science_1",
                "question": "Compare <image 1> with <image 2>.",
                "options": "['same', 'other']",
                "question_type": "multiple-choice",
                "answer": "B",
                "image_1": draw_image(),
                "image_2": draw_image("blue"),
            },
            {
                "id": "validation_Math_2",
                "question": "How long is it? <image 1>",
                "options": "[]",
                "question_type": "open",
                "answer": "3.14",
                "image_1": draw_image(),
            },
        ],
        ["(B)", "3.14"],
    ),
    "mmt_val": (
        [
            {
                "index": 8,
                "question": " Which color?",
                **dict(zip("ABCD", OPTIONS, strict=True)),
                "E": "",
                "answer": "D",
                "l2-category": "counting",
                "image": draw_image(),
            }
        ],
        ["D"],
    ),
    "realworldqa": (
        [
            {
                "question": "Which color?\n\nA. red\nB. blue\nAnswer with the letter.",
                "answer": "B",
                "image": draw_image(),
            },
            {"question": "How many? Use one word.", "answer": "2", "image": draw_image()},
        ],
        ["B", "2."],
    ),
    "hallusion_bench_image": (
        [
            _hallusion("VD", "0", "0", "1"),
            _hallusion("VD", "0", "1", "0"),
            _hallusion("VS", "1", "0", "1"),
        ],
        ["Yes", "No", "yes"],
    ),
    "mtvqa": (
        [
            {
                "id": "ar_1",
                "lang": "FR",
                "qa_pairs": "[{'question': 'Quelle ville ?', 'answer': 'Stop.'}, "
                "{'question': 'Combien ?', 'answer': '2'}]",
                "image": draw_image(),
            }
        ],
        ["stop", "Il y en a 2"],
    ),
    "refcoco_val": (
        [
            {
                "question_id": "11",
                "question": "Please provide a short description",
                "answer": ["the red square", "square on the left"],
                "bbox": [8.0, 8.0, 16.0, 16.0],
                "image": draw_image(),
            }
        ],
        ["<|box_start|>(125,167),(375,500)<|box_end|>", "(130,170),(370,490)"],
    ),
    "mvbench": (
        [
            {
                "task_type": "action_count",
                "video": "clip.mp4",
                "question": "How often?",
                "candidates": ["1", "2", "3"],
                "answer": "2",
            }
        ],
        ["(B)"],
    ),
    "perceptiontest_val": (
        [
            {
                "video_name": "video_1",
                "question": "How many?",
                "question_id": "0",
                "options": ["1", "2", "3"],
                "answer_id": "2",
                "area": "physics",
            }
        ],
        ["C"],
    ),
    "egoschema_subset": (
        [
            {
                "question_idx": "2",
                "video_idx": "clip",
                "question": "What is it about?",
                "option": [f"{c}. she does {i}" for i, c in enumerate("ABCDE")],
                "answer": "4",
            }
        ],
        ["E"],
    ),
    "videomme": ([VIDEO_MME], ["A"]),
    "videomme_w_subtitle": ([VIDEO_MME], ["A. red"]),
}

CHOICE = {"question": "Which color?", **dict(zip("ABCD", OPTIONS, strict=True)), "hint": ""}

# Name of a file -> its rows without images, and the answers that are right.
TSV_ROWS: dict[str, tuple[list[dict[str, str]], list[str]]] = {
    "DocVQA_VAL": ([{"question": "Which year?", "answer": "['1993', 'in 1993']"}], ["1993"]),
    "InfoVQA_VAL": ([{"question": "Which year?", "answer": "['1993']"}], ["1993"]),
    "ChartQA_TEST": ([{"question": "How many?", "answer": "12", "split": "test_human"}], ["12"]),
    "TextVQA_VAL": ([{"question": "What?", "answer": repr(["stop"] * 10)}], ["stop"]),
    "OCRBench": (
        [{"question": "What?", "answer": "['STOP']", "category": "Doc-oriented VQA"}],
        ["stop"],
    ),
    "AI2D_TEST": ([{**CHOICE, "answer": "C"}], ["C"]),
    "MME": (
        [
            {
                "question": f"Is it {color}? Please answer yes or no.",
                "answer": answer,
                "category": "OCR",
                "image_path": "OCR/1.png",
            }
            for color, answer in (("red", "Yes"), ("blue", "No"))
        ],
        ["Yes", "No"],
    ),
    "MMBench_DEV_EN_V11": ([{**CHOICE, "answer": "A", "category": "color"}], ["A"]),
    "MMStar": ([{**CHOICE, "answer": "B", "l2_category": "geometry"}], ["B"]),
    "MMMU_DEV_VAL": (
        [{**CHOICE, "answer": "D"}, {"question": "How long?", "answer": "3.14"}],
        ["D", "A"],
    ),
    "MMT-Bench_VAL": ([{**CHOICE, "answer": "A"}], ["A"]),
    "RealWorldQA": ([{**CHOICE, "answer": "A"}], ["A"]),
    "HallusionBench": (
        [
            {
                "index": f"VD_ocr_0_0_{i}_0",
                "question": "Is it red?",
                "answer": answer,
                "category": "VD",
                "l2-category": "ocr",
            }
            for i, answer in enumerate(["Yes", "No"])
        ],
        ["Yes", "No"],
    ),
    "MTVQA_TEST": ([{"question": "Quelle ville ?", "answer": "Stop", "category": "FR"}], ["stop"]),
    "RefCOCO": (
        [
            {
                "question": "Where is the red square?",
                "answer": "[8, 8, 24, 24]",
                "width": "64",
                "height": "48",
                "split": "RefCOCO_val",
            }
        ],
        ["(125,167),(375,500)"],
    ),
}
