"""decode_attention under a mask of the new tokens: each attends to its ancestors in a tree."""

import pytest
import torch

from emu3_kernels import decode_attention
from emu3_kernels.ops.attention.cases import random_trees
from emu3_kernels.testing.suite import at_level, backends, cases

CASES = cases("decode_attention")
BACKENDS = [*(b for b in backends("decode_attention") if b != "cuda"), "reference"]
NEW = [1, 15, 16, 17, 63, 64]


def call(backend, inputs):
    name, level = at_level(backend)
    with level:
        return decode_attention(**inputs, backend=name)


def make(new, **size):
    stated = {"batch": 2, "capacity": new + 70, "heads": 4, "groups": 2, "width": 64}
    stated["lengths"] = [new + 70, new + 1]
    return CASES.make(**stated | size, new=new, tree=True, dtype=torch.float32, device="cpu")


def paths(words):
    """Yield, for each new token of a row, the tokens to which it attends, itself the last."""
    for word in words.tolist():
        yield [j for j in range(len(words)) if word >> j & 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("new", [2, 17, 64])
def test_a_path_of_the_tree_is_what_it_is_when_decoded_alone(backend, new):
    """Its keys moved together, as if the tokens beside it had never been."""
    inputs = make(new)
    together = call(backend, inputs)
    for row, length in enumerate(inputs["lengths"].tolist()):
        prefix = length - new
        for path in list(paths(inputs["mask"][row]))[:: max(new // 8, 1)]:
            kept = [*range(prefix), *(prefix + j for j in path)]
            alone = {
                "q": inputs["q"][row, path][None],
                "k_cache": inputs["k_cache"][row, kept][None],
                "v_cache": inputs["v_cache"][row, kept][None],
                "lengths": torch.tensor([len(kept)], dtype=torch.int32),
                "scale": inputs["scale"],
            }
            torch.testing.assert_close(call(backend, alone)[0], together[row, path])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("new", NEW)
def test_causal_words_are_the_default(backend, new):
    """Bit 63 of the last of 64 words is the sign."""
    inputs = make(new)
    words = (torch.ones(new, dtype=torch.int64) << torch.arange(new)) * 2 - 1
    causal = inputs | {"mask": words.expand(2, -1)}
    assert torch.equal(call(backend, causal), call(backend, inputs | {"mask": None}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_without_a_token_are_ignored(backend):
    inputs = make(5)
    beyond = inputs | {"mask": inputs["mask"] | -(1 << 5)}
    assert torch.equal(call(backend, beyond), call(backend, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_bits_attends_to_the_keys_before_the_new_ones_alone(backend):
    inputs = make(6, lengths=[76, 6])
    inputs["mask"][:, 2] = 0
    out = call(backend, inputs)
    before = inputs | {"q": inputs["q"][:, 2:3], "lengths": inputs["lengths"] - 6, "mask": None}
    torch.testing.assert_close(out[:, 2:3], call(backend, before))
    assert out[1, 2].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_may_be_strided(backend):
    inputs = make(9)
    strided = inputs | {"mask": inputs["mask"].repeat_interleave(2, dim=1)[:, ::2]}
    assert torch.equal(call(backend, strided), call(backend, inputs))


def test_words_of_a_tree_are_those_of_its_parents_and_a_bit():
    words = random_trees(3, 64, torch.Generator().manual_seed(1))
    for row in words:
        for i, path in enumerate(paths(row)):
            assert path[0] == 0
            assert path[-1] == i
            assert len(path) == 1 or list(paths(row))[path[-2]] == path[:-1]
