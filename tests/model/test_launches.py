"""Launches of a decode step on a GPU, counted without one."""

import pytest
import torch

from emu3.cache import KeyValueCache, Tree
from emu3_kernels import use_backend
from emu3_kernels.testing.launches import all_launches
from tests.model.tiny import TINY, tiny_model

GEMMS = 4  # qkv, out, gate_up, down


@torch.no_grad()
def launches_of_a_step(num_layers: int, num_new: int, tree: Tree | None = None) -> list[str]:
    model = tiny_model(num_layers=num_layers)
    cache = KeyValueCache(model.settings, 2, 40, dtype=torch.float32)
    tokens = torch.ones(2, 5, dtype=torch.int64)
    with use_backend("triton"), all_launches() as launches:
        model(tokens, cache)
        model(tokens[:, :num_new], cache, tree=tree)  # which allocates what stays
        launches.clear()
        model(tokens[:, :num_new], cache, tree=tree)
    return launches


DRAFTS = torch.tensor([[0, 1, 1], [0, 1, 2]]), torch.tensor([[1, 3, 5], [1, 3, 7]])


@pytest.mark.parametrize(("num_new", "tree"), [(1, None), (2, None), (3, Tree(*DRAFTS))])
def test_a_layer_of_a_decode_step_takes_eight_launches_and_its_attention(num_new, tree):
    """It took fifteen: each layer checked its slots and added the lengths up."""
    one, three = (launches_of_a_step(layers, num_new, tree) for layers in (1, 3))
    layer = list(three)
    for name in one:
        layer.remove(name)
    attention = [name for name in layer if name.startswith("decode_attention")]
    others = sorted(set(layer) - set(attention))
    assert others == ["mm", "rms_norm_fwd_kernel", "rope_append_kernel", "swiglu_fwd_kernel"]
    assert layer.count("mm") == 2 * GEMMS
    assert len(layer) - len(attention) == 2 * 8
    assert len(attention) == 2


def test_slots_and_lengths_are_computed_once_for_all_layers():
    names = launches_of_a_step(3, 1)
    once = sorted(name for name in names if not name.endswith("_kernel") and name != "mm")
    assert once == ["_to_copy", "add", "add", "add_", "arange", "embedding"]


def test_prompt_lengths_outside_the_prompt_are_refused():
    """Lengths above the longest would let later slots leave the cache unchecked."""
    model = tiny_model()
    cache = KeyValueCache(TINY, 2, 40, dtype=torch.float32)
    for lengths in ([5, 6], [-1, 5]):
        with torch.no_grad(), pytest.raises(ValueError, match=r"must lie in \[0, 5\], got"):
            model(torch.ones(2, 5, dtype=torch.int64), cache, prompt_lengths=torch.tensor(lengths))


def test_positions_beyond_the_tables_are_refused_before_any_write():
    cache = KeyValueCache(TINY, 1, TINY.max_position_embeddings + 9, dtype=torch.float32)
    cache.longest = TINY.max_position_embeddings
    with pytest.raises(ValueError, match="129 positions exceed its capacity 128"):
        tiny_model()(torch.ones(1, 1, dtype=torch.int64), cache)
