"""Context from files: an image or a video's first frame becomes the clean first latent of an image-to-video clip.

Shape legend: ``H`` and ``W`` pixels, ``C, h, w`` of a latent frame.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from flowception.codecs import Codec
from flowception.codecs.video_file import cover_and_crop
from flowception.errors import DataError
from flowception.generation.video import read_first_frame


def encode_context_file(path: Path, codec: Codec, *, height: int, width: int) -> Tensor:
    """The latent of a context file's (first) frame.

    Args:
        path: An image, or a video of which the first frame is taken.
        codec: The run's codec.
        height: Pixel height of the clips the run was trained on.
        width: Pixel width of them.

    Returns:
        Normalised latent, float32 ``[1, C, h, w]``.

    Raises:
        DataError: If the file cannot be read, or its frame does not become one latent.
    """
    image = cover_and_crop(read_first_frame(path), height, width)
    latents = codec.encode(np.ascontiguousarray(image)[None])
    if latents.shape[0] != 1:
        raise DataError(f"context file {path}: codec {codec.name} made {latents.shape[0]} latents of one frame, want 1")
    return latents.float()
