"""A folder in which the pages' Python can be run: a tiny run and a few pictures, under the names that pages use."""

import numpy as np
import pytest
from PIL import Image

from data_prep.make_toy_text_encoder import make_text_encoder
from flowception.codecs.video_file import write_video
from tests.generation.conftest import text_changes, write_run


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory):
    """A run with classes, text and all tasks, under the names that pages give it, two images and a video."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("reader")
    encoder = make_text_encoder(folder / "text_encoder", width=16)
    tasks = {"t2v": 1, "i2v": 1, "v2v": 1, "interpolation": 1, "completion": 1}
    write_run(folder / "runs" / "demo", tasks=tasks, max_context_frames=4, **text_changes(encoder))
    (folder / "demo").mkdir()
    for name in ("runs/quickstart", "demo/run"):
        (folder / name).symlink_to(folder / "runs" / "demo")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(folder / "first.png")
    Image.fromarray(pixels[-1]).save(folder / "last.png")
    write_video(folder / "video.mp4", pixels, fps=8)
    return folder
