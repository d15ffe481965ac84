import itertools

import pytest
import torch

from data_prep.make_toy_text_encoder import make_text_encoder
from flowception.codecs.text import TextEncoder, TextEncoderConfig
from flowception.evaluation.toy.world import caption_of


def test_it_knows_every_word_and_distinguishes_captions(tmp_path):
    pytest.importorskip("transformers")
    encoder = TextEncoder.from_config(TextEncoderConfig(model=str(make_text_encoder(tmp_path)), dtype="float32"))
    captions = [caption_of(label, left, up) for label in range(4) for left in (False, True) for up in (False, True)]
    embedded = encoder.encode(captions)
    assert {tuple(text.shape) for text in embedded} == {(8, 32)}
    for one, other in itertools.combinations(embedded, 2):
        assert (one - other).norm() > 0.1 * one.norm()
    unknown = encoder.encode(["a mauve disc moving left and up"])[0]
    assert all(not torch.allclose(unknown, text) for text in embedded)
    assert encoder.encode([""])[0].shape == (1, 32)


def test_the_seed_determines_the_weights(tmp_path):
    pytest.importorskip("transformers")
    one, same, other = (
        TextEncoder.from_config(TextEncoderConfig(model=str(make_text_encoder(tmp_path / name, seed=seed))))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(one.encode(["a red disc"])[0], same.encode(["a red disc"])[0])
    assert not torch.allclose(one.encode(["a red disc"])[0], other.encode(["a red disc"])[0], atol=0.1)
