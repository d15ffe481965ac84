import numpy as np
import pytest
import torch
from PIL import Image

from flowception.codecs import CodecConfig, build_codec
from flowception.codecs.ltx import LTXCodec
from flowception.errors import CodecError, ConfigError
from flowception.generation.context import ContextReader
from flowception.generation.context_source import context_sources


def clip(frames: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def codec(autoencoder_folder):
    return build_codec(CodecConfig(name="ltx", model=str(autoencoder_folder), dtype="float32"))


@pytest.fixture
def plain_codec(autoencoder):
    """Without noise and time, so decoding equals that of the diffusers decoder."""
    return LTXCodec(autoencoder, decode_timestep=0.0, decode_noise_scale=0.0)


def test_frame_counts(codec):
    assert (codec.latent_channels, codec.spatial_stride, codec.temporal_stride) == (8, 32, 8)
    assert [codec.usable_frames(n) for n in (0, 1, 8, 9, 16, 17, 150)] == [0, 1, 1, 9, 9, 17, 145]
    assert [codec.latent_frames(n) for n in (1, 9, 49)] == [1, 2, 7]
    assert [codec.pixel_frames(n) for n in (1, 2, 7)] == [1, 9, 49]
    with pytest.raises(CodecError, match="for example 9"):
        codec.latent_frames(10)


@pytest.mark.parametrize("latent_frames", [1, 2])
def test_round_trip_is_that_of_diffusers(plain_codec, autoencoder, latent_frames):
    video = clip(plain_codec.pixel_frames(latent_frames))
    latents = plain_codec.encode(video)
    assert latents.shape == (latent_frames, 8, 1, 1)
    pixels = (video.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        raw = autoencoder.encode(pixels).latent_dist.mode()
        mean, std = (b.view(1, -1, 1, 1, 1) for b in (autoencoder.latents_mean, autoencoder.latents_std))
        torch.testing.assert_close(latents, ((raw - mean) / std)[0].permute(1, 0, 2, 3), atol=1e-5, rtol=1e-5)
        expected = autoencoder.decode(raw, torch.zeros(1)).sample[0].permute(1, 2, 3, 0)
    decoded = plain_codec.decode(latents)
    assert decoded.shape == video.shape
    assert decoded.dtype == torch.uint8
    assert ((decoded.float() - ((expected + 1) * 127.5).round().clamp(0, 255)).abs() <= 1).all()


def test_clips_decoded_in_one_call_equal_their_own_decode(codec):
    clips = [codec.encode(clip(codec.pixel_frames(n), seed=n)) for n in (1, 2, 7)]
    together = codec.decode_many(clips)
    assert [len(video) for video in together] == [1, 9, 49]
    for latents, video in zip(clips, together, strict=True):
        assert torch.equal(codec.decode(latents), video)
    assert torch.equal(codec.decode_many(clips[::-1])[0], together[2])


def test_padding_would_have_changed_the_clip(codec):
    """Why clips are decoded alone: this decoder is not causal."""
    latents = codec.encode(clip(9))
    padded = torch.cat([latents, latents[-1:].expand(5, -1, -1, -1)])
    assert (codec.decode(padded)[:9].float() - codec.decode(latents).float()).abs().max() > 1


def test_encoding_is_causal_and_repeats(codec):
    video = clip(17)
    latents = codec.encode(video)
    torch.testing.assert_close(codec.encode(video[:9]), latents[:2], atol=1e-4, rtol=1e-4)
    assert torch.equal(codec.encode(video), latents)


def test_clips_of_equal_shape_are_encoded_together(codec, monkeypatch):
    clips = [clip(9, seed=1), clip(1, seed=2), clip(9, seed=3), clip(9, seed=4, size=64)]
    alone = [codec.encode(one) for one in clips]
    batches, encode = [], codec._autoencoder.encode
    monkeypatch.setattr(codec._autoencoder, "encode", lambda x: batches.append(tuple(x.shape)) or encode(x))
    together = codec.encode_many(clips)
    assert batches == [(2, 3, 9, 32, 32), (1, 3, 1, 32, 32), (1, 3, 9, 64, 64)]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert codec.encode_many([]) == []


def test_fingerprint_follows_weights_statistics_and_nothing_else(autoencoder_folder, autoencoder):
    def build(**changes):
        return build_codec(CodecConfig(name="ltx", model=str(autoencoder_folder), **changes))

    same = {
        build(dtype="float32").fingerprint(),
        build(dtype="bfloat16").fingerprint(),
        build(decode_timestep=0.0).fingerprint(),
    }
    assert len(same) == 1
    autoencoder.latents_mean[0] += 0.5
    assert LTXCodec(autoencoder).fingerprint() not in same


def test_bf16_is_close(autoencoder_folder):
    exact, rough = (
        build_codec(CodecConfig(name="ltx", model=str(autoencoder_folder), dtype=d)) for d in ("float32", "bfloat16")
    )
    video = clip(9)
    latents = exact.encode(video)
    assert (rough.encode(video) - latents).abs().mean() < 0.05 * latents.abs().mean() + 0.02
    assert rough.decode(latents).shape == video.shape


def test_bad_input_is_rejected(codec, tmp_path):
    with pytest.raises(CodecError, match="cut the clip to 9"):
        codec.encode(clip(10))
    with pytest.raises(CodecError, match="multiples of 32"):
        codec.encode(clip(9, size=40))
    with pytest.raises(ConfigError, match=r"codec\.model"):
        build_codec(CodecConfig(name="ltx"))
    with pytest.raises(CodecError, match="cannot load an LTX autoencoder"):
        build_codec(CodecConfig(name="ltx", model=str(tmp_path)))


def test_a_keyframe_is_a_still_as_long_as_a_latent(codec, tmp_path):
    """The first latent is one pixel frame, every other one is eight."""
    values, files = (30, 220), []
    for value in values:
        files.append(tmp_path / f"{value}.png")
        Image.fromarray(np.full((32, 32, 3), value, dtype=np.uint8)).save(files[-1])
    made = ContextReader(task="interpolation", codec=codec, height=32, width=32, fps=None, max_context_frames=8)
    (context,) = made.read(context_sources(files))
    first, still = (np.full((n, 32, 32, 3), v, dtype=np.uint8) for n, v in zip((1, 9), values))
    assert torch.equal(context.frames, torch.stack([codec.encode(first)[0], codec.encode(still)[1]]))
    assert (context.active, context.num_start_frames) == ([True, False], 0)
