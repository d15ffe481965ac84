"""``encode_shards`` with the LTX codec, from a video file to what a reader returns."""

import json

import numpy as np
import torch

from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.encoder import ShardEncoder
from flowception.codecs import CodecConfig, build_codec
from flowception.codecs.video_file import read_video, write_video
from flowception.config import load
from flowception.generation.load import codec_of
from flowception.shards.reader import ShardReader


def test_videos_become_latents_that_decode_again(autoencoder_folder, tmp_path):
    generator = np.random.default_rng(0)
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, frames in (("a", 20), ("b", 9)):
        write_video(videos / f"{name}.mp4", generator.integers(0, 256, (frames, 32, 64, 3), dtype=np.uint8), fps=8.0)
    words = [f"source={videos}", f"out={tmp_path / 'set'}", "codec.name=ltx", f"codec.model={autoencoder_folder}"]
    words += ["codec.dtype=float32", "height=32", "width=64", "min_frames=3", "max_frames=17", "device=cpu"]
    summary = ShardEncoder(load(EncodeConfig, [], words)).run()
    # a: 17 frames are a clip, its last 3 shorten to 1, below min_frames. b: 9 frames, 2 latent ones.
    assert (summary.videos, summary.unreadable, summary.clips) == (2, 0, 2)

    codec = build_codec(CodecConfig(name="ltx", model=str(autoencoder_folder), dtype="float32"))
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    assert (meta["codec"], meta["codec_fingerprint"], meta["latent_channels"]) == ("ltx", codec.fingerprint(), 8)
    assert meta["latent_mean"] == torch.linspace(-1, 1, 8).tolist()
    assert meta["latent_std"] == torch.linspace(0.5, 2, 8).tolist()
    assert meta["tokens_per_frame"] == [{"height": 1, "width": 2, "tokens": 3, "clips": 2}]
    assert (meta["clips"], meta["latent_frames"]) == (2, 5)

    reader = ShardReader(tmp_path / "set", codec="ltx", codec_fingerprint=codec.fingerprint())
    assert reader.index.clips["frames"].tolist() == [3, 2]
    for row, (name, frames) in enumerate((("a", 17), ("b", 9))):
        latents = reader.read(row, np.arange(reader.index.clips["frames"][row]))
        expected = codec.encode(torch.from_numpy(read_video(videos / f"{name}.mp4")[:frames]))
        torch.testing.assert_close(latents.float(), expected, atol=1e-4, rtol=2**-8)  # bfloat16 rounds by 2^-9 at most
        assert reader.read_metadata(row)["pixel_frames"] == frames
        assert codec_of(reader.meta).decode(latents.float()).shape == (frames, 32, 64, 3)
