"""The conversation format of Molmo2 and MolmoPoint: ChatML turns after the images or the frames of a video.

Source: the chat template in `hf_model/convert_molmo2_to_hf.py`, and `hf_model/processing_molmo2.py`, of allenai/molmo2.
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo_edge.frontend.tokenizer import CHAT_END, Tokenizer, TokenizerError

# Styles that the chat template does not write in front of a question.
# fmt: off
_UNWRITTEN_STYLES = frozenset((
    "a_okvqa_mc", "ai2_diagram", "ai2_diagram_no_letter", "correction_qa", "cosyn_point", "demo", "long_caption",
    "mantis_instruct_mc", "multi_image_count_then_point", "multi_image_counting", "multi_image_mc",
    "multi_image_mc_exp", "multi_image_point_then_count", "multi_image_pointing", "point_count", "pointing",
    "science_qa", "short_caption", "text_sft", "user_qa", "video_clip_caption_start_end",
    "video_clip_caption_start_end_in_seconds", "video_clip_transcript_start_end",
    "video_clip_transcript_start_end_in_seconds", "video_count", "video_count_point", "video_frame_caption_timestamp",
    "video_frame_caption_timestamp_in_seconds", "video_long_caption", "video_multiple_choice",
    "video_multiple_choice_count_without_pointing", "video_multiple_choice_multiple_correct",
    "video_multiple_choice_w_subtitle", "video_point", "video_point_count", "video_point_track_all_frames",
    "video_point_track_per_frame", "video_point_track_start_end", "video_short_caption",
    "video_single_point_track_start_end", "video_transcript",
))
# fmt: on


def styled_question(question: str, style: str | None) -> str:
    """The question with "{style}: " before it, unless the chat template does not write this style."""
    return f"{style}: {question}" if style and style not in _UNWRITTEN_STYLES else question


def training_question_ids(tokenizer: Tokenizer, question: str, *, first: bool) -> list[int]:
    """Ids of a question and of the beginning of its answer, in a training sequence.

    An answer ends with EOS, which is `<|im_end|>`: a question that is not the first of its conversation follows it.
    """
    start = "<|im_start|>user\n" if first else "\n<|im_start|>user\n"
    ids = tokenizer.encode(start, allow_special=True) + tokenizer.encode(question)
    ids += tokenizer.encode(f"{CHAT_END}\n", allow_special=True)
    return ids + tokenizer.encode("<|im_start|>assistant\n", allow_special=True)


def chat_ids(tokenizer: Tokenizer, turns: Sequence[str | Sequence[int]], *, style: str | None = None) -> list[int]:
    """Ids of the turns, and of the beginning of the answer. For the arguments see `prompts.text_ids`.

    The template writes a space in front of an earlier answer's `<|im_start|>`, but not in front of the new answer's.
    """
    ids: list[int] = []
    for number, turn in enumerate(turns):
        ids += tokenizer.encode(
            "<|im_start|>user\n" if number % 2 == 0 else " <|im_start|>assistant\n", allow_special=True
        )
        if isinstance(turn, str):
            ids += tokenizer.encode(styled_question(turn, style if number == len(turns) - 1 else None))
        else:
            ids += turn
        ids += tokenizer.encode(f"{CHAT_END}\n", allow_special=True)
    return [*ids, *tokenizer.encode("<|im_start|>assistant\n", allow_special=True)]


def frame_ids(tokenizer: Tokenizer, times: Sequence[float], cells: int) -> list[int]:
    """Ids of the frames of a video, each of `cells` tokens after its time in seconds.

    Raises TokenizerError if the tokenizer lacks their tokens.
    """
    special = tokenizer.special
    start, end = special.frame_start, special.frame_end
    if start is None or end is None:
        raise TokenizerError("the tokenizer has no <frame_start> and <frame_end>: the model does not take videos")
    ids: list[int] = []
    for number, time in enumerate(times):
        ids += tokenizer.encode(f"{' ' if number else ''}{time:.1f} ")
        ids += [start, *[special.im_patch] * cells, end]
    return ids
