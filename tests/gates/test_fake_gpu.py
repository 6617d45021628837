"""The generic suite as a machine with a GPU sees it: which rows, on which device; no GPU needed."""

import torch

from emu3_kernels.ops import OPS
from emu3_kernels.testing import suite


def test_every_backend_is_checked_on_the_device_it_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda", "triton_gluon": "cuda"}
    listed = [(op, backend) for op in OPS for backend in suite.backends(op)]
    for _, backend in listed:
        assert suite.device_of(backend) == devices[backend.partition("@")[0]], backend
    dtypes = {dtype for _, backend, _, dtype in suite.calls() if backend == "triton"}
    assert not dtypes or dtypes == set(suite.DTYPES)
