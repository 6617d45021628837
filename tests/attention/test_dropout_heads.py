"""Dropout of the heads and sequences of a rank: those that the whole drops."""

import pytest
import torch

from emu3_kernels import HeadShard, attention
from emu3_kernels.testing.suite import at_level, backends

BACKENDS = [*(b for b in backends("attention") if b != "triton_gluon"), "reference"]
"""Gluon has no dropout."""
SEED = torch.tensor(2**62 + 7)


def value_and_gradients(q, k, v, dout, backend, heads=None, ids=None):
    name, level = at_level(backend)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dropout = {"dropout_p": 0.4, "seed": SEED, "dropout_heads": heads}
    with level:
        out = attention(*leaves, document_ids=ids, **dropout, backend=name)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_a_rank_drop_what_they_drop_in_the_whole(backend, with_documents):
    """The third and fourth of six heads, of the second and third of three sequences."""
    random = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(3, 35, n, 16, generator=random) for n in (6, 3, 3, 6))
    ids = (torch.arange(35) // 13).int().expand(3, 35) if with_documents else None
    whole = value_and_gradients(q, k, v, dout, backend, ids=ids)
    part = value_and_gradients(
        *(q[1:, :, 2:4], k[1:, :, 1:2], v[1:, :, 1:2], dout[1:, :, 2:4], backend),
        heads=HeadShard(num_heads=6, first=2, first_sequence=1),
        ids=None if ids is None else ids[1:],
    )
    for name, p, w in zip(("out", "dq", "dk", "dv"), part, whole, strict=True):
        own = w[1:, :, 2:4] if name in ("out", "dq") else w[1:, :, 1:2]
        torch.testing.assert_close(p, own, msg=lambda text, name=name: f"{name}: {text}")


def test_other_heads_drop_others():
    """So that the test above can fail."""
    q = torch.randn(1, 35, 2, 16, generator=torch.Generator().manual_seed(0))
    drops = {"dropout_p": 0.4, "seed": SEED}
    own = attention(q, q, q, **drops)
    for heads in (HeadShard(4, first=1), HeadShard(2, first_sequence=1)):
        assert not torch.allclose(attention(q, q, q, **drops, dropout_heads=heads), own)


@pytest.mark.parametrize("heads", [HeadShard(3, first=2), HeadShard(6, -1), HeadShard(6, 0, -1)])
def test_heads_that_are_not_there_raise(heads):
    q = torch.zeros(1, 4, 2, 16)
    with pytest.raises(ValueError, match="attention: dropout_heads must hold the 2 heads of q"):
        attention(q, q, q, dropout_heads=heads)
