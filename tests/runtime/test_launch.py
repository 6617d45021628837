"""Launches on the device of their tensors, of which there may be several: without a GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from emu3_kernels.runtime import launch


class OnGpu(SimpleNamespace):
    """A tensor as a launch sees it."""

    is_cuda = True

    def get_device(self):
        return self.index

    @property
    def device(self):
        return torch.device("cuda", self.index)


@pytest.fixture
def gpus(monkeypatch):
    """Two unlike GPUs; the device in force is in ``current``, and ``asked`` lists questions."""
    state = SimpleNamespace(current=0, asked=[])
    kinds = {0: (32, 132), 1: (64, 304)}

    def properties(index):
        state.asked.append(index)
        warp_size, num_sms = kinds[index]
        return SimpleNamespace(
            warp_size=warp_size, multi_processor_count=num_sms, major=9, minor=index
        )

    @contextmanager
    def device(new):
        before, state.current = state.current, torch.device(new).index
        yield
        state.current = before

    monkeypatch.setattr(launch, "_gpus", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "device", device)
    return state


def test_each_gpu_is_described_once_by_its_own_properties(gpus):
    """The first GPU's multiprocessors were those of all."""
    for _ in range(2):
        assert launch.gpu_of(OnGpu(index=1)) == launch.Gpu(64, 304, capability=91)
        assert launch.gpu_of(OnGpu(index=0)) == launch.Gpu(32, 132, capability=90)
    assert gpus.asked == [1, 0]


def test_a_launch_runs_on_the_device_of_its_first_tensor(gpus):
    ran = []

    class Kernel:
        def run(self, *args, grid, warmup, **options):
            assert not warmup
            ran.append((gpus.current, grid, args, options))

    for index in (1, 0):
        x = OnGpu(index=index)
        launch.launch(Kernel(), (3,), x, 7, BLOCK=8)
        assert ran.pop() == (index, (3,), (x, 7), {"BLOCK": 8})
        launch.launch_planned(Kernel(), launch.plan_launch((3,), 7, BLOCK=8), x)
        assert ran.pop() == (index, (3,), (x, 7), {"BLOCK": 8})
    assert gpus.current == 0


def test_a_plan_is_computed_once_for_equal_arguments(monkeypatch):
    computed = []
    plan = launch.planned(lambda *args: computed.append(args))
    for shape in ((2, 3), (2, 3), (2, 4)):
        plan(shape, torch.float32)
    assert computed == [((2, 3), torch.float32), ((2, 4), torch.float32)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plan((2, 3), torch.float32)  # whose sizes may be symbols
    assert len(computed) == 3


def test_a_tensor_on_no_gpu_asks_none(gpus):
    assert launch.gpu_of(torch.ones(1)).num_sms == 4
    assert gpus.asked == []
