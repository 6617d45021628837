"""What inference keeps of parameters, and when it is computed again."""

import copy
import pickle

import torch
from torch import nn

from emu3_kernels.modules.prepared import Prepared

COUNTED = []


def double(weight, *, factor=2):
    COUNTED.append(factor)
    return factor * weight


def calls(*arguments, prepared, **settings):
    COUNTED.clear()
    result = prepared(*arguments, **settings)
    return len(COUNTED), result


@torch.no_grad()
def test_a_result_is_kept_until_a_parameter_changes():
    prepared, weight = Prepared(double), nn.Parameter(torch.ones(2))
    assert calls(weight, prepared=prepared)[0] == 1
    assert calls(weight, prepared=prepared)[0] == 0
    weight.add_(1)
    count, result = calls(weight, prepared=prepared)
    assert (count, result.tolist()) == (1, [4, 4])
    assert calls(weight, prepared=prepared, factor=3)[1].tolist() == [6, 6]
    assert calls(weight.clone(), prepared=prepared, factor=3)[0] == 1


@torch.no_grad()
def test_a_module_that_moves_computes_anew():
    """``module.to`` gives a parameter another storage, and no other version."""
    prepared, layer = Prepared(double), nn.Linear(2, 2)
    prepared(layer.weight)
    layer.to(torch.float64)
    assert calls(layer.weight, prepared=prepared)[1].dtype == torch.float64


def test_with_gradients_the_function_is_called_each_time():
    prepared, weight = Prepared(double), nn.Parameter(torch.ones(2))
    with torch.no_grad():
        prepared(weight)
    assert calls(weight, prepared=prepared)[1].requires_grad


@torch.no_grad()
def test_a_copy_keeps_nothing():
    prepared, weight = Prepared(double), nn.Parameter(torch.ones(2))
    prepared(weight)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert calls(weight, prepared=other)[0] == 1


def test_inference_tensors_have_no_version_and_are_not_kept():
    prepared = Prepared(double)
    with torch.inference_mode():
        weight = torch.ones(2)
        prepared(weight)
        assert calls(weight, prepared=prepared)[0] == 1
