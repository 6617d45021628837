"""A vision tokenizer's ops as modules: their states and results, and a video in pieces."""

import pytest
import torch
from torch import nn
from transformers.models.emu3 import modeling_emu3 as hf

import emu3_kernels
from emu3_kernels import modules


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: modules.GroupNormSiLU(2, 8), lambda: nn.GroupNorm(2, 8)),
        (lambda: modules.Conv3x3(8, 12), lambda: nn.Conv2d(8, 12, 3)),
        (lambda: modules.CausalConv3d(4, 6, 3), lambda: nn.Conv3d(4, 6, 3)),
        (
            lambda: modules.CausalConv3d(4, 6, (4, 3, 1), bias=False),
            lambda: nn.Conv3d(4, 6, (4, 3, 1), bias=False),
        ),
        (lambda: modules.SpatialNormSiLU(32, 64, 4), lambda: hf.Emu3VQVAESpatialNorm(4, 64)),
        (lambda: modules.TemporalResidual(4), lambda: hf.Emu3VQVAETemporalResnetBlock(4, 4)),
    ],
    ids=["group norm", "3x3", "causal", "causal without bias", "spatial norm", "temporal"],
)
def test_the_state_begins_as_that_of_the_usual_module(ours, theirs):
    torch.manual_seed(0)
    state = ours().state_dict()
    torch.manual_seed(0)
    expected = theirs().state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].equal(value) for name, value in expected.items())


def with_drawn_vectors(module: nn.Module) -> nn.Module:
    """Tell the weights and the biases of norms apart."""
    for number, vector in enumerate(p for p in module.parameters() if p.dim() == 1):
        nn.init.normal_(vector, generator=torch.Generator().manual_seed(number))
    return module


@pytest.mark.parametrize("silu", [True, False])
def test_norms_pass_every_setting_on(silu):
    x, latent, settings = draw(2, 8, 6, 4), draw(2, 4, 3, 2), {"eps": 0.5, "silu": silu}
    norm = with_drawn_vectors(modules.GroupNormSiLU(2, 8, **settings))
    expected = emu3_kernels.group_norm_silu(x, norm.weight, norm.bias, 2, **settings)
    assert norm(x).equal(expected)
    spatial = with_drawn_vectors(modules.SpatialNormSiLU(2, 8, 4, **settings))
    # In the order of the op: weights and biases of norm_layer, conv_y and conv_b.
    parameters = (p.squeeze((2, 3)) if p.dim() == 4 else p for p in spatial.parameters())
    expected = emu3_kernels.spatial_norm_silu(x, latent, *parameters, groups=2, **settings)
    assert spatial(x, latent).equal(expected)


def test_a_convolution_of_pictures_adds_its_residual():
    x, residual, conv = draw(2, 8, 6, 5), draw(2, 12, 6, 5), modules.Conv3x3(8, 12)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(conv(x, residual), expected + residual)


def test_autocast_rounds_a_convolution_of_pictures_as_pytorch_s():
    """What ``nn.Conv2d`` had rounded was refused: the weights were still float32."""
    x, conv = draw(2, 8, 6, 5), modules.Conv3x3(8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        before = nn.Conv2d(8, 8, 1)(x)
        y = conv(before)
        expected = nn.functional.conv2d(before, conv.weight, conv.bias, padding=1)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected)
        residual = draw(2, 12, 6, 5)
        torch.testing.assert_close(conv(before, residual), expected + residual.bfloat16())
    y.sum().backward()
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("post_activation", [None, "silu"])
def test_a_causal_convolution_passes_every_setting_on(activation, post_activation):
    x, residual = draw(2, 4, 6, 5, 5), draw(2, 6, 3, 5, 5)
    settings = {"activation": activation, "post_activation": post_activation}
    conv = modules.CausalConv3d(4, 6, (4, 3, 3), (2, 1, 1), **settings)
    tensors = {"scale": draw(4), "shift": draw(1, 4)[0], "residual": residual}
    expected = emu3_kernels.causal_conv3d(
        x, conv.weight, conv.bias, stride=(2, 1, 1), **settings, **tensors
    )
    assert conv(x, **tensors).equal(expected)


@torch.no_grad()
def test_a_video_in_pieces_is_the_video_at_once():
    layers = nn.ModuleList([modules.CausalConv3d(4, 4, (4, 3, 3), (2, 1, 1), activation="silu")])
    layers.extend(with_drawn_vectors(modules.TemporalResidual(4).eval()) for _ in range(2))
    at_once, memory, pieces = draw(1, 4, 8, 5, 6), {}, []
    for x in at_once.split([2, 4, 2], dim=2):
        for layer in layers:
            x = layer(x, memory)
        pieces.append(x)
    for layer in layers:
        at_once = layer(at_once)
    assert torch.cat(pieces, dim=2).equal(at_once)


@pytest.mark.parametrize("training", [True, False])
def test_the_temporal_block_is_hugging_face_s_with_its_statistics(training):
    ours = modules.TemporalResidual(4)
    theirs = with_drawn_vectors(hf.Emu3VQVAETemporalResnetBlock(4, 4))
    theirs(draw(2, 4, 5, 6, 7))  # moves the running statistics
    ours.load_state_dict(theirs.state_dict())
    ours.train(training)
    theirs.train(training)
    x, slopes = draw(2, 4, 3, 5, 6).requires_grad_(), draw(2, 4, 3, 5, 6)
    results = []
    for block in (ours, theirs):
        y = block(x)
        gradients = torch.autograd.grad((y * slopes).sum(), (x, *block.parameters()))
        names = ("x", *(name for name, _ in block.named_parameters()))
        results.append({"y": y, **dict(zip(names, gradients, strict=True)), **block.state_dict()})
    # A batch norm takes the mean away, and with it the bias ahead of it: rounding alone is left.
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("places", [(), (3,), (2, 3, 5)])
def test_a_quantizer_rounds_to_its_codes_and_passes_gradients_straight(places):
    quantizer = modules.VectorQuantizer(40, 4)
    z = draw(2, 4, *places).requires_grad_()
    rounded, codes = quantizer(z)
    assert codes.equal(emu3_kernels.nearest_code(z, quantizer.weight))
    torch.testing.assert_close(rounded, quantizer.lookup(codes))
    slopes = draw(*z.shape)
    dz, dweight = torch.autograd.grad(
        (rounded * slopes).sum(), (z, quantizer.weight), allow_unused=True
    )
    assert dz.equal(slopes)
    assert dweight is None
    quantizer.lookup(codes).sum().backward()
    assert quantizer.weight.grad.sum(1).equal(
        4.0 * torch.bincount(codes.flatten(), minlength=40).float()
    )


@pytest.mark.parametrize(
    "layer",
    [
        modules.GroupNormSiLU(2, 4),
        modules.CausalConv3d(4, 4, 3),
        modules.TemporalResidual(4).eval(),
        modules.TemporalResidual(4),
    ],
    ids=["group norm", "causal", "temporal", "temporal in training"],
)
def test_vision_modules_go_through_the_compiler_in_one_piece(layer):
    x = draw(2, 4, 3, 5, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert compiled(x).equal(layer(x))
