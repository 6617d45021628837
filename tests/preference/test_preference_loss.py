"""preference_loss: TRL's numbers, the formulas and their gradients in float64, bad arguments."""

import pytest
import torch

from emu3_kernels import preference_loss

CHOSEN, REJECTED = (-10.5, -3.25, -7.0, -120.0), (-11.0, -2.5, -9.75, -80.0)
REFERENCE = (0.5, -0.5, 1.5, -10.0)
# Losses and gradients of the chosen sequences, printed by dpo_loss and cpo_loss of TRL 0.12.2.
TRL = {
    "dpo": (
        {"beta": 0.1},
        (0.6931471805599453, 0.7057253035255249, 0.6325990353171691, 3.048587351573742),
        (-0.05, -0.05062496744995104, -0.04687906266262438, -0.09525741268224333),
    ),
    "smoothed dpo": (
        {"beta": 0.5, "label_smoothing": 0.1},
        (0.6931471805599453, 0.7450990353171691, 0.49120067827651864, 13.500000305902274),
        (-0.2, -0.2156046866868781, -0.12432256766697286, -0.44999984704888657),
    ),
    "ipo": (
        {"kind": "ipo", "beta": 0.2},
        (6.25, 7.5625, 1.5625, 1056.25),
        (-5.0, -5.5, -2.5, -65.0),
    ),
    "simpo": (
        {"kind": "simpo", "beta": 2.0, "margin": 0.5, "label_smoothing": 0.05},
        (0.49907698418010665, 2.0269280110429726, 0.2567153484891181, 76.475),
        (-0.655081337596291, -1.6615941559557648, 0.08661429815143029, -1.9),
    ),
}


def pairs(dtype, num_pairs=None):
    if num_pairs is None:
        values = CHOSEN, REJECTED, REFERENCE
        chosen, rejected, reference = (torch.tensor(v, dtype=dtype) for v in values)
    else:
        random = torch.Generator().manual_seed(0)
        chosen, rejected, reference = (
            torch.randn(3, num_pairs, generator=random, dtype=torch.float64).mul(30).to(dtype)
        )
    return chosen.requires_grad_(), rejected.requires_grad_(), reference


def loss_of(settings, chosen, rejected, reference):
    if settings.get("kind") == "simpo":
        reference = None
    return preference_loss(chosen, rejected, reference, **settings)


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_those_of_trl(name):
    settings, losses, gradients = TRL[name]
    chosen, rejected, reference = pairs(torch.float64)
    loss = loss_of(settings, chosen, rejected, reference)
    loss.sum().backward()
    close = {"rtol": 1e-13, "atol": 1e-15}
    torch.testing.assert_close(loss.detach(), torch.tensor(losses, dtype=torch.float64), **close)
    expected = torch.tensor(gradients, dtype=torch.float64)
    torch.testing.assert_close(chosen.grad, expected, **close)
    assert torch.equal(rejected.grad, -chosen.grad)


@pytest.mark.parametrize("name", TRL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_lower_precision_are_computed_in_float32(name, dtype):
    settings = TRL[name][0]
    low = pairs(dtype, 1000)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in low]
    loss, expected = loss_of(settings, *low), loss_of(settings, *exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    loss.sum().backward()
    expected.sum().backward()
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(low[0].grad.double(), exact[0].grad, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("name", TRL)
def test_gradients_are_those_of_finite_differences(name):
    chosen, rejected, reference = pairs(torch.float64)
    settings = TRL[name][0]
    torch.autograd.gradcheck(lambda c, r: loss_of(settings, c, r, reference), (chosen, rejected))


def test_a_margin_of_dpo_asks_for_more():
    chosen, rejected, reference = pairs(torch.float64)
    moved = preference_loss(chosen, rejected, reference, beta=0.5, margin=2.0)
    expected = preference_loss(chosen, rejected, reference + 4.0, beta=0.5)
    torch.testing.assert_close(moved, expected)


def test_sequences_far_apart_give_finite_losses_and_gradients():
    chosen = torch.tensor([-1e4, 0.0], requires_grad=True)
    loss = preference_loss(chosen, chosen.detach().flip(0), torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [1000.0, 0.0]
    assert chosen.grad.tolist() == pytest.approx([-0.1, 0.0])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "kto"}, "kind must be one of dpo, ipo, simpo, got 'kto'"),
        ({"kind": "simpo"}, "simpo must be without a reference"),
        ({"reference": None}, "dpo must be with one"),
        ({"beta": 0.0}, r"beta must be above 0, got 0\.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0\.5\), got 0\.5"),
        ({"kind": "ipo", "margin": 1.0}, "ipo must be without margin and label_smoothing"),
        ({"rejected": torch.zeros(3)}, "rejected must share shape and device with chosen"),
        ({"reference": torch.zeros(2, requires_grad=True)}, "reference is a constant"),
    ],
)
def test_bad_arguments_raise(settings, told):
    given = {"chosen": torch.zeros(2), "rejected": torch.zeros(2), "reference": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"preference_loss: {told}"):
        preference_loss(**given | settings)


def test_whole_numbers_raise():
    with pytest.raises(TypeError, match="preference_loss: chosen must be floating point"):
        preference_loss(*torch.zeros(3, 2, dtype=torch.int64))
