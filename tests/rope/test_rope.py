"""rope beyond the generic suite: packed projections, positions, tables, results in ``out``."""

import math

import pytest
import torch

from emu3_kernels import rope, rope_tables
from emu3_kernels.ops.rope.cases import make_rope
from emu3_kernels.testing.suite import at_level, backends, check_call, runnable

BACKENDS = [*backends("rope"), "reference"]


def call(backend, *args, **settings):
    name, level = at_level(backend)
    with level:
        return rope(*args, **settings, backend=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_a_packed_projection_are_rotated_without_a_copy(backend, dtype):
    qkv = torch.randn(2, 5, 4 + 2 + 2, 128).to(runnable(backend, dtype))
    q, k, _ = qkv.split((4, 2, 2), dim=2)
    tables = rope_tables(8, 128)
    with torch.profiler.profile() as profile:
        actual = call(backend, q, k, *tables)
    expected = call(backend, q.contiguous(), k.contiguous(), *tables)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    if backend != "reference":
        ran = {event.key for event in profile.key_averages()}
        # Triton's interpreter itself copies every tensor of a launch with copy_.
        copies = {"aten::contiguous", "aten::clone"}
        if backend != "triton":
            copies |= {"aten::copy_"}
        assert not ran & copies, ran


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_may_be_outside_tokens_in_memory(backend):
    """The layout of SDPA: [B, H, T, K]."""
    q, k = torch.randn(2, 3, 5, 64), torch.randn(2, 1, 5, 64)
    tables = rope_tables(8, 64)
    actual = call(backend, q.transpose(1, 2), k.transpose(1, 2), *tables)
    expected = call(
        backend, q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), *tables
    )
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_score_depends_on_the_distance_alone(backend):
    q, k = (
        torch.randn(1, 1, 1, 64).expand(1, 9, 1, 64),
        torch.randn(1, 1, 1, 64).expand(1, 9, 1, 64),
    )
    positions = torch.arange(100, 109)[None]
    q, k = call(backend, q, k, *rope_tables(128, 64), positions)
    scores = q[0, :, 0] @ k[0, :, 0].T
    for distance in range(9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [-1, 8])
def test_positions_outside_the_tables_raise(backend, position):
    inputs = make_rope(
        batch=2,
        tokens=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        dtype=torch.float32,
        device="cpu",
    )
    inputs["positions"] = torch.tensor([[0, 1, 2], [0, 1, position]])
    q, k, cos, sin, positions = inputs.values()
    with pytest.raises(ValueError, match=r"rope: positions must lie in \[0, 8\), got"):
        call(backend, q, k, cos, sin, positions)
    with pytest.raises(ValueError, match=r"rope: positions must lie in \[0, 2\), got 0 … 2"):
        call(backend, q, k, cos[:2], sin[:2])


def make_heads(dtype):
    """Views of a packed projection, the tables and the positions of its tokens."""
    heads = torch.randn(2, 5, 4 + 2 + 2, 70).to(dtype).split((4, 2, 2), dim=2)
    return *heads[:2], *rope_tables(16, 70), torch.randint(16, (2, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_receives_the_results(backend, dtype):
    q, k, *where = make_heads(runnable(backend, dtype))
    expected = call(backend, q, k, *where)
    packed = torch.full((2, 5, 8, 70), 7.0, dtype=q.dtype)
    out = packed.split((4, 2, 2), dim=2)
    actual = call(backend, q, k, *where, out=out[:2])
    assert all(a is o for a, o in zip(actual, out, strict=False))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert out[2].eq(7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_rotated_in_place(backend, dtype):
    q, k, *where = make_heads(runnable(backend, dtype))
    expected = call(backend, q, k, *where)
    call(backend, q, k, *where, out=(q, k))
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")])
@pytest.mark.parametrize("width", [64, 128, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_result_written_by_nontemporal_stores_is_the_same(backend, dtype, width):
    """Results beyond 16 MiB; heads of one, two and two and a half vectors of AVX-512."""
    tokens = 18 * 2**20 // (4 * width * dtype.itemsize)
    q, k = (torch.randn(1, tokens, heads, width).to(dtype) for heads in (4, 4))
    tables = rope_tables(tokens, width)
    rotated_q, rotated_k = call(backend, q, k, *tables)
    call(backend, q, k, *tables, out=(q, k))
    assert torch.equal(rotated_q, q)
    assert torch.equal(rotated_k, k)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rotating_in_place_compiles_as_one_graph(backend):
    q, k, *where = make_heads(torch.float32)
    expected = rope(q, k, *where, backend=backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def rotate(q, k):
        rope(q, k, *where, out=(q, k), backend=backend)

    rotate(q, k)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.skipif("cpu@base" not in BACKENDS, reason="the native library was not built")
def test_rope_out_of_the_library_is_registered_right():
    q, k, *where = make_heads(torch.float32)
    out = torch.empty_like(q), torch.empty_like(k)
    torch.library.opcheck(torch.ops.emu3_kernels.rope_out.default, (q, k, *where, *out))


def test_an_unusable_out_raises():
    q, k, tables = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 1, 8), rope_tables(4, 8)
    with pytest.raises(ValueError, match=r"rope: out must be like q and k, got \(1, 2, 1, 8\)"):
        rope(q, k, *tables, out=(k, k))
    with pytest.raises(ValueError, match=r"out must be like q and k, got .* torch\.float64"):
        rope(q, k, *tables, out=(q, k.double()))
    with pytest.raises(ValueError, match="out for q must have unit stride in K"):
        rope(q, k, *tables, out=(q.mT.contiguous().mT, k))
    with pytest.raises(ValueError, match=r"out for k must have .* not be expanded"):
        rope(q, k, *tables, out=(q, torch.empty(1, 1, 1, 8).expand(1, 2, 1, 8)))
    with pytest.raises(ValueError, match="rope: out has no gradient"):
        rope(q.requires_grad_(), k, *tables, out=(q, k))
    with torch.no_grad():
        rope(q, k, *tables, out=(q, k))


@pytest.mark.skipif("cpu@base" not in BACKENDS, reason="the native library was not built")
def test_the_cpu_kernel_checks_positions_itself():
    q, cos = torch.randn(1, 1, 1, 8), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"rope: positions must lie in \[0, 4\), got 4"):
        torch.ops.emu3_kernels.rope(q, q, cos, cos, torch.tensor([[4]]), False)


def test_the_tables_are_right_at_the_last_position():
    """In float32 the angle itself would be off by 0.004 there."""
    cos, sin = rope_tables(131_072, 128)
    for i in (0, 1, 63):
        angle = 131_071 * 1e6 ** (-2 * i / 128)
        assert cos[-1, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert sin[-1, i].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_bad_arguments_raise():
    q, k, (cos, sin) = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 1, 8), rope_tables(4, 8)
    with pytest.raises(ValueError, match=r"rope: q must be \[B, T, H, K\]"):
        rope(q, k[..., :6], cos, sin)
    with pytest.raises(ValueError, match="rope: q must be"):
        rope(q, k.double(), cos, sin)
    with pytest.raises(ValueError, match=r"alike, \[max_T, 4\]"):
        rope(q, k, cos[:, :3], sin[:, :3])
    with pytest.raises(TypeError, match="rope: cos must be float32 or float64"):
        rope(q, k, cos.bfloat16(), sin.bfloat16())
    with pytest.raises(TypeError, match="rope: positions must be int64"):
        rope(q, k, cos, sin, torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"rope: positions must be \(1, 2\)"):
        rope(q, k, cos, sin, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="even, got 7"):
        rope(q[..., :7], k[..., :7], cos, sin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_wider_than_one_pass_over_the_tables(backend):
    """The CPU keeps cosines and sines of 64 pairs of vectors: 2,048 elements of half a head."""
    size = {"batch": 1, "tokens": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4166}
    check_call("rope", backend, size, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_heads_whose_rotation_fits_in_registers(backend, head_dim):
    """Half a head is two pairs of vectors at base, AVX2 and AVX-512: a loop of its own."""
    size = {"batch": 1, "tokens": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": head_dim}
    check_call("rope", backend, size, torch.float32)
