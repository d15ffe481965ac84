import json

import pytest

from data_prep.encoder.manifest import make_key, read_source
from flowception.errors import DataError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_folder_is_searched_in_order_of_names(tmp_path):
    touch(tmp_path, "b.mp4", "sub/a.MOV", "a.webm", "notes.txt", "sub/deep/c.mkv")
    manifest = read_source(tmp_path)
    assert [e.source for e in manifest.entries] == ["a.webm", "b.mp4", "sub/a.MOV", "sub/deep/c.mkv"]
    assert manifest.entries[2].path == tmp_path / "sub/a.MOV"
    assert manifest.class_names == ()
    assert len({e.key for e in manifest.entries}) == 4


def test_folders_of_frames_count_if_their_frame_rate_is_known(tmp_path):
    touch(tmp_path, "top.png", "a.mp4", "b/1.png", "c/2.JPG", "d/x.mp4", "d/thumb.png", "e/f/1.png", "g/notes.txt")
    assert [e.source for e in read_source(tmp_path).entries] == ["a.mp4", "d/x.mp4"]
    manifest = read_source(tmp_path, frame_folder_fps=25.0)
    assert [e.source for e in manifest.entries] == ["a.mp4", "b", "c", "d/x.mp4", "e/f"]
    assert {e.frame_folder_fps for e in manifest.entries} == {25.0}
    with pytest.raises(DataError, match="no videos found; .* folders of frames must be below .* need frame_folder_fps"):
        read_source(tmp_path / "e")


def test_folders_of_frames_in_a_table(tmp_path):
    touch(tmp_path, "clips/b/1.png", "clips/a.mp4", "clips/c/1.png")
    table = tmp_path / "m.csv"
    table.write_text("path,frame_folder_fps\nclips/a.mp4,\nclips/b,12.5\nclips/c,\n")
    assert [e.frame_folder_fps for e in read_source(table, frame_folder_fps=30.0).entries] == [30.0, 12.5, 30.0]
    with pytest.raises(
        DataError, match=r"m.csv, video 3: .*clips/c is a folder of frames and has no frame rate; set frame_folder_fps"
    ):
        read_source(table)
    for wrong, message in (
        ("fast", r"\(frames per second\), got 'fast'"),
        ("0", r"> 0 \(frames per second\), got 0.0"),
    ):
        table.write_text(f"path,frame_folder_fps\nclips/b,{wrong}\n")
        with pytest.raises(DataError, match=message):
            read_source(table)


def test_only_a_set_frame_rate_changes_the_hash_of_a_source(tmp_path):
    touch(tmp_path, "b/1.png")
    table, hashes = tmp_path / "m.csv", set()
    for text in ("path\nb.mp4\n", "path,frame_folder_fps\nb.mp4,\n", "path,frame_folder_fps\nb.mp4,25\n"):
        table.write_text(text)
        hashes.add(read_source(table).sha256())
    assert len(hashes) == 2


def test_csv_with_class_names_and_a_byte_order_mark(tmp_path):
    text = '\ufeffpath,caption,class_name,extra\nb.mp4,"a dog, running",dog,1\na.mp4,,cat,2\nc.mp4,,,3\n'
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    manifest = read_source(tmp_path / "m.csv")
    assert [(e.source, e.caption, e.class_label) for e in manifest.entries] == [
        ("b.mp4", "a dog, running", 1),
        ("a.mp4", "", 0),
        ("c.mp4", "", None),
    ]
    assert manifest.class_names == ("cat", "dog")


def test_jsonl_with_numbers_names_and_keys(tmp_path):
    rows = [
        {"path": "x.mp4", "class_label": 2, "class_name": "two", "key": "x"},
        {"path": "/far/y.mp4", "class_label": 0},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    manifest = read_source(tmp_path / "m.jsonl")
    assert manifest.class_names == ("class_0", "class_1", "two")
    assert manifest.entries[0].key == "x"
    assert str(manifest.entries[1].path) == "/far/y.mp4"


def test_keys_are_valid_and_distinguish_paths():
    sources = ["a b.mp4", "a_b.mp4", "a/b.mp4", "../../etc/passwd.mp4", "ü.mp4", "x" * 300 + ".mp4", "v1.5.mp4"]
    keys = [make_key(source) for source in sources]
    assert len(set(keys)) == len(keys)
    assert all(len(key) <= 75 and set(key) <= set("_-" + "abcdefghijklmnopqrstuvwxyz0123456789") for key in keys)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "file,caption\na.mp4,x\n", "must have a column path"),
        ("m.csv", "path\n", "no videos found"),
        ("m.csv", "path,class_label\na.mp4,dog\n", "class_label must be an integer >= 0, got 'dog'"),
        ("m.jsonl", '{"path": "a.mp4"}\n{"path": \n', "line 2 is not JSON"),
        ("m.jsonl", '["a.mp4"]\n', "line 1 must be a JSON object, got list"),
        ("m.jsonl", '{"caption": "no path"}\n', "video 1: path must be the video's file name, got None"),
        ("m.jsonl", '{"path": "a.mp4"}\n{"path": "a.mp4"}\n', "list each video once"),
        ("m.jsonl", '{"path": "a.mp4", "key": "../a"}\n', "clip key must be 1 to 80 letters.*, got '../a-0000'"),
        (
            "m.jsonl",
            '{"path": "a", "class_label": 0}\n{"path": "b", "class_name": "x"}\n',
            "give class_label to all videos or to none",
        ),
        ("m.txt", "a.mp4\n", r"must be a folder of videos, a .csv or a .jsonl file, got .*m\.txt"),
    ],
)
def test_malformed_manifests_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_source(tmp_path / name)


def test_a_caption_may_contain_a_unicode_line_separator(tmp_path):
    row = json.dumps({"path": "a.mp4", "caption": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "m.jsonl").write_bytes((row + "\r\n" + '{"path": "b.mp4"}\r\n').encode())
    manifest = read_source(tmp_path / "m.jsonl")
    assert [e.caption for e in manifest.entries] == ["one\u2028two", ""]


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_that_is_not_utf_8_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes("path,caption\na.mp4,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_source(tmp_path / name)


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no videos found"):
        read_source(tmp_path)
