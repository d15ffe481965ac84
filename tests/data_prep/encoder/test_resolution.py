import pytest

from data_prep.encoder.resolution import fitted_size


@pytest.mark.parametrize(
    ("height", "width", "max_pixels", "wanted"),
    [
        (720, 1280, 256 * 448, (256, 448)),  # 16:9
        (1280, 720, 256 * 448, (448, 256)),
        (1000, 1000, 256 * 256, (256, 256)),
        (96, 160, 10**9, (96, 160)),  # fits unchanged
        (100, 170, 10**9, (96, 160)),  # 1.667 is closer to 1.7 than its neighbors are
        (7, 900, 10**9, (32, 928)),  # at least one cell per side
    ],
)
def test_the_nearest_shape(height, width, max_pixels, wanted):
    assert fitted_size(height, width, 32, max_pixels) == wanted


def test_every_shape_fits_and_is_close():
    """Compared with all shapes of the same stride, none of the same or larger area distorts the image less."""
    for height in range(64, 1000, 97):
        for width in range(64, 1000, 83):
            h, w = fitted_size(height, width, 32, 384 * 384)
            assert h % 32 == w % 32 == 0
            assert h * w <= 384 * 384
            assert abs((h / w) / (height / width) - 1) < 0.5
            assert h <= height + 31
            assert w <= width + 31
