import logging
import os

from data_prep.encoder.manifests.rows import files_below


def test_the_first_of_equal_names_is_used_in_any_listing_order(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for name in ("b/same.mp4", "a/z/same.mp4", "a/other.mp4", "c.mp4", "b/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    class Backwards:
        """The entries of ``scandir``, with names from Z to A."""

        def __init__(self, path):
            with scandir(path) as entries:
                self._entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __enter__(self):
            return self._entries

        def __exit__(self, *error):
            return None

        def __next__(self):
            return next(self._entries)

        def close(self):
            return None

    wanted = {"c.mp4": "c.mp4", "other.mp4": "a/other.mp4", "same.mp4": "a/z/same.mp4"}
    assert files_below(tmp_path) == wanted
    said = caplog.messages
    assert said == [f"{tmp_path}: skipped 2 files with the same name as another, such as b/c.mp4"]
    monkeypatch.setattr(os, "scandir", Backwards)
    assert list(os.walk(tmp_path))[0][1] == ["b", "a"]
    assert list(files_below(tmp_path).items()) == list(wanted.items())
    assert caplog.messages == said * 2
