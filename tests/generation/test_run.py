"""The public API: load, sample and stream a run; the command line makes the same clips."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import flowception
from flowception.codecs.patchify import PatchifyCodec
from flowception.codecs.video_file import read_video, write_video
from flowception.errors import CheckpointError, ConfigError, DataError, RunDirectoryError
from flowception.flow import Role, sample_states
from flowception.generation.generate import GenerateOptions, generate

QUICK = {"num_inference_steps": 5, "max_frames": 9, "seed": 20}


@pytest.fixture(scope="module")
def run(make_run):
    return flowception.load(make_run(), device="cpu")


@pytest.fixture
def pixels():
    """Seven different noisy frames of the run's size."""
    return np.random.default_rng(1).integers(0, 256, (7, 6, 4, 3), dtype=np.uint8)


def same(clip, other):
    return torch.equal(clip.latents, other.latents) and np.array_equal(clip.frames, other.frames)


def test_importing_the_package_imports_nothing_heavy():
    """The public names are nevertheless available."""
    code = (
        "import sys, flowception\n"
        "assert set(flowception.__all__) < set(dir(flowception))\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'deepspeed', 'omegaconf'} & set(sys.modules)))\n"
        "assert flowception.load.__name__ == 'load' and 'torch' in sys.modules\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    with pytest.raises(AttributeError, match="no attribute 'lode'; public names are Clip,"):
        flowception.lode  # noqa: B018


def test_properties_of_a_run(run, make_run):
    assert (run.path, run.step, run.device) == (make_run(), 4, torch.device("cpu"))
    assert (run.class_names, run.sizes, run.fps) == (["red", "green", "blue"], [(6, 4)], 16.0)
    assert repr(run) == f"Run('{make_run()}', step=4, device='cpu')"
    assert flowception.load(str(make_run()), step=0, device="cpu").step == 0


def test_loading_errors(make_run, tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RunDirectoryError, match="is not a run directory"):
            flowception.load(folder, device="cpu")
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        flowception.load(make_run(), step=3, device="cpu")
    with pytest.raises(ConfigError, match="`device` must be .*, got abacus"):
        flowception.load(make_run(), device="abacus")


def test_attributes_of_a_clip(run):
    clips = run.sample(num=4, **QUICK)
    assert [(clip.class_label, clip.class_name, clip.seed) for clip in clips] == [
        (0, "red", 20), (1, "green", 21), (2, "blue", 22), (0, "red", 23)
    ]  # fmt: skip
    for clip in clips:
        count = len(clip.latents)
        assert (clip.latents.shape, clip.latents.dtype) == ((count, 12, 3, 2), torch.float32)
        assert (clip.frames.shape, clip.frames.dtype) == ((count, 6, 4, 3), np.uint8)
        assert np.array_equal(clip.frames, PatchifyCodec(2).decode(clip.latents).numpy())
        assert len(clip.roles) == count
        assert set(clip.roles) <= {Role.START, Role.FREE}
        inserted = torch.tensor([role == Role.FREE for role in clip.roles])
        assert torch.equal(clip.born_at > 0, inserted)
        assert clip.evaluations == round(5 * (1 + float(clip.born_at.max())))
        assert clip.flops > 0
        assert (clip.task, clip.prompt, clip.step, clip.fps) == ("t2v", None, 4, 16.0)
        assert len(repr(clip)) < 400, "no pixels"
    again, other = run.sample(num=1, **QUICK), run.sample(num=1, **{**QUICK, "seed": 21, "class_label": 0})
    assert same(again[0], run.sample(num=1, **QUICK)[0])
    assert not same(again[0], other[0])


def test_a_class_by_name_or_number(run):
    (one,), (other,) = (run.sample(class_label=label, **QUICK) for label in ("blue", 2))
    assert same(one, other)
    assert (one.class_label, one.class_name) == (2, "blue")
    (none,) = run.sample(class_label="null", **QUICK)
    assert (none.class_label, none.class_name) == (None, None)


def test_an_image_can_be_a_path_array_tensor_or_pil_image(run, pixels, tmp_path):
    image = pixels[0]
    Image.fromarray(image).save(tmp_path / "first.png")
    kinds = [tmp_path / "first.png", str(tmp_path / "first.png"), image, torch.from_numpy(image)]
    kinds += [Image.fromarray(image), Image.fromarray(image).convert("RGBA"), image[None], [image]]
    first, *others = (run.sample(task="i2v", context=kind, **QUICK)[0] for kind in kinds)
    assert np.array_equal(first.frames[0], image)
    assert first.roles[0] == Role.CONTEXT_ACTIVE
    assert [same(first, other) for other in others] == [True] * 7


def test_a_video_can_be_a_file_or_an_array(run, pixels, tmp_path):
    write_video(tmp_path / "video.mp4", pixels, fps=8)
    video = read_video(tmp_path / "video.mp4")
    settings = {"task": "v2v", "keep": [3, 1, 2], **QUICK}
    (clip,), (other,) = (run.sample(context=kind, **settings) for kind in (tmp_path / "video.mp4", video))
    assert same(clip, other)
    assert np.array_equal(clip.frames[:3], video[1:4])


def test_clips_cycle_over_their_context(run, pixels):
    clips = run.sample(task="i2v", context=[pixels[0], Image.fromarray(pixels[1])], num=4, batch_size=3, **QUICK)
    assert [bool(np.array_equal(clip.frames[0], pixels[i % 2])) for i, clip in enumerate(clips)] == [True] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "v2t"}, "task must be one of .*, got 'v2t'"),
        ({"task": "i2v"}, "`task` i2v needs `context`"),
        ({"context": np.zeros((6, 4, 3), np.uint8)}, "`task` t2v takes no `context`"),
        ({"task": "i2v", "context": ["missing.png"]}, "missing.png does not exist"),
        ({"task": "i2v", "context": [3]}, "context item 0 must be a path, .*, got int"),
        ({"task": "i2v", "context": np.zeros((6, 4, 3))}, r"context item 0 must be uint8 .*, got float64 \[6, 4, 3\]"),
        (
            {"task": "i2v", "context": np.zeros((0, 6, 4, 3), np.uint8)},
            r"context item 0 must be uint8 .*, got uint8 \[0, 6, 4, 3\]",
        ),
        (
            {"task": "i2v", "context": torch.zeros(6, 4, 3, dtype=torch.bfloat16)},
            "must be uint8 RGB, got a tensor of torch.bf",
        ),
        ({"task": "i2v", "context": torch.zeros(3, 6, 4, dtype=torch.uint8)}, r"uint8 \[3, 6, 4\]"),
        ({"task": "v2v", "context": np.zeros((2, 6, 4, 3), np.uint8), "keep": [5]}, "2 latent frames, but `keep`"),
        (
            {"task": "v2v", "context": np.zeros((2, 6, 4, 3), np.uint8), "keep": []},
            "`keep` must be a list of 1 or more",
        ),
        ({"keep": [-1]}, "`keep` must be a list of 1 or more, each an integer >= 0, .*, got \\[-1\\]"),
        ({"keep": 3}, "`keep` must be a list of .*, got 3"),
        ({"keep": "0-3"}, "`keep` must be a list of .*, got '0-3'"),
        ({"keep": [0.5]}, "`keep` must be a list of .*, got \\[0.5\\]"),
        ({"prompt": "a red disc"}, "trained without text"),
        ({"prompt": []}, "`prompt` must be a caption or a list of 1 or more, .*, got \\[\\]"),
        ({"prompt": 3}, "`prompt` must be a caption or .*, got 3"),
        ({"prompt": [1]}, "`prompt` must be a caption or .*, got \\[1\\]"),
        ({"class_label": "purple"}, "`class_label`: class must be .*, got 'purple'"),
        ({"class_label": 3}, "from 0 to 2 or one of red, green, blue"),
        ({"num": 0}, "`num` must be an integer >= 1, got 0"),
        ({"seed": -1}, "`seed` must be an integer from 0 to [0-9]+, got -1"),
        ({"seed": True}, "`seed` must be an integer from 0 to [0-9]+, got true"),
        ({"seed": 2**63}, "`seed` must be an integer from 0 to [0-9]+, got 9223372036854775808"),
        ({"guidance": float("nan")}, "`guidance` must be a number, or null for off, got nan"),
        ({"rate_guidance": "3"}, "`rate_guidance` must be a number, or null for off, got '3'"),
        ({"guidance": 10**400}, "`guidance` must be a number, or null for off, got 1000"),
        ({"size": 256}, "`size` must be a list of 2, .*, got 256"),
        ({"size": (64,)}, "`size` must be a list of 2, each an integer >= 1, .*, got \\(64,\\)"),
        ({"cache_refresh": 0}, "`cache_refresh` must be"),
        ({"insertion": "binomial"}, "`insertion` must be one of thinning, .*, got 'binomial'"),
        ({"insertion": None}, "`insertion` must be one of thinning, .*, got null"),
        ({"max_frames": 1}, "`max_frames` must be at least the number of frames a clip starts with, got 1 and 2"),
        ({"num_frames": 7}, "`num_frames` applies only to prescribed delay laws"),
        ({"size": (7, 4)}, "multiples of 2"),
    ],
)
def test_errors_name_arguments_and_are_immediate(run, options, message):
    """Messages have no command-line flags, and a stream raises them before its first frame."""
    for call in (run.sample, run.stream):
        if call == run.stream and "num" in options:
            continue
        with pytest.raises((ConfigError, DataError), match=message) as found:
            call(**options)
        assert "--" not in str(found.value)


def test_integers_of_numpy_are_integers(run):
    (clip,) = run.sample(**QUICK | {"seed": np.int64(3), "num": np.int32(1)})
    assert type(clip.seed) is int
    assert torch.equal(clip.latents, run.sample(**QUICK | {"seed": 3})[0].latents)


def test_a_clip_that_cannot_be_saved_is_an_error(run, tmp_path):
    (clip,) = run.sample(**QUICK | {"seed": 3})
    with pytest.raises(ConfigError, match="`fps` must be a number > 0, got 0"):
        clip.save(tmp_path / "clip.mp4", fps=0)
    clip.save(tmp_path / "slow.gif", fps=0.001)
    for name in ("clip.mp4", "clip.gif"):
        with pytest.raises(DataError, match=f"nowhere/{name}"):
            clip.save(tmp_path / "nowhere" / name)
    with pytest.raises(DataError, match="nowhere/growth.png cannot be written"):
        clip.growth().save(tmp_path / "nowhere" / "growth.png")


def test_the_command_line_and_the_api_make_the_same_clips(run, make_run, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr("flowception.generation.clip.write_mp4", lambda path, video, *, fps: written.append(video))
    options = {**QUICK, "num": 3, "batch_size": 2, "guidance": 2.0, "class_label": "green"}
    records = generate(GenerateOptions(run_dir=make_run(), out_dir=tmp_path / "out", device="cpu", **options))
    clips = run.sample(**options)
    assert len(clips) == 3
    for clip, record, video in zip(clips, records, written, strict=True):
        assert np.array_equal(clip.frames, video)
        assert (clip.seed, clip.flops, clip.evaluations) == (record["seed"], record["flops"], record["evaluations"])


def test_the_suffix_selects_the_file_format(run, tmp_path):
    (clip,) = run.sample(**QUICK)
    clip.save(tmp_path / "clip.mp4")
    clip.save(str(tmp_path / "clip.gif"), fps=10)
    assert read_video(tmp_path / "clip.mp4").shape == clip.frames.shape
    with Image.open(tmp_path / "clip.gif") as preview:
        assert preview.info["duration"] == 100
    growth = clip.growth()
    growth.save(tmp_path / "growth.png")
    growth.save(tmp_path / "growth.svg")
    assert growth.title.startswith(f"t2v, red, seed 20, {len(clip.latents)} latent frames, {clip.evaluations} eval")
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width == round(110 * growth.figure().get_figwidth())
    assert (tmp_path / "growth.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match=r"must end in \.mp4 or \.gif, got clip\.avi"):
        clip.save(tmp_path / "clip.avi")
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg or \.pdf, got growth"):
        growth.save(tmp_path / "growth")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "nowhere"))):
        clip.save(tmp_path / "nowhere" / "clip.mp4")


@pytest.fixture
def steps(monkeypatch):
    """Number of evaluations at each state of a sampler."""
    seen = []

    def watched(*arguments, **settings):
        for state in sample_states(*arguments, **settings):
            seen.append(state.step)
            yield state

    monkeypatch.setattr("flowception.generation.sampling.sample_states", watched)
    return seen


def arrivals(stream, steps):
    """The frames of a stream, and the number of evaluations before each."""
    pairs = [(frame, steps[-1]) for frame in stream]
    return np.stack([frame for frame, _ in pairs]), [step for _, step in pairs]


def test_a_stream_yields_the_clip_of_sample(run, pixels, steps):
    (clip,) = run.sample(**QUICK)
    frames, came = arrivals(run.stream(**QUICK), steps)
    assert np.array_equal(frames, clip.frames)
    assert min(came) >= 5, "with the learned order nothing is final before the clock's end"
    settings = {"task": "v2v", "context": pixels[:3], **QUICK}
    (clip,) = run.sample(**settings)
    frames, came = arrivals(run.stream(**settings), steps)
    assert np.array_equal(frames, clip.frames)
    assert came[:3] == [0, 0, 0], "what was given comes at once"
    assert min(came[3:]) >= 5


def test_an_autoregressive_run_streams_frame_by_frame(make_run, steps):
    run = flowception.load(make_run(delay_law="autoregressive"), device="cpu")
    (clip,) = run.sample(num_frames=4, **QUICK)
    frames, came = arrivals(run.stream(num_frames=4, **QUICK), steps)
    assert np.array_equal(frames, clip.frames)
    assert came == [5, 10, 15, 20]


def test_a_codec_that_mixes_frames_decodes_the_full_clip_once(make_run, pixels, steps, monkeypatch):
    run, decoded = flowception.load(make_run(), device="cpu"), []
    decode = run.loaded.codec.decode
    settings = {"task": "v2v", "context": pixels[:3], **QUICK}
    (clip,) = run.sample(**settings)
    monkeypatch.setattr(run.loaded.codec, "decodes_frame_by_frame", False)
    monkeypatch.setattr(run.loaded.codec, "decode", lambda latents: decoded.append(latents) or decode(latents))
    frames, came = arrivals(run.stream(**settings), steps)
    assert [torch.equal(latents, clip.latents) for latents in decoded] == [True]
    assert np.array_equal(frames, clip.frames)
    assert set(came) == {clip.evaluations}
