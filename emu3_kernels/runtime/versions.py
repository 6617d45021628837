"""The oldest versions that we support of the packages below us."""

import re
from importlib import import_module
from importlib.util import find_spec

import torch

OLDEST = {"torch": "2.11", "triton": "3.6"}
"""Of ``pyproject.toml``; the newest tested ones stand in README."""


def why_too_old(package: str) -> str | None:
    """Say that ``package`` is older than what we support; None if it is not, or not installed."""
    if package not in OLDEST or find_spec(package) is None:
        return None
    found = import_module(package).__version__
    if _numbers(found) >= _numbers(OLDEST[package]):
        return None
    return f"{package} must be {OLDEST[package]} or newer, got {found}"


def _numbers(version: str) -> tuple[int, ...]:
    """Return major and minor of ``2.11.0+cu130``."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


if reason := why_too_old(torch.__name__):
    raise ImportError(f"emu3_kernels: {reason}")
