from __future__ import annotations

import pytest

from flowception.errors import ConfigError
from flowception.nn import PRESETS, DiTConfig, count_parameters


def closed_form(width, layers, heads, channels, hidden, text_dim=None):
    """Parameters computed from the description of the network (docs/method.md), independently of its modules."""
    head = width // heads
    block = 4 * width**2 + 3 * width * hidden + 2 * head + 6 * width * (width + 1) * (1 if text_dim is None else 2)
    embedding = (2 * channels + 32) * width + 3 * width + width
    mlps = sum(features * width + width + width * (width + 1) for features in (256, 128))
    text = 0 if text_dim is None else text_dim * width + width + width * (width + 1)
    heads_total = 2 * width * (width + 1) + channels * (width + 1) + width * (width + 1) + width + 1
    return layers * block + embedding + mlps + text + heads_total


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("toy", closed_form(128, 4, 4, 48, 352)),
        ("s", closed_form(384, 12, 6, 48, 1024)),
        ("xl", closed_form(1152, 28, 16, 128, 3072)),
        ("2b", closed_form(1536, 38, 24, 128, 4096, text_dim=4096)),
    ],
)
def test_parameters_of_each_preset(preset, expected):
    assert count_parameters(DiTConfig(preset=preset)) == expected


def test_every_preset_is_counted():
    assert list(PRESETS) == ["toy", "s", "xl", "2b"]


def test_2b_has_two_billion():
    assert 2.0e9 <= count_parameters(DiTConfig(preset="2b")) <= 2.2e9


def test_classes_add_their_vectors_and_the_null_class():
    with_classes, without = DiTConfig(preset="toy", num_classes=5), DiTConfig(preset="toy")
    assert count_parameters(with_classes) - count_parameters(without) == 6 * 128


def test_checkpointing_is_all_blocks_none_or_a_number():
    given = (True, False, 0, 1, 4)
    assert [DiTConfig(activation_checkpointing=blocks).checkpointed_blocks() for blocks in given] == [4, 0, 0, 1, 4]


def test_a_network_whose_recomputation_is_still_to_be_found_has_sizes():
    auto = DiTConfig(activation_checkpointing="auto")
    assert auto.spec() == DiTConfig().spec()
    assert count_parameters(auto) == count_parameters(DiTConfig())
    assert auto.resolved().activation_checkpointing == "auto"


def test_overrides_take_precedence_over_the_preset():
    config = DiTConfig(preset="2b", num_layers=2, text_dim=0).resolved()
    assert (config.preset, config.num_layers, config.hidden_size, config.text_dim) == (None, 2, 1536, 0)
    assert config.spec().text_dim is None
    assert config.resolved() == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiTConfig(preset="huge"), "model.preset must be one of toy, s, xl, 2b, or null .*, got 'huge'"),
        (
            lambda: DiTConfig(hidden_size=0),
            "model.hidden_size must be an integer >= 1, or null for the preset's, got 0",
        ),
        (lambda: DiTConfig(num_classes=-1), "model.num_classes must be an integer >= 0 .*, got -1"),
        (lambda: DiTConfig(attention_backend="x"), "model.attention_backend must be one of auto, sdpa.*, got 'x'"),
        (lambda: DiTConfig(attention_pattern="x"), "model.attention_pattern must be one of full.*, got 'x'"),
        (lambda: DiTConfig(frame_spacing=0.0), r"model.frame_spacing must be a number > 0, got 0\.0"),
        (lambda: DiTConfig(rope_base=1.0), r"model.rope_base must be a number > 1, got 1\.0"),
        (lambda: DiTConfig(preset=None).spec(), "model.hidden_size must be set when model.preset is null"),
        (lambda: DiTConfig(activation_checkpointing=-1), "model.activation_checkpointing must be .*, got -1"),
        (
            lambda: DiTConfig(activation_checkpointing="most"),
            r"model.activation_checkpointing must be true \(all blocks\), .*, got 'most'",
        ),
        (
            lambda: DiTConfig(activation_checkpointing="auto").checkpointed_blocks(),
            "must be a number of blocks here, got auto",
        ),
        (
            lambda: DiTConfig(activation_checkpointing=5).spec(),
            "must be at most the number of blocks.*, got 5 and 4 blocks",
        ),
        (
            lambda: DiTConfig(num_heads=3).spec(),
            "model.hidden_size must be a multiple of model.num_heads, got 128 and 3",
        ),
    ],
)
def test_bad_settings_are_rejected(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
