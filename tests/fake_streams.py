"""CUDA's streams for ``FakeCuda``: which work must come before which, and whose memory may be given to others.

A tensor that was made on one stream may be used on another only after that one has waited for it, and after the
allocator was told (``record_stream``), else its memory may already hold something else. Both faults give wrong numbers
now and then on a GPU; here each raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor


class FakeStream:
    """Work in order; knows how much of other streams' work it comes after."""

    def __init__(self, device: Any = None) -> None:
        self.done = 0
        self.waited_for: dict[FakeStream, int] = {}

    def wait_stream(self, other: FakeStream) -> None:
        """What is asked for from now on comes after all that ``other`` was asked for so far."""
        for stream, done in {**other.waited_for, other: other.done}.items():
            self.waited_for[stream] = max(done, self.waited_for.get(stream, 0))


class Streams:
    """The streams of one ``FakeCuda``."""

    def __init__(self) -> None:
        self.current = FakeStream()

    @contextmanager
    def _stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def patched(self) -> ExitStack:
        """torch's own streams replaced by these."""
        stack = ExitStack()
        stack.enter_context(patch("torch.cuda.Stream", FakeStream))
        stack.enter_context(patch("torch.cuda.stream", self._stream))
        stack.enter_context(patch("torch.cuda.current_stream", lambda device=None: self.current))
        stack.enter_context(patch.object(Tensor, "record_stream", _record))
        return stack

    def use(self, tensors: list[Any]) -> None:
        """The current stream works on tensors.

        Raises:
            RuntimeError: If one of another stream may not be there yet, or its memory not its own any more.
        """
        for tensor in tensors:
            made_on, number = tensor.made
            if made_on is self.current:
                continue
            if self.current.waited_for.get(made_on, 0) < number:
                raise RuntimeError("a tensor of another stream is used before this stream has waited for it")
            if self.current not in tensor.recorded:
                raise RuntimeError("a tensor of another stream is used and its memory not kept: record_stream")

    def make(self, tensor: Any) -> None:
        """The current stream makes, or changes, a tensor."""
        self.current.done += 1
        tensor.made = (self.current, self.current.done)
        tensor.recorded = set()


def _record(tensor: Any, stream: FakeStream) -> None:
    tensor.recorded.add(stream)
