import subprocess
import sys

import pytest
import torch

from flowception.training.hardware import GIB, find_peak, gpu_peak, peak_memory_gib

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
    ],
)
def test_peaks_match_the_data_sheets(name, tflops):
    peak = gpu_peak(name)
    assert peak.tflops == tflops
    assert name in peak.source


@pytest.mark.parametrize("name", ["NVIDIA L40", "Tesla V100-SXM2-16GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""])
def test_unknown_gpus_have_no_peak(name):
    assert gpu_peak(name) is None


def test_a_cpu_has_no_peak_unless_configured(monkeypatch):
    assert find_peak(None, "bf16", CPU) is None
    assert find_peak(0.5, "fp32", CPU) == (0.5, "logging.peak_tflops")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert find_peak(None, "bf16", torch.device("cuda", 0)).tflops == 989
    assert find_peak(None, "fp32", torch.device("cuda", 0)) is None  # the table is for bf16


MEASURE = """
import torch
from flowception.training.hardware import peak_memory_gib
before = peak_memory_gib(torch.device("cpu"))
block = torch.ones(64 * 2**20)  # 256 MiB, touched
del block
print(peak_memory_gib(torch.device("cpu")) - before)
"""


def test_peak_memory_includes_released_memory():
    grown = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    assert float(grown.stdout) * GIB == pytest.approx(256 * 2**20, rel=0.2)
    assert peak_memory_gib(CPU) > 0
