"""An index with inconsistent rows and keys is refused on opening."""

import numpy as np
import pytest

from flowception.errors import DataError
from flowception.shards.index import ClipIndex
from flowception.shards.schema import clip_id


@pytest.fixture
def index():
    return ClipIndex.from_arrays(frames=[2, 3, 1], height=[1, 2, 3], width=5)


def test_a_frame_has_one_token_per_cell_and_one_insertion_token(index):
    index.check()
    assert index.tokens_per_frame.tolist() == [6, 11, 16]


@pytest.mark.parametrize("key", [b"../clip", b"", b"a b", b"\xff", b"x" * 81])
def test_a_path_as_key_is_refused_even_with_a_matching_id(index, key):
    keys = index.keys.astype("S81")
    keys[1] = key
    index.clips["clip_id"][1] = clip_id(key.decode("latin-1"))
    with pytest.raises(DataError, match="clip key must be 1 to 80 letters"):
        ClipIndex(index.clips, index.frame_checksum, keys).check()


def test_a_row_with_the_id_of_another_key_is_refused(index):
    keys = np.array([index.keys[0], b"clip-other", index.keys[2]])
    with pytest.raises(DataError, match="row 1 of the index does not have the id of its key clip-other"):
        ClipIndex(index.clips, index.frame_checksum, keys).check()
