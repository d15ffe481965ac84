import numpy as np
import pytest
from PIL import Image

from data_prep.encoder.config import EncodeConfig
from data_prep.encoder.encoder import ShardEncoder
from data_prep.show_shards import choose_rows, main
from flowception.evaluation.toy.world import CLASS_COLORS
from flowception.shards.reader import ShardReader


def test_the_image_shows_the_named_clips(toy_folder, tmp_path, capsys):
    out = tmp_path / "set"
    config = EncodeConfig(source=str(toy_folder / "manifest.jsonl"), out=str(out), height=16, width=16)
    ShardEncoder(config).run()
    assert main([str(out), "--num", "3", "--out", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    reader = ShardReader(out)
    for line, row in zip(lines[-4:-1], (0, 6, 11), strict=False):
        about = reader.read_metadata(row)
        assert line.startswith(about["key"])
        assert about["caption"] in line
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    band = len(sheet) // 3
    for number, row in enumerate((0, 6, 11)):
        color = np.array(CLASS_COLORS[int(reader.index.clips["class_label"][row])])
        near = np.abs(sheet[number * band : (number + 1) * band] - color).max(axis=-1) < 40
        assert near.sum() > 500


def test_rows_are_spread_or_drawn_without_replacement():
    assert choose_rows(100, 3, None).tolist() == [0, 50, 99]
    assert choose_rows(2, 5, None).tolist() == [0, 1]
    drawn = choose_rows(100, 30, 4)
    assert len(set(drawn.tolist())) == 30
    assert np.array_equal(drawn, choose_rows(100, 30, 4))


def test_bad_input(tmp_path, capsys):
    assert main([str(tmp_path), "--num", "1", "--out", str(tmp_path / "a.png")]) == 2
    assert "is not a finished shard set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--num", "0", "--out", "a.png"])
