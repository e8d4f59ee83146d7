"""What a server needs of a processor: token ids, text without control tokens, params, salts."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import torch

from qwen2vl.errors import InputError
from qwen2vl.processor.media.decoder import LocalDecoder
from qwen2vl.processor.media.rgb import DecodedImage
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.messages import parse_messages
from tests.media import encoded, smooth
from tests.processor.test_processor import decoded, random_frames, random_image, user
from tests.tiny import tiny_config, tiny_processor, tiny_tokenizer


def test_parsed_messages_are_taken_as_they_are() -> None:
    messages = user({"image": random_image()}, {"text": "What?"})
    parsed = parse_messages(messages)
    assert parse_messages(parsed) == parsed and parse_messages(parsed)[0] is parsed[0]
    assert tiny_processor()(parsed).input_ids == tiny_processor()(messages).input_ids
    mixed = [*parsed, {"role": "assistant", "content": "A dog."}, *user({"text": "Sure?"})]
    assert [message.path for message in parse_messages(mixed)] == [
        "messages[0]",
        "messages[1]",
        "messages[2]",
    ]


# Token ids and raw text ---------------------------------------------------------------------------


def test_token_ids() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode_text("<|im_start|>Hello<|im_end|>", allowed_special="all")
    prompt = tiny_processor().from_token_ids(ids, cache_salt=b"a")
    wanted = tiny_processor().from_text("<|im_start|>Hello<|im_end|>")
    assert prompt.input_ids == wanted.input_ids == ids and prompt.input_ids is not ids
    assert torch.equal(prompt.position_ids_3T, wanted.position_ids_3T)
    assert (prompt.rope_delta, prompt.items, prompt.cache_salt) == (0, (), b"a")
    assert prompt.placeholder_index_M.tolist() == []


SIZE = tiny_config().text.vocab_size


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], "list of token ids is empty"),
        ("text", "must be of type list; text goes to from_text"),
        ([1, SIZE], f"token id 1 is {SIZE}, must be a whole number from 0 to {SIZE - 1}"),
        ([-1], "token id 0 is -1"),
        ([1.0], r"token id 0 is 1\.0"),
        ([True], "token id 0 is True"),
        ([10**30], "token id 0 is 1000"),
    ],
)
def test_wrong_token_ids(ids: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        tiny_processor().from_token_ids(ids)


@pytest.mark.parametrize("token", ["image_pad", "video_pad", "vision_start", "vision_end"])
def test_token_ids_of_vision_tokens(token: str) -> None:
    ids = [1, tiny_tokenizer().token_to_id(f"<|{token}|>")]
    with pytest.raises(InputError, match=rf"token id 1 is <\|{token}\|>, which needs an image"):
        tiny_processor().from_token_ids(ids)


def test_control_tokens_in_raw_text_can_stay_text() -> None:
    text = "<|im_start|>system\n<|image_pad|><|endoftext|><|box_start|>"
    prompt = tiny_processor().from_text(text, allow_special_tokens=False, cache_salt=b"a")
    tokenizer = tiny_tokenizer()
    special = {tokenizer.token_to_id(f"<|{t}|>") for t in ("im_start", "image_pad", "endoftext")}
    assert not special & set(prompt.input_ids)
    assert prompt.input_ids[-1] == tokenizer.token_to_id("<|box_start|>")  # as in messages
    assert tokenizer.decode(prompt.input_ids) == text and prompt.cache_salt == b"a"
    with pytest.raises(InputError, match="0 placeholders"):
        tiny_processor().from_text(text, [random_image()], allow_special_tokens=False)


# Params of errors ---------------------------------------------------------------------------------

GOOD = {"type": "image", "image": random_image()}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("text", "messages"),
        ([], "messages"),
        ([{"role": "user", "content": "a"}, {"role": "x"}], "messages[1]"),
        ([{"role": "user", "content": "a", "extra": 1}], "messages[0]"),
        (user(GOOD, {"type": "image"}), "messages[0].content[1]"),
        (user({"type": "imge"}), "messages[0].content[0]"),
        (user(GOOD, {"image": "a.png", "max_pixels": 0}), "messages[0].content[1]"),
        (user(GOOD, {"image": b"no image"}), "messages[0].content[1]"),
        (user(GOOD, {"video": b"no video"}), "messages[0].content[1]"),
        (user(GOOD, {"image": "data:image/png;base64,@"}), "messages[0].content[1]"),
        (user({"image": np.zeros((1, 900, 3), np.uint8)}), "messages[0].content[0]"),
        (user({"text": "a"}, {"type": "box", "box": [1, 2, 3, 4]}), "messages[0].content[1]"),
    ],
)
@pytest.mark.parametrize("is_cached", [False, True])
def test_errors_name_their_param(messages: Any, param: str, is_cached: bool) -> None:
    processor = tiny_processor().with_item_cache(10**7) if is_cached else tiny_processor()
    with pytest.raises(InputError) as caught:
        processor(messages)
    assert caught.value.param == param


def test_errors_of_raw_text_name_the_medium() -> None:
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    for media in ([GOOD, b"no image"], [GOOD, {"image": b"", "max_pixels": -1}]):
        with pytest.raises(InputError) as caught:
            tiny_processor().from_text(pad * 2, media)
        assert caught.value.param == "media[1]"


# Options and formats ------------------------------------------------------------------------------


def test_num_frames_is_nframes() -> None:
    frames = random_frames(8)
    one, other = (
        tiny_processor()(user({"type": "video", "video": frames, name: 4})).items[0]
        for name in ("num_frames", "nframes")
    )
    assert one.pair_digests == other.pair_digests and len(one.frame_timestamps) == 4
    both = {"type": "video", "video": frames, "num_frames": 4, "nframes": 4}
    with pytest.raises(InputError, match=r"num_frames and .*nframes mean the same"):
        tiny_processor()(user(both))
    with pytest.raises(InputError, match=r"content\[0\]: num_frames is 0, must lie between"):
        tiny_processor()(user({"type": "video", "video": frames, "num_frames": 0}))
    with pytest.raises(InputError, match="unknown key 'num_frames'"):
        tiny_processor()(user({"type": "image", "image": random_image(), "num_frames": 4}))


def jpeg(seed: int) -> bytes:
    return encoded(smooth(56, 56, seed), "JPEG")


def jpeg_url(*frames: bytes) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(f).decode() for f in frames)


@pytest.mark.parametrize("is_cached", [False, True])
def test_data_url_of_jpeg_frames(is_cached: bool) -> None:
    processor = tiny_processor().with_item_cache(10**7) if is_cached else tiny_processor()
    frames = [jpeg(seed) for seed in range(4)]
    item = {"type": "video_url", "video_url": {"url": jpeg_url(*frames)}}
    listed = tiny_processor()(user({"video": frames})).items[0]
    assert processor(user(item)).items[0].pair_digests == listed.pair_digests
    sampled = processor(user({**item, "num_frames": 2})).items[0]
    assert len(sampled.frame_timestamps) == 2
    if is_cached:
        assert processor(user(item)).items[0] is processor(user(item)).items[0]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (jpeg_url(jpeg(0), jpeg(1)[:300]), r"video 1, frames\[1\] is a damaged JPEG file"),
        (jpeg_url(jpeg(0), b""), r"video 1, frames\[1\] is empty"),
        (jpeg_url(jpeg(0), encoded(smooth(56, 57))), r"frames\[1\] is 57 x 56, but frames\[0\]"),
        (jpeg_url(*[jpeg(0)] * 101), "more than 100 frames, which is the limit"),
        ("data:video/jpeg;base64," + "," * 10_000_000, "more than 100 frames"),
        ("data:video/jpeg;base64,", r"frames\[0\] is empty"),
    ],
)
def test_wrong_jpeg_frames(url: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        tiny_processor(limits=MediaLimits(max_frames=100))(user({"video": url}))


def test_declared_types_are_shown_only_if_they_are_types() -> None:
    def notes(kind: str) -> tuple[str, ...]:
        url = f"data:{kind};base64,{base64.b64encode(jpeg(0)).decode()}"
        return tiny_processor()(user({"image": url})).items[0].notes

    assert notes("image/png") == ("declared as image/png, read as image/jpeg",)
    assert notes("image/\u202egnp") == notes("image/" + "x" * 1000) == ()


# Caches and decoders ------------------------------------------------------------------------------


def test_salts_do_not_share_items() -> None:
    cached = tiny_processor().with_item_cache(10**7)
    message = user({"image": jpeg(0)})
    first, again, other = (cached(message, cache_salt=salt) for salt in (b"a", b"a", b"b"))
    assert first.cache_salt == b"a" and first.items[0] is again.items[0]
    assert first.items[0] is not other.items[0]
    assert cached(message).cache_salt == b""


class CountingDecoder(LocalDecoder):
    def __init__(self) -> None:
        self.count = 0

    def open_image(self, *args: Any, **options: Any) -> DecodedImage:
        self.count += 1
        return super().open_image(*args, **options)


def test_with_media_replaces_decoder_limits_and_cache() -> None:
    decoder, message = CountingDecoder(), user({"image": jpeg(0)})
    original = tiny_processor().with_item_cache(10**7)
    original(message)
    copy = original.with_media(decoder, MediaLimits(max_image_pixels=56 * 56))
    assert copy(message).items[0].pair_digests == original(message).items[0].pair_digests
    assert copy(message).items and decoder.count == 1  # the first was not in its cache
    assert decoded(copy(message)) == decoded(original(message))
    large = user({"image": encoded(smooth(57, 56))})
    original(large)
    with pytest.raises(InputError, match="limit is 3,136"):
        copy(large)


def test_orientation_of_items() -> None:
    exif_image = encoded(smooth(40, 60), "JPEG", exif=_exif(6))
    for preset, orientation, size in (
        ("paper", 6, (60, 40)),
        ("qwen_vl_utils_0_0_14", 1, (40, 60)),
    ):
        processor = tiny_processor(video_preset=preset)
        item, plain = processor(user({"image": exif_image}, {"image": jpeg(0)})).items
        assert (item.orientation, item.original_size, plain.orientation) == (orientation, size, 1)


def _exif(orientation: int) -> Any:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif
