"""rope_append beyond the generic suite: writes into caches at slots that differ from positions."""

import pytest
import torch

from emu3_kernels import rope, rope_append, rope_tables
from emu3_kernels.testing.launches import all_launches
from emu3_kernels.testing.suite import at_level, backends, runnable

BACKENDS = [*backends("rope_append"), "reference"]
TABLES = rope_tables(16, 70)


def call(backend, *args):
    name, level = at_level(backend)
    with level:
        return rope_append(*args, backend=name)


def make_heads(dtype=torch.float32, batch=2, tokens=3):
    """Views of a packed projection: four query heads, two KV heads."""
    return torch.randn(batch, tokens, 8, 70).to(dtype).split((4, 2, 2), dim=2)


def make_caches(dtype=torch.float32, batch=2):
    return torch.randn(2, batch, 9, 2, 70).to(dtype)


def appended(q, k, v, caches, slots, positions):
    """Two separate steps, one token at a time."""
    q, k = rope(q, k, *TABLES, positions, backend="reference")
    caches = caches.clone()
    for row in range(slots.shape[0]):
        for token in range(slots.shape[1]):
            caches[0, row, slots[row, token]] = k[row, token]
            caches[1, row, slots[row, token]] = v[row, token]
    return q, caches


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_continues_at_its_own_length(backend):
    heads, caches = make_heads(tokens=1), make_caches()
    slots = torch.tensor([[5], [2]])
    expected = appended(*heads, caches, slots, slots)
    q = call(backend, *heads, *TABLES, *caches, slots)
    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(caches, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_shifts_the_slots_and_not_the_positions(backend):
    heads, caches = make_heads(), make_caches()
    slots = torch.arange(4, 7).expand(2, 3)
    positions = slots - torch.tensor([[4], [1]])
    expected = appended(*heads, caches, slots, positions)
    q = call(backend, *heads, *TABLES, *caches, slots, positions)
    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(caches, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_slot_is_written_and_values_are_copied_bit_for_bit(backend, dtype):
    dtype = runnable(backend, dtype)
    (q, k, v), caches = make_heads(dtype), make_caches(dtype)
    v[0, 0, 0, 0], v[0, 0, 1, -1] = torch.finfo(dtype).tiny / 2, torch.inf  # a subnormal number
    before, slots = caches.clone(), torch.tensor([[8, 0, 3], [1, 2, 3]])
    call(backend, q, k, v, *TABLES, *caches, slots)
    row = torch.arange(2)[:, None]
    assert torch.equal(caches[1][row, slots], v)
    caches[:, row, slots] = before[:, row, slots]
    assert torch.equal(caches, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_may_be_views_of_one_layer_with_heads_outside_slots(backend):
    """[layers, 2, B, KV, S, K], as for an attention with heads first; K has unit stride."""
    heads, everything = make_heads(), torch.randn(3, 2, 2, 2, 20, 70)
    caches = everything[1, ..., ::2, :].transpose(2, 3)
    before, slots = everything.clone(), torch.tensor([[8, 0, 3], [1, 2, 3]])
    expected = appended(*heads, caches, slots, slots)
    q = call(backend, *heads, *TABLES, *caches, slots)
    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(caches, expected[1])
    caches.copy_(before[1, ..., ::2, :].transpose(2, 3))
    assert torch.equal(everything, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_of_one_pool_are_the_slots_of_a_single_row(backend):
    q, k, v = (x.reshape(1, 6, -1, 70) for x in make_heads())
    pool = make_caches(batch=4)  # four pages of nine slots
    slots, positions = torch.tensor([[7, 8, 27, 35, 18, 0]]), torch.tensor([[7, 8, 9, 0, 1, 2]])
    caches = pool.view(2, 1, 36, 2, 70)
    expected = appended(q, k, v, caches, slots, positions)
    call(backend, q, k, v, *TABLES, *caches, slots, positions)
    torch.testing.assert_close(pool, expected[1].view_as(pool))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_nothing_is_copied_on_the_way_into_the_caches(backend):
    heads, caches = make_heads(), make_caches()
    slots = torch.tensor([[8, 0, 3], [1, 2, 3]])
    with torch.profiler.profile() as profile:
        call(backend, *heads, *TABLES, *caches, slots)
    ran = {event.key for event in profile.key_averages()}
    # Triton's interpreter itself copies every tensor of a launch with copy_.
    copies = {"aten::contiguous", "aten::clone", "aten::index_put_"}
    if backend != "triton":
        copies |= {"aten::copy_"}
    assert not ran & copies, ran


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", [-1, 9])
def test_slots_outside_the_cache_raise_before_any_write(backend, outside):
    heads, caches = make_heads(), make_caches()
    before, slots = caches.clone(), torch.tensor([[0, 1, 2], [0, 1, outside]])
    with pytest.raises(ValueError, match=r"rope_append: slots must lie in \[0, 9\), got"):
        call(backend, *heads, *TABLES, *caches, slots, slots.clamp(0, 8))
    assert torch.equal(caches, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", [-1, 16])
def test_positions_outside_the_tables_raise_before_any_write(backend, outside):
    heads, caches = make_heads(), make_caches()
    before, positions = caches.clone(), torch.tensor([[0, 1, 2], [0, 1, outside]])
    with pytest.raises(ValueError, match=r"rope_append: positions must lie in \[0, 16\), got"):
        call(backend, *heads, *TABLES, *caches, positions.clamp(0, 8), positions)
    assert torch.equal(caches, before)


def test_indices_that_the_caller_guarantees_take_no_launch():
    heads, caches, slots = make_heads(), make_caches(), torch.arange(3).expand(2, 3)
    with all_launches() as launches:
        rope_append(*heads, *TABLES, *caches, slots, check_indices=False, backend="triton")
    assert launches == ["rope_append_kernel"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_decoding_loop_compiles_once(backend):
    heads, caches = make_heads(tokens=1), make_caches()
    expected = caches.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, keys, values, slots):
        return rope_append(q, k, v, *TABLES, keys, values, slots, backend=backend)

    torch.compiler.reset()
    for length in range(9):
        slots = torch.full((2, 1), length)
        with torch._dynamo.config.patch(error_on_recompile=length > 0):
            q = step(*heads, *caches, slots)
        assert torch.equal(q, call(backend, *heads, *TABLES, *expected, slots))
    assert torch.equal(caches, expected)


def test_a_call_that_needs_a_gradient_raises():
    (q, k, v), caches = make_heads(), make_caches()
    slots = torch.zeros(2, 3, dtype=torch.int64)
    for leaf in (q, k, v):
        inputs = [x.clone().requires_grad_() if x is leaf else x for x in (q, k, v)]
        with pytest.raises(ValueError, match=r"rope_append: it has no gradient.*no_grad"):
            rope_append(*inputs, *TABLES, *caches, slots)
        with torch.no_grad():
            rope_append(*inputs, *TABLES, *caches, slots)
    with pytest.raises(ValueError, match="rope_append: it has no gradient"):
        rope_append(q, k, v, *TABLES, caches[0], caches[1].clone().requires_grad_(), slots)


def test_bad_arguments_raise():
    (q, k, v), (keys, values) = make_heads(), make_caches()
    slots = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rope_append: q must be \[B, T, H, K\] and k"):
        rope_append(q, k[:, :2], v[:, :2], *TABLES, keys, values, slots)
    for other in (v[:, :2], v[:, :, :1], v.bfloat16()):
        with pytest.raises(ValueError, match="k and v must be alike"):
            rope_append(q, k, other, *TABLES, keys, values, slots)
    alike = r"key_cache and value_cache \[2, S, 2, 70\] torch\.float32 on cpu, got"
    for caches in (
        (keys.bfloat16(), values),
        (keys, values.bfloat16()),
        (keys.bfloat16(), values.bfloat16()),
        (keys[:1], values[:1]),
        (keys, values[:1]),
        (keys, values[:, :8]),
        (keys[:, :, :1], values[:, :, :1]),
        (keys[..., :2], values[..., :2]),
        (keys[0], values[0]),
    ):
        with pytest.raises(ValueError, match=alike):
            rope_append(q, k, v, *TABLES, *caches, slots)
    with pytest.raises(ValueError, match=r"key_cache must .* not be expanded"):
        rope_append(q, k, v, *TABLES, keys[:1].expand(2, -1, -1, -1), values, slots)
    with pytest.raises(TypeError, match="rope_append: slots must be int64"):
        rope_append(q, k, v, *TABLES, keys, values, slots.int())
    with pytest.raises(ValueError, match=r"rope_append: positions must be \(2, 3\)"):
        rope_append(q, k, v, *TABLES, keys, values, slots, slots[:1])
    with pytest.raises(ValueError, match=r"alike, \[max_T, 35\]"):
        rope_append(q, k, v, *rope_tables(16, 72), keys, values, slots)
