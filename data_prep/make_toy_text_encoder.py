"""Make a tiny T5 encoder with random weights for the toy world's words, so that text needs no download.

    python data_prep/make_toy_text_encoder.py --out DIR [--width D] [--seed S]

Pass the folder as ``text.model`` for encoding and as ``--text-encoder`` of ``flowception generate``. Random weights
distinguish captions, which is all that the toy world needs; a real run needs a trained T5. Needs transformers (the
extra ``ltx``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from flowception.errors import FlowceptionError, require
from flowception.evaluation.toy.world import CLASS_NAMES, caption_of
from flowception.rng import MAX_SEED

DEFAULT_WIDTH = 32
_SPECIAL = ("<pad>", "</s>", "<unk>")


def make_text_encoder(out: Path, width: int = DEFAULT_WIDTH, seed: int = 0) -> Path:
    """Write the encoder and its tokenizer: one token per word and ``</s>`` at the end, as for T5.

    Args:
        out: Folder to write.
        width: Width of the embeddings, a multiple of 16.
        seed: Seed of the weights.

    Returns:
        The folder.
    """
    transformers = require("transformers", extra="ltx")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    directions = [(left, up) for left in (False, True) for up in (False, True)]
    captions = [caption_of(label, *direction) for label in range(len(CLASS_NAMES)) for direction in directions]
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = [("</s>", vocabulary["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    out.mkdir(parents=True, exist_ok=True)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.T5Config(
            vocab_size=len(vocabulary), d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=width // 16
        )
        transformers.T5EncoderModel(config).save_pretrained(out)
    return out


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make a tiny random T5 encoder for the toy world's captions.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--width", type=int, default=DEFAULT_WIDTH, metavar="D", help="embedding width (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the weights (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.width < 16 or arguments.width % 16:
        parser.error(f"--width must be a multiple of 16, got {arguments.width}")
    if not 0 <= arguments.seed <= MAX_SEED:
        parser.error(f"--seed must be an integer from 0 to {MAX_SEED}, got {arguments.seed}")
    try:
        folder = make_text_encoder(arguments.out, arguments.width, arguments.seed)
    except (FlowceptionError, OSError) as error:
        print(f"make_toy_text_encoder: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}: a T5 encoder of width {arguments.width} with random weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
