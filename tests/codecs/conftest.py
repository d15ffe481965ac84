"""Shared fixtures of the codec tests: tiny random models with the real shapes."""

import pytest
import torch

LATENT_CHANNELS = 8


def make_autoencoder():
    """An autoencoder of LTX-Video 0.9.5's topology, with small widths that double from level to level as its own do."""
    from diffusers import AutoencoderKLLTXVideo

    torch.manual_seed(0)
    model = AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16, 32, 64, 128),
        down_block_types=("LTXVideo095DownBlock3D",) * 4,
        downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True,) * 4,
        decoder_block_out_channels=(8, 16, 32),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4,
        upsample_residual=(True,) * 3,
        upsample_factor=(2,) * 3,
        timestep_conditioning=True,
        patch_size=4,
        resnet_norm_eps=1e-6,
        encoder_causal=True,
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    model.latents_mean.copy_(torch.linspace(-1, 1, LATENT_CHANNELS))
    model.latents_std.copy_(torch.linspace(0.5, 2, LATENT_CHANNELS))
    return model


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory):
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("ltx")
    make_autoencoder().save_pretrained(folder)
    return folder


@pytest.fixture
def autoencoder():
    pytest.importorskip("diffusers")
    return make_autoencoder()
