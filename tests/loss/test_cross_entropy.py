"""What is special about cross_entropy: valid tokens, the normalizer, extreme logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from emu3_kernels import cross_entropy
from emu3_kernels.runtime.launch import INTERPRETED
from emu3_kernels.testing.suite import at_level, backends, runnable, value_and_gradients
from tests.loss.fake_gpu import empty, on_fake_gpu, taken_for_a_gpu

BACKENDS = [*backends("cross_entropy"), "reference"]
NAN = float("nan")


def call(backend, *args, **settings):
    name, level = at_level(backend)
    with level:
        return cross_entropy(*args, **settings, backend=name)


def gradient(backend, logits, *args, **settings):
    """Both passes inside the level."""
    name, level = at_level(backend)
    logits = logits.detach().requires_grad_()
    with level:
        loss = cross_entropy(logits, *args, **settings, backend=name)
        loss.sum().backward()
    return loss.detach(), logits.grad


def sample(num_tokens=6, num_classes=70):
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_tokens, num_classes, generator=random)
    return logits, torch.randint(num_classes, (num_tokens,), generator=random)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_weights_it_is_the_loss_of_pytorch(backend, reduction):
    logits, targets = sample()
    targets[2] = 7
    settings = {"label_smoothing": 0.1, "ignore_index": 7, "reduction": reduction}
    expected = F.cross_entropy(logits.double(), targets, **settings).float()
    torch.testing.assert_close(call(backend, logits, targets, **settings), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_over_no_token_is_zero_and_so_is_its_gradient(backend):
    logits, targets = sample()
    for no_token in ({"weights": torch.zeros(6)}, {"ignore_index": 0}):
        nothing = targets if "weights" in no_token else torch.zeros_like(targets)
        loss, dlogits = gradient(backend, logits, nothing, **no_token)
        assert loss == 0
        assert not dlogits.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_weight_zero_is_not_read(backend):
    logits, targets = sample()
    targets[1] = -100
    weights = torch.tensor([1.0, 1, 0, 0.5, 1, 1])
    expected = gradient(backend, logits, targets, weights=weights)
    logits[1], logits[2] = NAN, float("inf")
    actual = gradient(backend, logits, targets, weights=weights)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert not actual[1][1:3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_normalizer_is_used_as_given(backend):
    logits, targets = sample()
    weights = torch.rand(6)
    total = call(backend, logits, targets, weights=weights, reduction="sum")
    mean = call(backend, logits, targets, weights=weights)
    torch.testing.assert_close(mean, total / weights.sum())
    for seven in (7, 7.0, torch.tensor(7), torch.tensor([7.0], dtype=torch.float64)):
        for reduction in ("mean", "sum"):
            settings = {"weights": weights, "normalizer": seven, "reduction": reduction}
            assert torch.equal(call(backend, logits, targets, **settings), total / 7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_left_as_they_were(backend, dtype):
    logits, targets = sample()
    logits = logits.to(runnable(backend, dtype))
    before = logits.clone()
    gradient(backend, logits, targets)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_huge_logits_neither_overflow_nor_vanish(backend, dtype, shift):
    """Multiples of 256 are exact in both types, so the shift changes nothing but the scale."""
    dtype = runnable(backend, dtype)
    logits = 256 * torch.randint(-2, 3, (4, 3000), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(4)
    shifted = (logits + int(shift) // 1024 * 1024).to(dtype)
    loss, dlogits = gradient(backend, shifted, targets)
    exact = shifted.double().requires_grad_()
    F.cross_entropy(exact, targets).backward()
    torch.testing.assert_close(loss, F.cross_entropy(exact, targets).detach().float())
    torch.testing.assert_close(dlogits.float(), exact.grad.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rises", [True, False])
def test_the_largest_logit_may_be_in_any_block(backend, rises):
    """Random logits have it in the first of two blocks mostly, and never scale the sum again."""
    logits = torch.linspace(-9, 9, 6000).repeat(2, 1) * (1 if rises else -1)
    targets = torch.tensor([0, 5999])
    loss, dlogits = gradient(backend, logits, targets)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach().float())
    torch.testing.assert_close(dlogits, exact.grad.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_at_minus_infinity_have_probability_zero(backend):
    """A whole first block of them: no difference of infinities may appear."""
    logits, targets = sample(3, 5000)
    targets = targets % 200 + 4800
    expected, dexpected = gradient(backend, logits[:, 4500:], targets - 4500)
    logits[:, :4500] = -float("inf")
    loss, dlogits = gradient(backend, logits, targets)
    torch.testing.assert_close(loss, expected)
    assert not dlogits[:, :4500].any()
    torch.testing.assert_close(dlogits[:, 4500:], dexpected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [0, 2500, 2999])
def test_a_nan_anywhere_gives_a_nan(backend, at):
    logits, targets = sample(2, 3000)
    logits[0, at] = NAN
    loss, dlogits = gradient(backend, logits, targets, reduction="none")
    assert loss.isnan().tolist() == [True, False]
    assert dlogits.isnan().any(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("backend", [*backends("cross_entropy")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [1, 5, 8, 70, 9000])
def test_where_a_row_starts_changes_no_bit(backend, dtype, num_classes):
    """Amid NaN, at every distance from the 16 bytes of one access, in rows of odd strides."""
    logits, targets = sample(3, num_classes)
    logits = logits.to(runnable(backend, dtype))
    expected = gradient(backend, logits, targets, label_smoothing=0.1)
    for offset in range(8):
        for stride in (num_classes + 3, (num_classes + 15) // 8 * 8):
            memory = logits.new_full((offset + 3 * stride,), NAN)
            view = memory[offset:].view(3, stride)[:, :num_classes].copy_(logits)
            actual = gradient(backend, view, targets, label_smoothing=0.1)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", [*backends("cross_entropy")])
def test_a_class_is_added_in_one_order_wherever_its_row_starts(backend):
    """Three classes that share an accumulator, the last in a whole vector or in the tail."""
    logits, targets = torch.full((8, 9001), -float("inf")), torch.full((8,), 9000)
    logits[:, 808::4096] = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    expected = gradient(backend, logits, targets, reduction="none")
    for offset in range(4):
        memory = torch.empty(offset + logits.numel())
        view = memory[offset:].view(8, 9001).copy_(logits)
        actual = gradient(backend, view, targets, reduction="none")
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_tokens(backend):
    logits, targets = sample()
    wide = call(backend, logits.view(2, 3, 70), targets.view(2, 3), reduction="none")
    assert torch.equal(wide, call(backend, logits, targets, reduction="none").view(2, 3))
    assert torch.equal(call(backend, logits[0], targets[0]), call(backend, logits[:1], targets[:1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [-1, 70])
def test_a_target_that_is_no_class_is_refused(backend, target):
    logits, targets = sample()
    targets[4] = target
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, 70\) .*got {target}"):
        call(backend, logits, targets)


@pytest.mark.skipif("cpu@base" not in BACKENDS, reason="the native library was not built")
def test_the_native_kernel_checks_targets_that_a_traced_call_could_not():
    logits, one = torch.randn(1, 4), torch.ones(1)
    with pytest.raises(RuntimeError, match=r"cross_entropy: targets must lie in \[0, 4\), got 4"):
        torch.ops.emu3_kernels.cross_entropy_forward(logits, torch.tensor([4]), one, 0.0, 0.0)


def test_bad_arguments_are_named():
    logits, targets = sample()
    weights = torch.ones(6)
    with pytest.raises(TypeError, match="cross_entropy: targets must be int64"):
        cross_entropy(logits, targets.int())
    with pytest.raises(ValueError, match=r"cross_entropy: targets must have shape \(6,\)"):
        cross_entropy(logits, targets[:5])
    with pytest.raises(TypeError, match="cross_entropy: logits must be floating point"):
        cross_entropy(logits.long(), targets)
    with pytest.raises(ValueError, match="weights must share shape and device with targets"):
        cross_entropy(logits, targets, weights=weights[:5])
    for name in ("weights", "normalizer", "z_loss", "label_smoothing"):
        varied = torch.ones(6 if name == "weights" else (), requires_grad=True)
        with pytest.raises(ValueError, match=f"{name} is a constant"):
            cross_entropy(logits, targets, **{name: varied})
    with pytest.raises(ValueError, match="normalizer must hold one number"):
        cross_entropy(logits, targets, normalizer=torch.ones(2))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'max'"):
        cross_entropy(logits, targets, reduction="max")
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 2"):
        cross_entropy(logits, targets, label_smoothing=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_that_is_no_number_does_not_reach_ignored_tokens(backend, reduction):
    logits, targets = torch.randn(3, 5, requires_grad=True), torch.tensor([1, -100, 2])
    weights = torch.tensor([1.0, 1.0, 0.0])
    name, level = at_level(backend)
    with level:
        loss = cross_entropy(logits, targets, weights=weights, reduction=reduction, backend=name)
        (loss.sum() * NAN).backward()
    assert logits.grad[0].isnan().all()
    assert not logits.grad[1:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_may_be_as_low_as_numbers_go(backend):
    logits = torch.full((2, 3), torch.finfo(torch.float32).min)
    loss = call(backend, logits, torch.tensor([0, 1]))
    assert loss <= torch.tensor(3.0).log() + 1e-6  # beside them it is lost
    assert loss >= 0


@pytest.mark.parametrize("normalizer", [0, 0.0, torch.tensor(0.0)])
def test_over_no_token_a_normalizer_of_zero_divides_nothing(normalizer):
    logits, none = torch.randn(2, 5), torch.full((2,), -100)
    assert cross_entropy(logits, none, normalizer=normalizer) == 0


def test_no_class_at_all_is_fine_without_a_valid_token():
    assert cross_entropy(torch.zeros(2, 3, 0), torch.full((2, 3), -100)) == 0


def test_on_a_gpu_it_takes_three_launches_and_one_backward():
    """The sums, the reduction and the check of the targets: no small kernels of PyTorch."""
    with on_fake_gpu() as recorded:
        logits = empty(8, 184_622, requires_grad=True)
        targets, weights = empty(8, dtype=torch.int64), empty(8, dtype=torch.float32)
        loss = cross_entropy(logits, targets, weights=weights, normalizer=7)
        forward = ["cross_entropy_fwd_kernel", "cross_entropy_reduce_kernel", "_assert_async"]
        assert recorded.launches == forward
        recorded.launches.clear()
        torch.autograd.grad(loss, logits, empty(dtype=torch.float32))
        assert recorded.launches == ["cross_entropy_bwd_kernel"]


@pytest.mark.skipif(not INTERPRETED, reason="a failed assertion would end the GPU's process")
@pytest.mark.parametrize("target", [-1, 70])
def test_the_kernels_check_the_targets_on_a_gpu(target):
    logits, targets = sample()
    targets[0], targets[1] = -100, target
    with taken_for_a_gpu(), pytest.raises(RuntimeError, match=r"targets must lie in \[0, 70\)"):
        cross_entropy(logits, targets, backend="triton")
    targets[1] = 69
    with taken_for_a_gpu():
        cross_entropy(logits, targets, backend="triton")


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on a CPU interpreted alone")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("offset", [0, 3])
def test_triton_compiles_as_one_graph(reduction, offset):
    torch.compiler.reset()
    logits, targets = sample(3)
    logits = torch.cat([torch.zeros(offset), logits.flatten()])[offset:].view(logits.shape)
    inputs = {"logits": logits, "targets": targets, "weights": torch.rand(3)}
    call = partial(cross_entropy, backend="triton", reduction=reduction, z_loss=0.1)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients("cross_entropy", call, inputs)
    for name, value in value_and_gradients("cross_entropy", compiled, inputs).items():
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), call(**inputs))
