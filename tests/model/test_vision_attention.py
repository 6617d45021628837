"""The attention of the tokenizer on a GPU, by GEMMs, checked on the CPU."""

import torch
import torch.nn.functional as F

from emu3.vision import blocks
from emu3_kernels.testing.budget import assert_as_accurate


def test_attention_by_gemms_is_as_accurate_as_pytorch_s(monkeypatch):
    """GEMMs that write float32 exist on a GPU alone."""
    monkeypatch.setattr(blocks, "_scores", lambda q, k: q.float() @ k.float().mT)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 96, generator=random).bfloat16() for _ in range(3))
    q *= 3  # scores that bfloat16 would round by a tenth
    actual = blocks._attend_by_gemms(q, k, v)
    low = F.scaled_dot_product_attention(q, k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_as_accurate("attended", actual, low, exact)


def test_a_cpu_and_training_attend_by_the_op():
    q = torch.empty(1, 4, 8, dtype=torch.bfloat16)
    assert not blocks._can_hold_scores(q)
    with torch.no_grad():
        assert not blocks._can_hold_scores(q)
