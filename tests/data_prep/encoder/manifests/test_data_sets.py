"""Each data set in a small copy of its published layout, complete and with parts missing."""

import pytest

from data_prep.encoder.filters import FilterRange
from data_prep.encoder.manifest import read_source
from flowception.errors import ConfigError, DataError


def touch(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_taichi(tmp_path):
    for name in ("train/ab#000010#000050.mp4", "train/cd#1#000000#000128.mp4", "test/ef#000000#000009.mp4"):
        touch(tmp_path / name)
    manifest = read_source(tmp_path, "taichi")
    assert [e.source for e in manifest.entries] == ["train/ab#000010#000050.mp4", "train/cd#1#000000#000128.mp4"]
    assert all(entry.path.is_file() for entry in manifest.entries)
    assert [e.source for e in read_source(tmp_path, "taichi", "test").entries] == ["test/ef#000000#000009.mp4"]
    touch(
        tmp_path / "taichi-metadata-new.csv",
        "video_id,start,end,bbox,fps,width,height,partition\n"
        "ab,10,50,0-0-9-9,30,9,9,train\n1#cd,0,128,0-0-9-9,30,9,9,train\n"
        "gone,5,70,0-0-9-9,30,9,9,train\nef,0,9,0-0-9-9,30,9,9,test\n",
    )
    manifest = read_source(tmp_path, "taichi")
    assert manifest.report.missing == ("train/gone#000005#000070.mp4",)
    assert (manifest.report.listed, manifest.report.kept) == (3, 2)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="has neither .mp4 files nor folders of frames"):
        read_source(tmp_path / "empty", "taichi")


def test_taichi_as_folders_of_frames(tmp_path):
    """``load_videos.py`` writes folders of frames by default, with names that still end in ``.mp4``."""
    for name in ("ab#000010#000050.mp4/0000000.png", "cd#000000#000128.png/0000000.png", "ef#000000#000009.mp4"):
        touch(tmp_path / "train" / name)
    with pytest.raises(
        DataError, match="ab#000010#000050.mp4 is a folder of frames and has no frame rate; set frame_folder_fps"
    ):
        read_source(tmp_path, "taichi")
    entries = read_source(tmp_path, "taichi", frame_folder_fps=24.0).entries
    assert [e.source for e in entries] == [
        "train/ab#000010#000050.mp4",
        "train/cd#000000#000128.png",
        "train/ef#000000#000009.mp4",
    ]
    assert [e.frame_folder_fps for e in entries] == [24.0] * 3
    header = "video_id,start,end,fps,partition\n"
    touch(tmp_path / "taichi-metadata.csv", f"{header}ab,10,50,29.97,train\ncd,0,128,,train\nef,0,9,25,train\n")
    manifest = read_source(tmp_path, "taichi", frame_folder_fps=24.0, filters={"frames": FilterRange(min=20)})
    assert [e.frame_folder_fps for e in manifest.entries] == [29.97, 24.0]
    assert manifest.report.missing == ()
    with pytest.raises(DataError, match="cd#000000#000128.png is a folder of frames"):
        read_source(tmp_path, "taichi")


def trajectory(video, times):
    line = " ".join(["0.5"] * 18)
    return f"https://www.youtube.com/watch?v={video}\n" + "".join(f"{t} {line}\n" for t in times)


def test_realestate10k(tmp_path):
    touch(tmp_path / "videos" / "abc_-1.mkv")
    touch(tmp_path / "train" / "0001.txt", trajectory("abc_-1", [2_000_000, 2_033_000, 2_066_000]))
    touch(tmp_path / "train" / "0002.txt", trajectory("abc_-1", [7_000_000]))
    touch(tmp_path / "train" / "0003.txt", trajectory("gone", [7_000_000]))
    manifest = read_source(tmp_path, "realestate10k")
    first, second = manifest.entries
    assert (first.key, first.source, first.start_s) == ("train-0001", "videos/abc_-1.mkv", 2.0)
    assert first.end_s == pytest.approx(2.067)
    assert (second.key, second.start_s) == ("train-0002", 7.0)
    assert manifest.report.missing == ("train/0003.txt (video gone)",)
    touch(tmp_path / "train" / "0004.txt", trajectory("abc_-1", [5, 5]))
    with pytest.raises(DataError, match=r"0004.txt must have .* increasing times, got 2 frames"):
        read_source(tmp_path, "realestate10k")
    touch(tmp_path / "train" / "0004.txt", "https://youtu.be/abc\n12 0.5\n")
    with pytest.raises(DataError, match=r"0004.txt, line 2 must be .*, got 2 words"):
        read_source(tmp_path, "realestate10k")


@pytest.mark.parametrize("folders", [True, False])
def test_kinetics600(tmp_path, folders):
    annotations = (
        "label,youtube_id,time_start,time_end,split\n"
        "yoga,AAA,5,15,train\nabseiling,BBB,100,110,train\nzumba,CCC,0,10,train\n"
    )
    touch(tmp_path / ("annotations/train.csv" if folders else "train.csv"), annotations)
    touch(tmp_path / "train" / ("yoga" if folders else "") / "AAA_000005_000015.mp4")
    touch(tmp_path / "train" / ("abseiling" if folders else "") / "BBB_000100_000110.mp4")
    manifest = read_source(tmp_path, "kinetics600")
    assert manifest.class_names == ("abseiling", "yoga", "zumba")
    assert [(e.class_label, e.path.is_file()) for e in manifest.entries] == [(1, True), (0, True)]
    assert manifest.report.missing == ("train/CCC_000000_000010.mp4",)
    with pytest.raises(DataError, match=r"val.csv is missing; expected .*with the labels"):
        read_source(tmp_path, "kinetics600", "val")


def test_openvid(tmp_path):
    touch(
        tmp_path / "data" / "train" / "OpenVid-1M.csv",
        "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds\n"
        'a.mp4,"a cat, asleep",5.1,0.5,0.99,static,120,24.0,5.0\nb.mp4,a dog,4.9,7.5,0.9,pan,60,30.0,2.0\n'
        "c.mp4,gone,4.9,7.5,0.9,pan,60,30.0,2.0\n",
    )
    touch(tmp_path / "video" / "a.mp4")
    touch(tmp_path / "video" / "part" / "b.mp4")
    manifest = read_source(tmp_path, "openvid")
    assert [(e.source, e.caption) for e in manifest.entries] == [
        ("video/a.mp4", "a cat, asleep"),
        ("video/part/b.mp4", "a dog"),
    ]
    assert manifest.report.missing == ("c.mp4",)
    with pytest.raises(DataError, match=r"OpenVidHD.csv is missing"):
        read_source(tmp_path, "openvid", "OpenVidHD")


@pytest.mark.parametrize("name", ["taichi", "realestate10k", "kinetics600", "openvid"])
def test_an_empty_folder_is_refused_with_the_expected_layout(tmp_path, name):
    with pytest.raises(DataError, match=f"source_format {name}: .* is missing; expected"):
        read_source(tmp_path, name)


def test_a_data_set_without_any_local_videos_is_refused(tmp_path):
    touch(tmp_path / "OpenVid-1M.csv", "video,caption\na.mp4,x\n")
    with pytest.raises(DataError, match="all 1 listed videos are missing"):
        read_source(tmp_path, "openvid")


def test_the_format_must_fit_the_source(tmp_path):
    touch(tmp_path / "m.csv", "path\na.mp4\n")
    with pytest.raises(DataError, match="source must be a file for source_format csv"):
        read_source(tmp_path, "csv")
    with pytest.raises(ConfigError, match="split must be null for source_format csv, which has no splits"):
        read_source(tmp_path / "m.csv", split="test")
    with pytest.raises(ConfigError, match="source_format must be one of auto, folder, .*, got 'webvid'"):
        read_source(tmp_path, "webvid")
