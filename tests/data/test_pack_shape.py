"""Static sizes of packs."""

import numpy as np
import pytest

from flowception.data.pack_shape import static_shape
from flowception.packing.layout import ClipShape, build_layout
from flowception.shards.index import ClipIndex


def test_a_pack_of_the_smallest_frames_fits_and_the_longest_clip_is_a_segment():
    index = ClipIndex.from_arrays(frames=[8, 5, 8], height=2, width=np.array([3, 3, 4]))
    shape = static_shape(index, np.array([10, 4, 10]), 93)
    assert (shape.token_budget, shape.max_frames, shape.max_clips, shape.max_seqlen) == (93, 13, 13, 82)
    build_layout([ClipShape(1, 2, 3)] * 13, shape)
    build_layout([ClipShape(8, 2, 4, 10)], shape)
    with pytest.raises(ValueError, match="max_frames = 14"):
        build_layout([ClipShape(14, 2, 2)], shape)
