"""A language model's ops as modules: the op's own result, and parameters under the usual names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import emu3_kernels
from emu3_kernels import modules
from emu3_kernels.modules import language


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (modules.RMSNorm(8), nn.RMSNorm(8)),
        (modules.AddRMSNorm(8), nn.RMSNorm(8)),
        (modules.LinearCrossEntropy(8, 40), nn.Linear(8, 40, bias=False)),
        (modules.SwiGLU(), nn.SiLU()),
        (modules.RotaryEmbedding(16, 8), nn.Identity()),
        (modules.CrossEntropy(), nn.CrossEntropyLoss()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_the_state_is_that_of_the_usual_module(ours, theirs):
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_norms_use_their_weight_and_eps():
    x, residual, weight = draw(3, 8), draw(3, 8), draw(8)
    norm, add_norm = modules.RMSNorm(8, eps=0.5), modules.AddRMSNorm(8, eps=0.5)
    for module in (norm, add_norm):
        nn.init.constant_(module.weight, 0.0)
        module.weight.data += weight
    assert norm(x).equal(emu3_kernels.rms_norm(x, weight, 0.5))
    y, summed = add_norm(x, residual)
    assert summed.equal(x + residual)
    assert y.equal(norm(x + residual))


def test_a_branch_is_dropped_in_training_alone():
    x, residual, module = draw(3, 8), draw(3, 8), modules.AddRMSNorm(8, dropout_p=0.5)
    torch.manual_seed(0)
    _, summed = module(x, residual)
    torch.manual_seed(0)
    _, expected = emu3_kernels.add_rms_norm(x, residual, module.weight, dropout_p=0.5)
    assert summed.equal(expected)
    assert not summed.equal(x + residual)
    assert module.eval()(x, residual)[1].equal(x + residual)


def test_the_activation_is_the_op():
    gate, up = draw(3, 8), draw(3, 8)
    assert modules.SwiGLU()(gate, up).equal(emu3_kernels.swiglu(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_stay_float32_when_the_module_is_cast(dtype):
    """Tables rounded to bfloat16 would turn position 1,001 into position 1,000."""
    rotary = modules.RotaryEmbedding(16, 8, theta=100.0).to(dtype)
    q, k = draw(2, 5, 4, 8).to(dtype), draw(2, 5, 2, 8).to(dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 15]])
    tables = emu3_kernels.rope_tables(16, 8, theta=100.0)
    for actual, expected in zip(
        rotary(q, k, positions), emu3_kernels.rope(q, k, *tables, positions), strict=True
    ):
        assert actual.equal(expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_pass_every_setting_on(reduction):
    settings = {"z_loss": 0.1, "label_smoothing": 0.2, "ignore_index": 3, "reduction": reduction}
    hidden, targets = draw(6, 8), torch.tensor([0, 3, 39, 5, 3, 7])
    weights, normalizer = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.5, 0.25]), 7.0
    head = modules.LinearCrossEntropy(8, 40, **settings)
    tokens = {"weights": weights, "normalizer": normalizer}
    expected = emu3_kernels.linear_cross_entropy(hidden, head.weight, targets, **tokens, **settings)
    assert head(hidden, targets, weights, normalizer).equal(expected)
    logits = F.linear(hidden, head.weight)
    expected = emu3_kernels.cross_entropy(logits, targets, **tokens, **settings)
    assert modules.CrossEntropy(**settings)(logits, targets, weights, normalizer).equal(expected)


def test_a_head_obeys_its_memory(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        language, "linear_cross_entropy", lambda *args, **settings: asked.update(settings)
    )
    modules.LinearCrossEntropy(8, 40, memory=123)(draw(6, 8), torch.zeros(6, dtype=torch.int64))
    assert asked["memory"] == 123


def test_an_unknown_setting_of_a_head_is_refused():
    with pytest.raises(TypeError, match="zloss"):
        modules.LinearCrossEntropy(8, 40, zloss=0.1)


def test_modules_go_through_the_compiler_in_one_piece():
    norm, activation = modules.RMSNorm(8), modules.SwiGLU()
    x = draw(3, 8)
    compiled = torch.compile(lambda x: activation(norm(x), x), fullgraph=True, backend="eager")
    assert compiled(x).equal(activation(norm(x), x))
