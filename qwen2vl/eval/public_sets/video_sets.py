"""Sets with clips, in the columns of their hubs: MVBench, PerceptionTest, EgoSchema, Video-MME.

The rows name clips, which the user has unpacked into a folder of the layout of the hub. Prompts are
those of lmms-eval 0.7.3. Clips are not opened here.
"""

from __future__ import annotations

import re
from pathlib import Path

from qwen2vl.eval.public_sets.items import (
    PublicItem,
    Row,
    column,
    lettered,
    option_lines,
    text_list,
    user_message,
    video_path,
)

__all__ = [
    "MVBENCH_FOLDERS",
    "parse_egoschema",
    "parse_mvbench",
    "parse_perception_test",
    "parse_video_mme",
    "parse_video_mme_subtitles",
]

LETTER = "\nAnswer with the option's letter from the given choices directly."

# Task of MVBench -> folder of its clips, in the branch `video`.
MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}


def parse_mvbench(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of MVBench with the name of its task as `task_type`.

    The hub has one file for each task: give its name to the reader as a constant column. Segments
    are cut already, so that "start" and "end" of some tasks are not used.
    """
    task = column(row, "task_type")
    choices = lettered(text_list(column(row, "candidates")))
    folder = row.get("prefix") or MVBENCH_FOLDERS.get(task, "")
    options = option_lines(choices, "({}) {}")
    text = f"Question:{column(row, 'question')}\nOption:\n{options}\nOnly give the best option.\n"
    right = [letter for letter, option in choices.items() if option == str(column(row, "answer"))]
    return [
        PublicItem(
            name=f"{task}/{column(row, 'video')}: {row['question']}",
            messages=user_message(text, video_path(media / folder, row["video"])),
            answers=tuple(right[:1]),
            metric="mvbench",
            group=task,
            choices=choices,
        )
    ]


def parse_perception_test(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of PerceptionTest's multiple choice; the test split has no answers."""
    choices = lettered(text_list(column(row, "options")))
    text = f"{column(row, 'question')}\n{option_lines(choices)}{LETTER}"
    answer = row.get("answer_id")
    return [
        PublicItem(
            name=f"{column(row, 'video_name')}_{column(row, 'question_id')}",
            messages=user_message(text, video_path(media, f"{row['video_name']}.mp4")),
            answers=() if answer in (None, "") else (list(choices)[int(answer)],),
            metric="perception_test",
            group=str(row.get("area", "")),
            choices=choices,
        )
    ]


def parse_egoschema(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of EgoSchema; only the subset of 500 has answers.

    Options are published with their letter, "A. text", and their texts are compared with it.
    """
    options = text_list(column(row, "option"))
    choices = lettered([option.strip() for option in options])
    text = "\n".join([column(row, "question"), *options]) + LETTER
    answer = row.get("answer")
    return [
        PublicItem(
            name=str(column(row, "question_idx")),
            messages=user_message(text, video_path(media, f"{column(row, 'video_idx')}.mp4")),
            answers=() if answer in (None, "") else (list(choices)[int(answer)],),
            metric="egoschema",
            choices=choices,
        )
    ]


def parse_video_mme(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of Video-MME; its group is the duration: "short", "medium" or "long"."""
    return _video_mme(row, media, "")


def parse_video_mme_subtitles(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of Video-MME with all its subtitles, of the folder "subtitle" beside "data".

    lmms-eval takes the subtitles at as many times as there are frames. The paper does not say which
    it took.
    """
    path = media / "subtitle" / f"{column(row, 'videoID')}.srt"
    raw = path.read_text(encoding="utf-8") if path.is_file() else ""
    blocks = (block.split("\n", 2)[2:] for block in raw.replace("\r", "").split("\n\n"))
    lines = [re.sub(r"<[^>]*>", "", line[0]).strip() for line in blocks if line]
    shown = "\n".join(lines) if lines else "No subtitles available"
    return _video_mme(row, media, f"This video's subtitles are listed below: \n{shown}\n")


def _video_mme(row: Row, media: Path, start: str) -> list[PublicItem]:
    options = text_list(column(row, "options"))
    instruction = (
        "Select the best answer to the following multiple-choice question based on the video and "
        "the subtitles. Respond with only the letter (A, B, C, or D) of the correct option."
    )
    end = "The best answer is:" if start else LETTER
    text = "\n".join([instruction, column(row, "question"), *options, end])
    return [
        PublicItem(
            name=str(column(row, "question_id")),
            messages=user_message(
                start + text, video_path(media / "data", f"{column(row, 'videoID')}.mp4")
            ),
            answers=(column(row, "answer").strip(),),
            metric="video_mme",
            group=row.get("duration", ""),
            choices=lettered([re.sub(r"^[A-D]\.\s*", "", option) for option in options]),
        )
    ]
