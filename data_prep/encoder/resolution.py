"""The size at which a video of any shape is encoded whole: multiples of the codec's stride, nothing cropped.

There is no list of buckets to choose: a pack holds clips of any height and width, so each video takes the nearest
shape that fits. With LTX's 32 pixels and 256 x 384 pixels at most there are about 60 shapes.
"""

from __future__ import annotations

import math
from itertools import product


def fitted_size(height: int, width: int, multiple: int, max_pixels: int) -> tuple[int, int]:
    """The shape of at most ``max_pixels`` that keeps the aspect ratio best, and is as large as the video where it can.

    Args:
        height: Pixels of the video.
        width: Likewise.
        multiple: Both sides of the result are multiples of it, at least one.
        max_pixels: Height x width at most; one cell is always allowed.

    Returns:
        Height and width.
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
