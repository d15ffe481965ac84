"""Counter-based random numbers: known answers, independence of other draws, and their distribution."""

import numpy as np
import pytest

from flowception.rng import MAX_SEED, Stream, normals, permutation, philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox(np.array(counter, dtype=np.uint32), key)
    assert words.tolist() == expected


def test_uniforms_do_not_depend_on_what_else_is_drawn():
    clips = np.array([3, 2**63 + 11, 7, 2**40], dtype=np.uint64)
    together = uniforms(5, Stream.FRAME, epoch=2, clip=clips[:, None], frame=np.arange(6))
    assert together.shape == (4, 6, 2)
    for i, clip in enumerate(clips):
        for frame in range(6):
            assert (uniforms(5, Stream.FRAME, epoch=2, clip=clip, frame=frame) == together[i, frame]).all()


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 6},
        {"seed": 5 + 2**32},
        {"stream": Stream.TASK},
        {"epoch": 1},
        {"clip": 4},
        {"clip": 3 + 2**32},
        {"frame": 1},
    ],
)
def test_every_part_of_the_key_matters(other):
    base = {"seed": 5, "stream": Stream.FRAME, "epoch": 0, "clip": 3, "frame": 0}
    for draw in (uniforms, lambda **key: normals(shape=(4,), **key)):
        assert not np.array_equal(draw(**base), draw(**{**base, **other}))
        assert np.array_equal(draw(**base), draw(**base))


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(0, Stream.GLOBAL_TIME, clip=np.arange(200_000))
    assert u.min() >= 0
    assert u.max() < 1
    # Standard errors: 0.00065 for means, 0.0022 for correlations.
    assert np.abs(u.mean(axis=0) - 0.5).max() < 0.003
    assert np.abs(u.var(axis=0) - 1 / 12).max() < 0.001
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.01
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.01


def test_normals_are_standard_normal():
    x = normals(0, Stream.NOISE, (100_000,), clip=9)
    assert x.dtype == np.float32
    assert abs(x.mean()) < 0.015
    assert abs(x.var() - 1) < 0.02


def test_permutation_is_one_and_is_keyed():
    order = permutation(1, Stream.ORDER, 1000, epoch=3)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, permutation(1, Stream.ORDER, 1000, epoch=3))
    assert not np.array_equal(order, permutation(1, Stream.ORDER, 1000, epoch=4))
    assert not np.array_equal(order, permutation(1, Stream.ORDER, 1000, epoch=3, part=1))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_out_of_range_is_refused_with_its_value(seed):
    with pytest.raises(ValueError, match=str(seed)):
        uniforms(seed, Stream.FRAME)
