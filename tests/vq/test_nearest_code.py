"""What is special about nearest_code: it is exact to the last bit, whatever the data."""

import pytest
import torch
from torch import nn

from emu3_kernels import CodeIndex, nearest_code
from emu3_kernels.ops.vq import cpu, reference
from emu3_kernels.runtime import library
from emu3_kernels.testing.suite import at_level, backends

CPU_LEVELS = [f"cpu@{level}" for level in library.cpu_levels()]
ALL = [*backends("nearest_code")]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def search(backend, z, codebook):
    name, level = at_level(backend)
    with level:
        return nearest_code(z, codebook, backend=name)


def adversaries():
    """Codebooks and latents on which a spatial search prunes little, or is misled."""
    z, codes = normal(1, 4, 2100), normal(2048, 4, seed=1)
    unit = codes / codes.norm(dim=1, keepdim=True)
    return {
        "normal": (z, codes),
        "codes within 1 / N": (z, (torch.rand(2048, 4) - 0.5) / 2048),
        "latents far outside": (1e4 * z, codes),
        "so far that all distances are equal": (1e8 * z, codes),
        "all distances overflow": (3e38 * z.sign(), codes),
        "all codes equal": (z, torch.full((2048, 4), 0.25)),
        "half of the codes equal": (z, torch.cat([codes[:1024], codes[:1].expand(1024, 4)])),
        "codes on a sphere around the latents": (1e-3 * z, unit),
        "codes on a line": (z, codes[:, :1].expand(2048, 4)),
        "codes in a plane": (z, codes * torch.tensor([1.0, 0, 1, 0])),
        "subnormal distances": (1e-22 * z, 1e-22 * codes),
        "huge and tiny coordinates": (z * torch.tensor([1e30, 1, 1e-30, 1])[:, None], codes * 1e15),
        "latents at the codes": (codes.T[None].contiguous(), codes),
    }


ADVERSARIES = adversaries()


@pytest.mark.parametrize("data", ADVERSARIES)
@pytest.mark.parametrize("backend", CPU_LEVELS)
def test_the_tree_finds_what_the_definition_does(backend, data):
    z, codes = ADVERSARIES[data]
    name, level = at_level(backend)
    with level:
        actual = nearest_code(z, CodeIndex(codes), backend=name)
    assert torch.equal(actual, reference.nearest_code(z, codes))


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 11, 32])
@pytest.mark.parametrize("backend", CPU_LEVELS)
def test_the_tree_at_every_dimension(backend, dim):
    """700 codes are 64 leaves of 10 or 11; 333 latents are 20 packets and a ragged one."""
    z, codes = normal(1, dim, 333), normal(700, dim, seed=1)
    codes = (8 * codes).round() / 8  # equal distances, equal coordinates where a leaf is cut
    name, level = at_level(backend)
    with level:
        actual = nearest_code(z, CodeIndex(codes), backend=name)
    assert torch.equal(actual, reference.nearest_code(z, codes))


@pytest.mark.parametrize("num_codes", [511, 512, 513, 4096, 4097, 9000])
@pytest.mark.parametrize("backend", CPU_LEVELS)
def test_the_tree_at_every_shape(backend, num_codes):
    """512 is the smallest tree, 4,097 the first of two clusters; 1, 15, 16, 17 fill a packet."""
    codes = normal(num_codes, 4)
    latents = [normal(1, 4, num_latents, seed=num_latents) for num_latents in (1, 15, 16, 17, 200)]
    name, level = at_level(backend)
    with level:
        index = CodeIndex(codes)
        actual = [nearest_code(z, index, backend=name) for z in latents]
    for z, found in zip(latents, actual, strict=True):
        assert torch.equal(found, reference.nearest_code(z, codes))


def test_float32_agrees_with_float64_but_for_ties_of_float32():
    z, codes = normal(1, 4, 768), normal(32768, 4, seed=1)
    actual = nearest_code(z, CodeIndex(codes))[0]
    exact = reference.nearest_code(z.double(), codes.double())[0]
    differ = (actual != exact).nonzero().squeeze(1)
    assert len(differ) < 4
    queries = z[0].T[differ]
    rounding = torch.finfo(torch.float32).eps
    near = (queries - codes[actual[differ]]).double().square().sum(1)
    nearest = (queries - codes[exact[differ]]).double().square().sum(1)
    assert ((near - nearest) <= 4 * rounding * nearest).all()


@pytest.mark.parametrize("backend", [*ALL, "reference"])
def test_a_tie_goes_to_the_lowest_code(backend):
    """Codes 1 and 3 are equally near the first latent, 2 and 4 are equal; the last is its own."""
    codes = torch.tensor([[9.0, 9], [1, 0], [0, 5], [-1, 0], [0, 5]])
    z = torch.tensor([[0.0, 0], [0, 6], [0, 5], [9, 8]])
    assert search(backend, z, codes).tolist() == [1, 2, 2, 0]
    again = codes.repeat(300, 1)  # more than any block of codes
    assert search(backend, z, again).tolist() == [1, 2, 2, 0]


@pytest.mark.parametrize("backend", [*ALL, "reference"])
def test_multiplications_are_not_fused_into_sums(backend):
    """Of two codes the second is nearer as defined, the first if a multiplication is fused."""
    random = torch.Generator().manual_seed(0)
    codes = 0.8 + 1e-5 * torch.rand(1000, 2, generator=random)
    squares, exact = codes.square(), codes.double().square()
    rounded = squares[:, 0] + squares[:, 1]
    for fused in (squares[:, 0] + exact[:, 1], exact[:, 0] + squares[:, 1]):
        misled = (rounded[:, None] > rounded) & (fused.float()[:, None] <= fused.float())
        pair = misled.nonzero()[0]
        assert search(backend, torch.zeros(1, 2), codes[pair]).item() == 1


@pytest.mark.parametrize("backend", CPU_LEVELS)
def test_a_packet_that_visits_more_groups_than_its_list_holds(backend):
    """Tight leaves far apart: the boxes of 32 groups overlap, so 16 latents make 496 visits.

    The list holds 256. Few leaves of a group are near, so that the search does not give up.
    """
    leaves = torch.rand(512, 32, generator=torch.Generator().manual_seed(0))
    codes = (leaves[:, None] + 1e-4 * normal(512, 16, 32)).flatten(0, 1)
    z = (leaves[::2] + 0.15 * normal(256, 32, seed=1)).T[None]
    name, level = at_level(backend)
    with level:
        actual = nearest_code(z, CodeIndex(codes), backend=name)
    assert torch.equal(actual, reference.nearest_code(z, codes))


@pytest.mark.parametrize("backend", CPU_LEVELS)
def test_a_tie_on_the_border_of_a_far_box_is_found(backend):
    """Code 0 is as near as code 1024, in a half of space whose box begins at just that distance."""
    codes = normal(2048, 4)
    codes[:, 0] = 1 + codes[:, 0].abs()
    codes[1024:, 0] *= -1
    codes[0], codes[1024] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([-1.0, 0, 0, 0])
    name, level = at_level(backend)
    with level:
        actual = nearest_code(torch.zeros(1, 4, 3), CodeIndex(codes), backend=name)
    assert actual.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("backend", [*ALL, "reference"])
def test_a_code_that_is_not_finite_loses_and_no_index_is_out_of_range(backend):
    """Codes 1, 4, 7 … are not finite, so that finite ones come before and after each."""
    codes = normal(40, 3)
    codes[1::9, 0], codes[4::9, 1], codes[7::9, 2] = torch.nan, torch.inf, -torch.inf
    z = normal(60, 3)
    z[0, 0], z[1, 1], z[2, :], z[3, 0] = torch.nan, torch.inf, -torch.inf, 3e38
    actual = search(backend, z, codes)
    assert actual[:4].tolist() == [0, 0, 0, 0]
    assert (actual % 3 != 1).all()
    assert torch.equal(actual, reference.nearest_code(z, codes))
    nowhere = torch.full((40, 3), torch.nan)
    assert search(backend, z, nowhere).tolist() == [0] * 60


@pytest.mark.parametrize("backend", CPU_LEVELS)
def test_the_tree_leaves_out_codes_that_are_not_finite(backend):
    codes = normal(600, 4)
    codes[::2, 1] = torch.nan
    codes[1::8, 0] = torch.inf
    z = normal(1, 4, 100, seed=1)
    z[0, 2, ::3], z[0, 1, ::7] = torch.nan, -torch.inf
    name, level = at_level(backend)
    nowhere = torch.full_like(codes, torch.nan)
    with level:
        actual = nearest_code(z, CodeIndex(codes), backend=name)
        assert nearest_code(z, CodeIndex(nowhere), backend=name).count_nonzero() == 0
    assert torch.equal(actual, reference.nearest_code(z, codes))


@pytest.mark.parametrize("backend", [*ALL, "reference"])
@pytest.mark.parametrize(
    "shape", [(2, 4), (2, 4, 5), (2, 4, 3, 5), (2, 4, 2, 3, 5), (0, 4, 3), (2, 4, 0)]
)
def test_every_latent_gets_a_code(backend, shape):
    codes, z = normal(30, 4), normal(*shape)
    actual = search(backend, z, codes)
    assert actual.dtype == torch.int64
    assert actual.shape == shape[:1] + shape[2:]
    latents = z.movedim(1, -1)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in actual.shape)).view(-1, actual.dim()):
        query = latents[tuple(at)]
        assert actual[tuple(at)] == (query - codes).square().sum(1).argmin()


@pytest.mark.parametrize("backend", [*ALL, "reference"])
def test_any_strides_of_the_latents_will_do(backend):
    codes, z = normal(600, 4), normal(3, 4, 7, 11)
    expected = reference.nearest_code(z, codes)
    channels_last = z.contiguous(memory_format=torch.channels_last)
    transposed = z.mT.contiguous().mT
    every_other = torch.stack([z, z], -1).flatten(-2)[..., ::2]
    batch_inside = z.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    one_code = z[:1].expand(3, -1, -1, -1)
    for relaid in (channels_last, transposed, every_other, batch_inside):
        assert torch.equal(search(backend, relaid, codes), expected)
    assert torch.equal(search(backend, one_code, codes), expected[:1].expand(3, -1, -1))
    assert torch.equal(search(backend, z, codes.T.contiguous().T), expected)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_share_the_latents(num_threads):
    """5,000 latents over batch entries of 2,500: ranges begin and end inside an entry."""
    z, codes = normal(2, 4, 2500), normal(3000, 4, seed=1)
    expected = reference.nearest_code(z, codes)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(nearest_code(z, codes, backend="cpu"), expected)
        assert torch.equal(nearest_code(z, CodeIndex(codes), backend="cpu"), expected)
    finally:
        torch.set_num_threads(before)


def test_an_index_keeps_the_codes_as_they_were():
    codes, z = normal(600, 4), normal(5, 4, seed=1)
    index, expected = CodeIndex(codes), nearest_code(z, codes)
    codes.zero_()
    assert torch.equal(nearest_code(z, index), expected)
    assert index.codebook.data_ptr() != codes.data_ptr()


@pytest.mark.parametrize("num_codes", [1, 16, 17, 256, 257, 4096, 4097, 70000])
def test_the_size_of_a_tree_is_known_beforehand(num_codes):
    codes = torch.zeros(num_codes, 3)
    assert cpu.build_tree(codes).shape == (cpu.tree_size(num_codes, 3),)
    torch.library.opcheck(torch.ops.emu3_kernels.nearest_code_tree.default, (codes[:300],))


def test_a_parameter_is_a_codebook_and_gets_no_gradient():
    codebook = nn.Parameter(normal(20, 4))
    z = normal(2, 4, 3).requires_grad_()
    codes = nearest_code(z, codebook)
    assert not codes.requires_grad
    assert not CodeIndex(codebook).codebook.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_first(dtype):
    z, codes = normal(1, 4, 50).to(dtype), normal(100, 4, seed=1)
    assert torch.equal(nearest_code(z, codes), reference.nearest_code(z.float(), codes))
    assert torch.equal(
        nearest_code(z, codes.to(dtype)), reference.nearest_code(z.float(), codes.to(dtype).float())
    )


@pytest.mark.parametrize(
    ("z", "codebook", "error", "message"),
    [
        (normal(2, 3), normal(5, 4), ValueError, r"z must be \[B, 4, \.\.\.\] on cpu"),
        (normal(4), normal(5, 4), ValueError, r"z must be \[B, 4, \.\.\.\] on cpu"),
        (normal(2, 4).int(), normal(5, 4), TypeError, "z must be floating point"),
        (normal(2, 4), normal(5, 4).int(), TypeError, "codebook must be floating point"),
        (normal(2, 4), normal(4), ValueError, r"codebook must be \[N, D\]"),
        (normal(2, 4), normal(0, 4), ValueError, "with N from 1"),
        (normal(2, 33), normal(5, 33), ValueError, "D from 1 to 32"),
        (normal(2, 4).to("meta"), normal(5, 4), ValueError, r"got \(2, 4\) torch.float32 meta"),
    ],
)
def test_a_bad_call_says_what_must_hold(z, codebook, error, message):
    with pytest.raises(error, match=f"^nearest_code: .*{message}") as raised:
        nearest_code(z, codebook)
    assert "\n" not in str(raised.value)


def test_a_bad_codebook_is_refused_by_the_index():
    with pytest.raises(ValueError, match="CodeIndex: codebook must be"):
        CodeIndex(normal(4))
