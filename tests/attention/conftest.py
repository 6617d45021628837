"""Fixtures of the adapters of other libraries."""

import sys
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import pytest
import torch

from emu3_kernels.ops.attention import cudnn, optional, torch_flash
from tests.attention import library_fakes as fakes
from tests.attention.library_fakes import ALL, TRY


@pytest.fixture
def adapter(monkeypatch, forget):
    """Return an adapter that finds a fake of its library."""
    flash = ModuleType("flash_attn")
    flash.flash_attn_func = fakes.flash_attn_func
    flash.flash_attn_varlen_func = fakes.flash_attn_varlen_func
    ops, fmha = ModuleType("xformers.ops"), ModuleType("xformers.ops.fmha")
    ops.memory_efficient_attention = fakes.memory_efficient_attention
    bias = fmha.attn_bias = ModuleType("xformers.ops.fmha.attn_bias")
    bias.BlockDiagonalMask = fakes.BlockDiagonalMask
    bias.LowerTriangularFromBottomRightMask = fakes.LowerTriangularFromBottomRightMask
    for module in (flash, ops, fmha, bias, ModuleType("xformers")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cudnn, "cudnn_attention", fakes.cudnn_attention)
    monkeypatch.setattr(torch_flash, "flash_attention", fakes.torch_flash_attention)
    for name, module in ALL.items():
        monkeypatch.setattr(module, TRY[name], partial(try_on_cpu, getattr(module, TRY[name])))
    return ALL.get


def try_on_cpu(original, device):
    original(torch.device("cpu"))


@pytest.fixture
def forget():
    """Let a library be imported and tried anew, before the test and after it."""
    optional._failure.cache_clear()
    yield
    optional._failure.cache_clear()


@pytest.fixture
def deterministic():
    """Return what sets torch's deterministic mode for a block: 0 off, 1 warns, 2 on."""

    @contextmanager
    def mode(new: int):
        before = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode(new)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)

    return mode
