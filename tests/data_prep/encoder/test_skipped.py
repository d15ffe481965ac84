"""What finished shards left out, and lists that cannot be read."""

import pytest

from data_prep.encoder.skipped import read_dropped, read_unreadable
from flowception.errors import DataError


def test_counts_and_lines_of_shards_are_joined(tmp_path):
    for shard, (counts, lines) in enumerate([('{"short": 2, "still": 1}', "a\n"), ('{"short": 1}', "b\n"), ("{}", "")]):
        (tmp_path / f"shard-{shard:06d}.dropped.json").write_text(counts)
        (tmp_path / f"shard-{shard:06d}.unreadable.jsonl").write_text(lines)
    assert read_unreadable(tmp_path, [0, 1, 2]) == "a\nb\n"
    assert read_dropped(tmp_path, [0, 1, 2]).pieces == {"short": 3, "still": 1}


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"3"])
def test_counts_that_cannot_be_read_name_their_file(tmp_path, content):
    path = tmp_path / "shard-000004.dropped.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000004\.dropped\.json .*encode again"):
        read_dropped(tmp_path, [4])


def test_a_missing_list_names_its_file(tmp_path):
    with pytest.raises(DataError, match=r"shard-000004\.unreadable\.jsonl .*encode again"):
        read_unreadable(tmp_path, [4])
