"""``train/main.py`` with torch's deterministic algorithms, so that two runs can be compared to the bit on CUDA too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from train.main import main_and_leave

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)  # the hashes say whether it was enough
    main_and_leave()
