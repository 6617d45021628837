"""Guidance, top-k and the draw itself."""

import math

import pytest
import torch

from emu3.sampling import apply_cfg, sample, top_k_logits


def test_guidance_cancels_the_two_log_softmaxes():
    """The official order takes log-softmax first; the sampled distribution is the same."""
    random = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 3, 50, dtype=torch.float64, generator=random)
    official = apply_cfg(cond.log_softmax(-1), uncond.log_softmax(-1), 3.0)
    torch.testing.assert_close(
        official.softmax(-1), apply_cfg(cond, uncond, 3.0).softmax(-1), rtol=1e-12, atol=0
    )


def test_guidance_of_one_is_the_condition_alone_and_of_zero_its_absence():
    cond, uncond = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 4.0]])
    assert apply_cfg(cond, uncond, 1.0).equal(cond)
    assert apply_cfg(cond, uncond, 0.0).equal(uncond)


def test_top_k_keeps_the_largest_where_they_stand():
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0]])
    assert top_k_logits(logits, 2).tolist() == [[-torch.inf, 5.0, -torch.inf, 4.0]]
    assert top_k_logits(logits, None) is logits
    assert top_k_logits(logits, 9) is logits


def test_samples_follow_the_softmax_of_the_kept_logits():
    """Chi-squared over 20,000 draws: 4 degrees of freedom, 18.5 is exceeded once in 1,000."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -3.0])
    count, kept = 20_000, top_k_logits(logits[None], 5)[0]
    sampled = sample(
        logits.expand(count, -1),
        top_k=5,
        temperature=0.7,
        generator=torch.Generator().manual_seed(0),
    )
    expected = count * torch.softmax(kept / 0.7, -1)
    seen = torch.bincount(sampled, minlength=6)
    assert seen[5] == 0
    assert ((seen - expected)[:5].square() / expected[:5]).sum() < 18.5


def test_top_one_is_greedy_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    chosen = sample(torch.tensor([[1.0, 3.0, 3.0]]), top_k=1, temperature=1, generator=generator)
    assert chosen.tolist() == [1]
    assert generator.get_state().equal(before)


@pytest.mark.parametrize(
    ("top_k", "temperature", "line"),
    [
        (0, 1.0, "top_k must be at least 1, got 0"),
        (4, 0.0, "temperature must be positive and finite, got 0"),
        (4, math.nan, "temperature must be positive and finite, got nan"),
        (4, math.inf, "temperature must be positive and finite, got inf"),
    ],
)
def test_meaningless_settings_are_refused(top_k, temperature, line):
    with pytest.raises(ValueError, match=line):
        sample(torch.zeros(1, 8), top_k=top_k, temperature=temperature, generator=None)


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -1.0])
def test_a_meaningless_guidance_is_refused(guidance):
    with pytest.raises(ValueError, match="guidance must be finite and not negative, got"):
        apply_cfg(torch.zeros(1, 8), torch.zeros(1, 8), guidance)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_the_coldest_draw_is_greedy(temperature):
    """The quotient overflowed, and the draw died of chances that were NaN."""
    logits = torch.tensor([[1.0, -70.0, 3.0, 2.9], [0.0, 500.0, -1.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    sampled = sample(logits, top_k=3, temperature=temperature, generator=generator)
    assert sampled.tolist() == [2, 1]


def test_the_strongest_guidance_still_leaves_chances():
    cond, uncond = torch.tensor([[2.0, -1.0, 9.0]]), torch.tensor([[0.5, 4.0, -3.0]])
    guided = apply_cfg(cond, uncond, 1e38)
    assert guided.isfinite().all()
    assert sample(guided, top_k=None, temperature=1.0, generator=None).tolist() == [2]


def test_a_draw_is_that_of_multinomial_without_its_checks():
    """It reads its probabilities from the host, for which a GPU is waited for at every token."""
    probs = torch.softmax(torch.randn(5, 300, generator=torch.Generator().manual_seed(1)), -1)
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
    for _ in range(20):
        sampled = sample(probs.log(), top_k=None, temperature=1.0, generator=ours)
        same = torch.softmax(probs.log() - probs.log().amax(-1, keepdim=True), -1)
        assert sampled.equal(torch.multinomial(same, 1, generator=theirs).squeeze(-1))
    assert ours.get_state().equal(theirs.get_state())
