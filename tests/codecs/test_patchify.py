import numpy as np
import pytest
import torch

from flowception.codecs import CodecConfig, build_codec
from flowception.codecs.patchify import PatchifyCodec
from flowception.errors import CodecError, ConfigError


def all_pixels() -> torch.Tensor:
    """Every value of every channel: [1, 16, 16, 3]."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    return torch.stack([values, values.flip(1), values.flip(2)], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_lossless_for_every_pixel_value(dtype, patch_size):
    codec = PatchifyCodec(patch_size)
    video = all_pixels()
    assert torch.equal(codec.decode(codec.encode(video).to(dtype)), video)


def test_a_cell_holds_its_patch_and_nothing_else():
    video = torch.zeros(2, 8, 12, 3, dtype=torch.uint8)
    video[1, 4:8, 8:12] = 255  # frame 1, cell (1, 2)
    latents = PatchifyCodec(4).encode(video)
    assert latents.shape == (2, 48, 2, 3)
    assert latents.dtype == torch.float32
    assert (latents[1, :, 1, 2] == 1).all()
    latents[1, :, 1, 2] = -1
    assert (latents == -1).all()


def test_channels_are_color_then_row_then_column():
    video = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    video[0, 1, 0, 2] = 255  # blue, row 1, column 0: channel 2 * 4 + 1 * 2 + 0
    assert PatchifyCodec(2).encode(video)[0, :, 0, 0].argmax() == 10


def test_numpy_and_tensor_are_the_same():
    video = all_pixels()
    codec = PatchifyCodec(4)
    assert torch.equal(codec.encode(np.asarray(video)), codec.encode(video))


def test_frame_counts():
    codec = PatchifyCodec(4)
    assert [codec.usable_frames(n) for n in (0, 1, 7)] == [0, 1, 7]
    assert (codec.latent_frames(7), codec.pixel_frames(7)) == (7, 7)


def test_values_out_of_range_are_clipped():
    assert PatchifyCodec(1).decode(torch.tensor([-9.0, 9.0, float("nan")]).view(1, 3, 1, 1)).flatten().tolist() == [
        0,
        255,
        0,
    ]


def test_fingerprint_tells_patch_sizes_apart():
    assert PatchifyCodec(4).fingerprint() == PatchifyCodec(4).fingerprint()
    assert PatchifyCodec(4).fingerprint() != PatchifyCodec(2).fingerprint()


def test_bad_input_is_rejected():
    codec = build_codec(CodecConfig(patch_size=4))
    with pytest.raises(CodecError, match="multiples of 4"):
        codec.encode(torch.zeros(1, 16, 18, 3, dtype=torch.uint8))
    with pytest.raises(CodecError, match="uint8"):
        codec.encode(torch.zeros(1, 16, 16, 3))
    with pytest.raises(CodecError, match="0 frames"):
        codec.encode(torch.zeros(0, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(CodecError, match="48"):
        codec.decode(torch.zeros(1, 47, 4, 4))
    with pytest.raises(ConfigError, match="codec.patch_size must be an integer >= 1, got 0"):
        CodecConfig(patch_size=0)
