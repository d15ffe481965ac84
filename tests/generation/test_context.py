"""From context files to the sampler's context, for every task."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowception.codecs import CodecConfig, build_codec
from flowception.codecs.base import Codec
from flowception.codecs.video_file import read_video, write_video
from flowception.errors import ConfigError, DataError
from flowception.flow import ProcessConfig
from flowception.generation.context import ContextReader, check_context, parse_keep, untrained
from flowception.generation.context_source import context_sources

PATCHIFY = build_codec(CodecConfig(name="patchify", patch_size=2))
SIZE = (6, 4)


class StrideFour(Codec):
    """A causal fake codec that compresses time: latent j is the mean of its pixel frames, for 1 + 4 k pixel frames."""

    name, latent_channels, spatial_stride, temporal_stride = "stride-four", 1, 2, 4

    def fingerprint(self):
        return "0"

    def latent_frames(self, pixel_frames):
        assert pixel_frames % 4 == 1
        return 1 + pixel_frames // 4

    def pixel_frames(self, latent_frames):
        return 1 + 4 * (latent_frames - 1)

    def usable_frames(self, pixel_frames):
        return 1 + (pixel_frames - 1) // 4 * 4 if pixel_frames else 0

    def encode(self, video):
        means = torch.as_tensor(np.asarray(video)).double().mean(dim=(1, 2, 3))
        means = torch.cat([means[:1], means[1:].view(-1, 4).mean(dim=1)])
        return means[:, None, None, None].expand(-1, 1, 3, 2).clone()

    def decode(self, latents):
        raise NotImplementedError


@pytest.fixture
def clip(tmp_path):
    """A gray video file and its decoded frames; frame k has brightness about ``8 k``."""

    def make(frames, fps=8.0, name="a.mp4"):
        video = np.repeat(np.arange(frames, dtype=np.uint8) * 8, 6 * 4 * 3).reshape(frames, *SIZE, 3)
        write_video(tmp_path / name, video, fps=fps)
        return tmp_path / name, read_video(tmp_path / name)

    return make


@pytest.fixture
def image(tmp_path):
    def make(value, name):
        Image.fromarray(np.full((*SIZE, 3), value, dtype=np.uint8)).save(tmp_path / name)
        return tmp_path / name

    return make


def reader(task, keep=None, codec=PATCHIFY, fps=None, max_context_frames=8):
    return ContextReader(
        task=task, codec=codec, height=6, width=4, fps=fps, max_context_frames=max_context_frames, keep=keep
    )


def marks(context):
    """The fields of a context besides its frames."""
    return list(context.active), context.num_start_frames, context.begins_with_start


@pytest.mark.parametrize(
    ("word", "expected"), [("0-3,8-11", (0, 1, 2, 3, 8, 9, 10, 11)), ("5", (5,)), ("4, 2-3,3", (2, 3, 4))]
)
def test_keep_accepts_frames_and_ranges(word, expected):
    assert parse_keep(word) == expected


@pytest.mark.parametrize("word", ["", "a", "3-1", "-2", "0-", "0;2", "1,,2", "0-99999999"])
def test_malformed_keep_is_refused(word):
    with pytest.raises(ConfigError, match="--keep must be"):
        parse_keep(word)


def test_continuation_uses_the_kept_frames_or_the_end(clip):
    path, pixels = clip(7)
    latents = PATCHIFY.encode(pixels)
    (context,) = reader("v2v", keep=(1, 2, 3)).read(context_sources([path]))
    assert torch.equal(context.frames, latents[1:4])
    assert (context.active, context.num_start_frames, context.begins_with_start) == (None, None, False)
    assert torch.equal(reader("v2v", max_context_frames=3).read(context_sources([path]))[0].frames, latents[4:])
    assert torch.equal(reader("v2v").read(context_sources([path]))[0].frames, latents)


def test_interpolation_between_images_or_video_frames(clip, image):
    files = [image(10, "a.png"), image(90, "b.png"), image(200, "c.png")]
    (context,) = reader("interpolation").read(context_sources(files))
    assert context.frames.mean(dim=(1, 2, 3)).tolist() == pytest.approx([v / 127.5 - 1 for v in (10, 90, 200)])
    assert marks(context) == ([True, True, False], 0, False)
    path, pixels = clip(7)
    latents = PATCHIFY.encode(pixels)
    ends, chosen = (reader("interpolation", keep=k).read(context_sources([path]))[0] for k in (None, (1, 4, 5)))
    assert torch.equal(ends.frames, latents[[0, 6]])
    assert torch.equal(chosen.frames, latents[[1, 4, 5]])
    assert marks(chosen) == ([True, True, False], 0, False)


@pytest.mark.parametrize(
    ("keep", "active", "begins_with_start"),
    [
        ((0, 1, 4, 5, 7), [False, True, False, True, False], False),
        ((2, 3), [False, True], True),
        ((6, 7), [False, False], True),
        ((0,), [True], False),
        ((1, 3), [True, True], True),
    ],
)
def test_completion_marks_the_ends_of_kept_runs(clip, keep, active, begins_with_start):
    path, pixels = clip(8)
    (context,) = reader("completion", keep=keep).read(context_sources([path]))
    assert torch.equal(context.frames, PATCHIFY.encode(pixels)[list(keep)])
    assert marks(context) == (active, 0, begins_with_start)


def test_completion_keeps_the_first_and_the_last_quarter(clip):
    path, pixels = clip(9)
    (context,) = reader("completion").read(context_sources([path]))
    assert torch.equal(context.frames, PATCHIFY.encode(pixels)[[0, 1, 7, 8]])
    assert marks(context) == ([False, True, False, False], 0, False)


def test_a_codec_that_compresses_time(clip, image):
    """13 of 15 pixel frames are usable: latent 0 is frame 0, latent j is frames 4 j - 3 to 4 j."""
    path, pixels = clip(15)
    gray, codec = pixels.astype(float).mean(axis=(1, 2, 3)), StrideFour()

    def means(*groups):
        return pytest.approx([gray[first : last + 1].mean() for first, last in groups])

    def read(task, files=(path,), **changes):
        (context,) = reader(task, codec=codec, **changes).read(context_sources(list(files)))
        return context.frames[:, 0, 0, 0].tolist()

    assert read("completion", keep=(1, 3)) == means((1, 4), (9, 12))
    # A continuation is encoded as a separate clip: its first latent is the last pixel frame of latent 1.
    assert read("v2v", keep=(1, 2, 3)) == means((4, 4), (5, 8), (9, 12))
    assert read("v2v", max_context_frames=3) == means((6, 6), (7, 10), (11, 14))
    assert read("interpolation", keep=(1, 3)) == means((4, 4), (9, 12))
    assert read("interpolation", files=[image(30, "a.png"), image(70, "b.png")]) == [30, 70]


def test_a_video_is_resampled_to_the_training_frame_rate(clip):
    path, pixels = clip(9, fps=24.0)
    (context,) = reader("v2v", fps=8.0).read(context_sources([path]))
    assert torch.equal(context.frames, PATCHIFY.encode(pixels[[0, 3, 6]]))


def test_files_that_cannot_be_a_context_are_refused_before_loading(clip, image, tmp_path):
    video, still = clip(3)[0], image(9, "a.png")
    (tmp_path / "text.txt").write_text("no picture")
    wrong = [
        ("t2v", [still], None, "`task` t2v takes no `context`"),
        ("v2v", [], None, "`task` v2v needs `context`"),
        ("v2v", [tmp_path / "no.mp4"], None, "does not exist"),
        ("v2v", [tmp_path / "text.txt"], None, "text.txt"),
        ("interpolation", [still], None, "1 images and 0 videos"),
        ("interpolation", [still, still, video], None, "2 images and 1 videos"),
        ("completion", [still], None, "only videos, got an image"),
        ("i2v", [still], (0,), "`keep` selects frames"),
        ("interpolation", [still, still], (0, 1), "`keep` selects frames"),
        ("v2v", [video], (0, 2), "a gap after frame 0"),
        ("interpolation", [video], (1,), "got only frame 1"),
    ]
    for task, files, keep, message in wrong:
        with pytest.raises((ConfigError, DataError), match=message):
            check_context(task, context_sources(files), keep)


def test_a_video_that_is_too_short_is_refused(clip):
    path, _ = clip(3)
    with pytest.raises(DataError, match=r"encode to 3 latent frames, but `keep` requests latent frame 3"):
        reader("completion", keep=(0, 3)).read(context_sources([path]))
    with pytest.raises(DataError, match="all of them kept"):
        reader("completion", keep=(0, 1, 2)).read(context_sources([path]))
    with pytest.raises(DataError, match="all of them kept"):
        reader("completion").read(context_sources([clip(2, name="b.mp4")[0]]))
    with pytest.raises(DataError, match="has one latent frame"):
        reader("interpolation").read(context_sources([clip(1, name="c.mp4")[0]]))


def test_context_unseen_in_training_is_reported(clip):
    path, _ = clip(7)
    process = ProcessConfig(tasks={"v2v": 1, "completion": 1}, max_context_frames=4, max_cuts=2)
    assert untrained("v2v", reader("v2v", keep=(0, 1, 2, 3)).read(context_sources([path])), process, 20) is None
    assert "a context like this, of 7 frames" in untrained(
        "v2v", reader("v2v").read(context_sources([path])), process, 20
    )
    assert "only on v2v, completion" in untrained("i2v", [], process, 20)
    assert untrained("completion", reader("completion", keep=(2,)).read(context_sources([path])), process, 20) is None
    assert "3 frames" in untrained(
        "completion", reader("completion", keep=(1, 3, 5)).read(context_sources([path])), process, 20
    )
