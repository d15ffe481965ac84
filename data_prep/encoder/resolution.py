"""The size at which to encode a video of any shape without cropping: multiples of the codec's stride.

No list of aspect buckets is needed: a pack holds clips of any height and width, so each video takes the nearest shape
that fits. With LTX's stride of 32 pixels and at most 256 x 384 pixels there are about 60 shapes.
"""

from __future__ import annotations

import math
from itertools import product


def fitted_size(height: int, width: int, multiple: int, max_pixels: int) -> tuple[int, int]:
    """Find the shape of at most ``max_pixels`` with the closest aspect ratio, as large as the video if possible.

    Args:
        height: Height of the video in pixels.
        width: Width of the video in pixels.
        multiple: Height and width of the result are multiples of this, at least one.
        max_pixels: Largest height x width; one cell is always allowed.

    Returns:
        Height and width in pixels.
    """
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    sides = []
    for side in (height, width):
        cells = side * scale / multiple
        sides.append(sorted({max(1, math.floor(cells)), max(1, math.ceil(cells))}))
    fitting = [(h, w) for h, w in product(*sides) if h * w * multiple**2 <= max_pixels]
    wanted = math.log(height / width)

    def distortion(cells: tuple[int, int]) -> tuple[float, int]:
        return (round(abs(math.log(cells[0] / cells[1]) - wanted), 9), -cells[0] * cells[1])

    h, w = min(fitting or [(sides[0][0], sides[1][0])], key=distortion)
    return h * multiple, w * multiple
