"""Videos: which frames are selected, files read with PyAV, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from molmo2_golden import GOLDEN2, read

from molmo_edge import Video
from molmo_edge.checkpoints.hub_config import read_config, write_hub_config
from molmo_edge.config import VideoConfig
from molmo_edge.errors import MolmoEdgeError
from molmo_edge.frontend.tokenizer import Tokenizer
from molmo_edge.frontend.video import sample_frames, sample_frames_evenly, sample_times
from molmo_edge.frontend.video_files import VideoError, open_video

ROWS = read("molmo2_preprocess.json")["video_sampling"]["rows"]
N, FPS, SIDE = 48, 10, 64
GOP = 12  # frames from one key frame to the next


def level(number: int) -> int:
    """The grey level of a frame of `clip`."""
    return 5 * number


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4.8 s of video, each frame with a grey level of its own."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    with av.open(str(path), "w") as container:
        # Without key frames where the picture changes.
        stream = container.add_stream("mpeg4", rate=FPS, options={"sc_threshold": "1000000000"})
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.codec_context.gop_size, stream.bit_rate = "yuv420p", GOP, 10**6
        for number in range(N):
            image = np.full((SIDE, SIDE, 3), level(number), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['total_frames']}-{row['fps']}-{row['num_frames']}")
def test_both_rules_select_the_frames_of_the_tables(row: dict[str, Any]) -> None:
    total, fps = row["total_frames"], row["fps"]
    most = {"max_frames": row["num_frames"], "max_fps": row["max_fps"]}
    assert sample_frames(total, fps, **most) == row["reference_indices"]
    assert sample_frames_evenly(total, fps, **most) == row["native_indices"]
    np.testing.assert_allclose(sample_times(total / fps, **most), row["reference_times"], rtol=0, atol=1e-6)
    config = VideoConfig(row["num_frames"], row["max_fps"])
    for sampling, key in (("reference", "reference_indices"), ("transformers", "native_indices")):
        video = Video(np.zeros((total, 1, 1, 3), np.uint8), fps=fps, sampling=sampling)
        times = video.select(config).times
        np.testing.assert_allclose(times, np.array(row[key]) / fps, rtol=1e-12)


def test_frames_in_memory_are_those_selected() -> None:
    frames = [np.full((4, 6, 3), n, np.uint8) for n in range(20)]
    for given in (frames, np.stack(frames), tuple(frames)):
        selected = Video(given, fps=4, max_frames=5).select(VideoConfig())
        assert [int(frame[0, 0, 0]) for frame in selected.read()] == [0, 4, 9, 14, 19]
        assert selected.times == (0.0, 1.0, 2.25, 3.5, 4.75)
    timed = Video(frames[:3], times=[0, 0.4, 9])
    assert timed.select(VideoConfig()).times == (0.0, 0.4, 9.0)
    assert Video(frames, times=list(range(20)), max_frames=3).select(VideoConfig()).times == (0.0, 9.0, 19.0)
    assert (len(timed), timed.duration, repr(timed)) == (3, 9.0, "Video(3 frames, 9.0 s)")


def test_the_limit_on_frames_holds_for_two_frames() -> None:
    frames = [np.full((4, 6, 3), n, np.uint8) for n in range(2)]
    for sampling in ("reference", "transformers"):
        for given in ({"fps": 2}, {"times": [0, 0.5]}):
            selected = Video(frames, **given, max_frames=1, sampling=sampling).select(VideoConfig())
            assert (len(list(selected.read())), selected.times) == (1, (0.0,))


def test_a_file_gives_the_frames_that_are_shown_at_the_times_of_the_reference(clip: Path) -> None:
    video = Video.open(clip)
    assert (len(video), video.duration) == (N, pytest.approx(N / FPS))
    selected = video.select(VideoConfig())
    assert selected.times == pytest.approx([0.5 * n for n in range(10)] + [4.8])
    numbers = [5 * n for n in range(10)] + [N - 1]
    levels = [float(frame.mean()) for frame in selected.read()]
    assert levels == pytest.approx([level(number) for number in numbers], abs=2.4), "half of the way to the next frame"
    assert [float(frame.mean()) for frame in selected.read()] == levels, "a video can be read again"
    few = Video.open(clip.read_bytes(), max_frames=3).select(VideoConfig())
    assert few.times == pytest.approx([0, 2.4, 4.8])
    assert [frame.shape for frame in few.read()] == [(SIDE, SIDE, 3)] * 3
    evenly = Video.open(str(clip), sampling="transformers").select(VideoConfig())
    assert [round(time * FPS) for time in evenly.times] == [n * N // 9 for n in range(9)]


def test_frames_after_a_jump_equal_those_of_reading_everything(clip: Path) -> None:
    file = open_video(clip)
    assert len(file.keys) == N / GOP
    whole = list(file.frames(range(N)))
    for numbers in ([N - 1], [3, 30, 30, 31], [0, 13, 47], [GOP, 2 * GOP - 1]):
        for number, frame in zip(numbers, file.frames(numbers), strict=True):
            np.testing.assert_array_equal(frame, whole[number], err_msg=str(number))


def test_a_truncated_or_damaged_file_is_refused(clip: Path) -> None:
    data = clip.read_bytes()
    for part in (data[: len(data) // 3], data[:-200], data[:64]):
        with pytest.raises(VideoError, match="truncated"):
            Video.open(part)
    av = pytest.importorskip("av")
    # In Matroska the frames do not need the end of the file.
    import io

    out = io.BytesIO()
    with av.open(str(clip)) as source, av.open(out, "w", format="matroska") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    assert len(Video.open(out.getvalue())) == N
    with pytest.raises(VideoError, match=r"ends after .* of 4\.8 s"):
        Video.open(out.getvalue()[: len(out.getvalue()) // 2])


def test_what_is_no_video_is_refused_in_a_sentence(tmp_path: Path, clip: Path) -> None:
    golden = Path(__file__).parent / "golden"
    text = tmp_path / "text.mp4"
    text.write_text("not a video at all\n" * 50)
    for source, words in (
        (text, "cannot be read as a video"),
        (golden / "coffee.png", "pass an image without Video"),
        (tmp_path / "none.mp4", "there is no video"),
        (tmp_path, "is a directory"),
        ("https://example.org/a.mp4", "URLs are not fetched"),
        (b"", "is empty"),
        (b"\0" * 3000, "cannot be read as a video"),
        (5, "not int"),
    ):
        with pytest.raises(VideoError, match=words):
            Video.open(source)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:4.8,\n{clip}\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError):  # another file is not opened
        Video.open(playlist)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"frames": []}), "0 frames"),
        (({"frames": np.zeros((0, 4, 4, 3), np.uint8)}), "0 frames"),
        (({"frames": np.zeros((4, 4, 3), np.uint8)}), r"\[n, h, w, 3\]"),
        (({"frames": "clip.mp4"}), "Video.open reads a file"),
        (({"fps": -1}), "positive number"),
        (({"fps": 0}), "positive number"),
        (({"fps": float("nan")}), "positive number"),
        (({"fps": None}), "either fps"),
        (({"times": [0, 1]}), "either fps"),
        (({"fps": None, "times": [0]}), "2 frames, but 1 times"),
        (({"fps": None, "times": [1, 0]}), "ascending"),
        (({"fps": None, "times": [-1, 0]}), "ascending"),
        (({"fps": None, "times": 3}), "list of seconds"),
        (({"max_frames": 0}), "1 or more"),
        (({"max_fps": -2}), "positive number"),
        (({"sampling": "random"}), "reference, transformers"),
    ],
)
def test_wrong_frames_and_settings_are_refused(arguments: dict[str, Any], words: str) -> None:
    given = {"frames": np.zeros((2, 4, 4, 3), np.uint8), "fps": 2, **arguments}
    with pytest.raises(VideoError, match=words):
        Video(given.pop("frames"), **given)


def test_frames_must_be_images_of_one_size() -> None:
    for wrong, words in ((np.zeros((5, 4, 3), np.uint8), "same size"), ("none.png", "frame 2 of the video: there is")):
        selected = Video([np.zeros((4, 4, 3), np.uint8), wrong], fps=2).select(VideoConfig())
        with pytest.raises(VideoError, match=words):
            list(selected.read())


def test_the_limits_of_a_checkpoint_are_read_and_written(tmp_path: Path) -> None:
    import dataclasses
    import json

    config = read_config(GOLDEN2 / "molmo2_qwen3")
    assert config.video == VideoConfig(384, 2)
    other = dataclasses.replace(config, video=VideoConfig(16, 1.0))
    write_hub_config(other, tmp_path, Tokenizer.from_file(GOLDEN2 / "molmo2_qwen3" / "tokenizer.json").special)
    assert read_config(tmp_path).video == VideoConfig(16, 1.0)
    assert type(config).from_dict(json.loads(json.dumps(other.to_dict()))) == other
    assert "video" not in config.to_dict(), "bundles of earlier versions stay as they are"
    (tmp_path / "video_preprocessor_config.json").write_text('{"num_frames": -3}')
    with pytest.raises(MolmoEdgeError, match="max_frames must be positive"):
        read_config(tmp_path)
