"""The switch for bfloat16 models on CPUs without AVX-512: its effects, and its limits."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emu3_kernels.modules import Conv3x3, speed_up_bfloat16
from emu3_kernels.runtime import gemm
from emu3_kernels.testing.budget import assert_as_accurate


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    monkeypatch.setattr(gemm, "SLOW_IN_BFLOAT16", True)


class Doubling(nn.Module):
    """Calls functions of PyTorch itself, through class attributes."""

    linear = staticmethod(F.linear)
    conv_transpose2d = staticmethod(F.conv_transpose2d)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, 2, 2))

    def forward(self, x):
        x = self.conv_transpose2d(x, self.weight, stride=2)
        return self.linear(x.movedim(1, -1), self.weight[..., 0, 0])


def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), Doubling(), nn.Linear(6, 5)
    return nn.Sequential(*layers).bfloat16()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_every_gemm_is_float32_or_ours(monkeypatch):
    plain, fast = model(), speed_up_bfloat16(model())
    low, exact = plain(X).detach(), model().double()(X.double()).detach()
    ran, matmul = [], gemm.matmul
    monkeypatch.setattr(gemm, "matmul", lambda *args: ran.append(1) or matmul(*args))
    assert_as_accurate("y", fast(X).detach(), low, exact)
    assert len(ran) == 2
    conv, (weight, bias) = fast[0], (p.float() for p in plain[0].parameters())
    assert conv(X).equal(F.conv2d(X.float(), weight, bias).bfloat16())


def test_other_dtypes_run_as_before():
    plain, fast = model().float(), speed_up_bfloat16(model().float())
    assert fast(X.float()).equal(plain(X.float()))


def test_nothing_changes_where_pytorch_is_fast(monkeypatch):
    monkeypatch.setattr(gemm, "SLOW_IN_BFLOAT16", False)
    fast = model()
    before = [dict(vars(module)) for module in fast.modules()]
    assert speed_up_bfloat16(fast) is fast
    assert [vars(module) for module in fast.modules()] == before


def test_state_classes_and_other_modules_stay_as_they_are():
    plain = nn.Sequential(model(), Conv3x3(16, 64))
    before, untouched = (repr(plain), list(plain.state_dict())), type(plain[1])
    speed_up_bfloat16(plain)
    assert (repr(plain), list(plain.state_dict())) == before
    assert isinstance(plain[0][2], nn.Linear)
    assert type(plain[1]) is untouched


def test_the_kinds_may_be_named():
    fast = speed_up_bfloat16(model(), nn.Linear)
    assert [type(layer) in (nn.Conv2d, Doubling) for layer in fast] == [True, True, False]


def test_a_second_call_changes_nothing():
    fast = speed_up_bfloat16(model())
    y = fast(X)
    assert speed_up_bfloat16(fast)(X).equal(y)


def test_a_copy_computes_with_its_own_weights_and_a_pickle_as_its_class():
    fast = speed_up_bfloat16(model()[2])
    x = torch.ones(2, 6).bfloat16()
    for copied in (copy.copy, copy.deepcopy):
        other = copied(fast)
        other._parameters = {"weight": torch.zeros(5, 6).bfloat16(), "bias": fast.bias}
        assert other(x).equal(fast.bias.expand(2, 5))
        assert type(other) is type(fast) is not nn.Linear
    again = pickle.loads(pickle.dumps(fast))
    assert type(again) is nn.Linear
    torch.testing.assert_close(again(x), fast(x))


def test_a_forward_pass_that_others_replaced_raises():
    replaced = model()
    replaced[2].forward = lambda x: x
    with pytest.raises(ValueError, match=r"^speed_up_bfloat16: 2\.forward must be its class's own"):
        speed_up_bfloat16(replaced)
    assert type(replaced[0]) is nn.Conv2d
