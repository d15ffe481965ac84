"""The names of the source formats, apart from their readers, so that a configuration can be read without them."""

from typing import Literal

SourceFormat = Literal["auto", "folder", "csv", "jsonl", "taichi", "realestate10k", "kinetics600", "openvid"]
