import json

import pytest
import torch

from flowception.checkpoint import writer
from flowception.checkpoint.format import KINDS

SHAPES = {"a.weight": (3, 4), "b.bias": (5,), "c.scale": ()}


def values(kind, name):
    """Elements that identify kind, parameter and index."""
    base = 1000 * KINDS.index(kind) + 100 * sorted(SHAPES).index(name)
    return (base + torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float32)).view(SHAPES[name])


def split(count, writers):
    """Split ``count`` elements unevenly among writers."""
    cuts = sorted((count * (i * i) // (writers * writers)) for i in range(writers + 1))
    return list(zip(cuts[:-1], cuts[1:]))


def _part(rank, writers):
    """Tensors and ranges of one rank."""
    tensors, ranges = {}, {}
    for name, shape in SHAPES.items():
        start, stop = split(torch.Size(shape).numel(), writers)[rank]
        if stop > start:
            ranges[name] = (shape, start, stop)
            for kind in KINDS:
                tensors[f"{kind}/{name}"] = values(kind, name).view(-1)[start:stop]
    return tensors, ranges


@pytest.fixture
def save():
    """save(run_dir, step, writers) writes a checkpoint and returns its folder."""

    def write(run_dir, step, writers=2, state=None):
        folder = writer.make(writer.attempt_dir(run_dir, step, "test"))
        for rank in range(writers):
            writer.write_slices(folder, rank, *_part(rank, writers))
        receipts = writer.wait_for_receipts(folder, writers, lambda: 0)
        return writer.commit(folder, step, receipts, state or {"optimizer_steps": step})

    return write


@pytest.fixture
def part():
    """part(writer, writers) returns the tensors and ranges of one writer."""
    return _part


@pytest.fixture
def expected():
    """expected(kind) returns the saved values."""
    return lambda kind: {name: values(kind, name) for name in SHAPES}


@pytest.fixture
def edit_manifest():
    """edit_manifest(folder, change) alters manifest.json and updates its checksum."""
    from flowception.checkpoint.format import _checksum

    def edit(folder, change):
        path = folder / "manifest.json"
        content = json.loads(path.read_text())
        content.pop("checksum")
        change(content)
        path.write_text(json.dumps(content | {"checksum": _checksum(content)}))

    return edit
