import math
from pathlib import Path

import pytest

from data_prep.encoder.filters import FilterRange, apply_filters
from data_prep.encoder.manifest import read_source
from data_prep.encoder.video_headers import HeaderReader
from flowception.errors import ConfigError, DataError


def table(tmp_path, text):
    (tmp_path / "m.csv").write_text(text)
    return tmp_path / "m.csv"


def test_filters_are_applied_in_turn_and_counted(tmp_path):
    source = table(tmp_path, "path,motion score,seconds\na,1,9\nb,3,4\nc,,5\nd,2,60\ne,5,6\nf,high,6\n")
    filters = {"motion score": FilterRange(min=2), "seconds": FilterRange(min=4, max=10)}
    manifest = read_source(source, filters=filters)
    assert [e.source for e in manifest.entries] == ["b", "e"]
    motion, seconds = manifest.report.filters
    assert (motion.removed, motion.without_number) == (3, 2)
    assert (seconds.removed, seconds.without_number) == (1, 0)
    assert manifest.report.lines() == [
        "csv: 6 videos listed, 2 to encode",
        "filter motion score at least 2: removed 3 (2 without a number)",
        "filter seconds at least 4 and at most 10: removed 1",
    ]


def test_class_numbers_do_not_depend_on_filters(tmp_path):
    source = table(tmp_path, "path,class_name,s\na,ape,1\nb,bee,2\nc,cat,3\n")
    manifest = read_source(source, filters={"s": FilterRange(min=2)})
    assert manifest.class_names == ("ape", "bee", "cat")
    assert [e.class_label for e in manifest.entries] == [1, 2]


def test_size_and_duration_come_from_the_files_without_a_column(tmp_path, write_counting_video):
    write_counting_video(tmp_path / "long.mp4", 20)
    write_counting_video(tmp_path / "short.mp4", 5)
    write_counting_video(tmp_path / "small.mp4", 20, height=8, width=8)
    (tmp_path / "broken.mp4").write_text("no")
    filters = {"duration_s": FilterRange(min=1), "height": FilterRange(min=16), "fps": FilterRange(max=10)}
    manifest = read_source(tmp_path, filters=filters)
    assert [e.source for e in manifest.entries] == ["long.mp4"]
    assert [(c.removed, c.without_number) for c in manifest.report.filters] == [(2, 1), (1, 0), (0, 0)]


def test_an_unknown_column_is_refused_and_the_columns_are_listed(tmp_path):
    source = table(tmp_path, "path,motion score,caption\na,1,x\n")
    with pytest.raises(
        ConfigError, match="no video has column 'motion'; the manifest's numeric columns are motion score"
    ):
        read_source(source, filters={"motion": FilterRange(min=2)})
    with pytest.raises(DataError, match="the filters remove every video of .*motion score at least 2: removed 1"):
        read_source(source, filters={"motion score": FilterRange(min=2)})
    with pytest.raises(ConfigError, match="min must be at most its max, got 3 and 2"):
        FilterRange(min=3, max=2)


def test_a_filter_without_bounds_requires_a_number():
    rows = [{"a": "1"}, {"a": "x"}, {}, {"a": math.nan}]
    kept, (count,) = apply_filters(rows, [(Path("x"), None)] * 4, {"a": FilterRange()}, HeaderReader())
    assert (kept, count.removed, count.without_number) == ([0], 3, 3)
