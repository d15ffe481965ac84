import pytest
import torch

from flowception.codecs.text import TextEncoder, TextEncoderConfig
from flowception.errors import CodecError, ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random T5 with a word tokenizer that ends each caption with </s>, as T5's does."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "disc", "cyan"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path = tmp_path_factory.mktemp("t5")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=7, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(path)
    return path


def test_captions_are_ragged_and_independent(folder):
    encoder = TextEncoder.from_config(TextEncoderConfig(model=str(folder), dtype="float32"))
    captions = ["a red disc", "cyan", ""]
    together = encoder.encode(captions)
    assert encoder.text_dim == 16
    assert [tuple(t.shape) for t in together] == [(4, 16), (2, 16), (1, 16)]
    for caption, embedding in zip(captions, together, strict=True):
        torch.testing.assert_close(encoder.encode([caption])[0], embedding, atol=1e-5, rtol=1e-5)
    assert encoder.encode([]) == []


def test_long_captions_are_cut(folder):
    encoder = TextEncoder.from_config(TextEncoderConfig(model=str(folder), max_tokens=3))
    assert encoder.encode(["a red disc a red disc"])[0].shape == (3, 16)


def test_bad_input_is_rejected(tmp_path):
    with pytest.raises(CodecError, match="cannot load a T5 encoder"):
        TextEncoder.from_config(TextEncoderConfig(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="text.max_tokens must be an integer >= 1, got 0"):
        TextEncoderConfig(max_tokens=0)
