"""Which FlashAttention is used, among packages that share a name; fake packages are installed."""

import sys

import pytest
import torch

from flowception.errors import ConfigError, MissingDependencyError
from flowception.nn import flash


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Installs a module, given as path and source, where imports find it first."""

    def put(file, source=""):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        monkeypatch.delitem(sys.modules, name)
    flash.activate_fa3.cache_clear()
    yield put
    flash.activate_fa3.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]


FA2 = "def flash_attn_varlen_func(*arguments, deterministic): return (arguments, deterministic)"


@pytest.mark.parametrize("deterministic", [True, False])
def test_version_2_gets_boundaries_and_the_deterministic_flag(install, monkeypatch, deterministic):
    install("flash_attn/__init__.py", FA2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    arguments = ("q", "k", "v", "cu_q", "cu_k", 3, 4)
    assert flash.fa2_kernel()(*arguments) == (arguments, deterministic)
    flash.check_installed()


def test_version_4_under_the_same_name_is_rejected_with_a_remedy(install):
    install("flash_attn/cute/__init__.py")
    with pytest.raises(ConfigError, match="has only flash_attn.cute .FlashAttention-4.; pip install .*flash.*auto"):
        flash.fa2_kernel()
    with pytest.raises(ConfigError, match="FlashAttention-4"):
        flash.check_installed()


def test_a_missing_package_is_an_error_that_names_the_install_command(install):
    with pytest.raises(MissingDependencyError, match=r"pip install 'flowception\[flash\]'"):
        flash.check_installed()


@pytest.fixture
def hopper(monkeypatch):
    """A GPU as torch sees it, and the implementations that were activated."""
    activated = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", activated.append)
    return activated


def test_version_3_is_activated_in_torch_where_it_is_installed(install, hopper):
    assert not flash.activate_fa3()
    install("flash_attn_interface.py")
    flash.activate_fa3.cache_clear()
    assert [flash.activate_fa3() for _ in range(2)] == [True, True]
    assert hopper == ["FA3"]
    flash.check_installed()


def test_version_3_is_for_hopper_alone(install, hopper, monkeypatch):
    install("flash_attn_interface.py")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert not flash.activate_fa3()
    assert hopper == []


def test_a_version_3_that_torch_cannot_use_is_reported_and_skipped(install, hopper, monkeypatch, caplog):
    install("flash_attn_interface.py")

    def refuse(_):
        raise RuntimeError("no FA3 kernels")

    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", refuse)
    assert not flash.activate_fa3()
    assert "torch cannot use the installed FlashAttention-3 (no FA3 kernels)" in caplog.text
