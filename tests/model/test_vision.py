"""The miniature vision tokenizer."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from emu3.config import VisionSettings
from emu3.vision import Quantizer, VisionTokenizer
from tests.model.tiny import TINY_VISION


def latent_and_quantizer(**changes) -> tuple[torch.Tensor, Quantizer]:
    torch.manual_seed(0)
    quantizer = Quantizer(TINY_VISION.model_copy(update=changes))
    return torch.randn(3, TINY_VISION.code_width, 4, 4), quantizer


def test_codes_are_the_nearest_and_look_up_to_what_was_decoded():
    latent, quantizer = latent_and_quantizer()
    quantized, codes, _ = quantizer.eval()(latent)
    rows = latent.movedim(1, -1).double()
    distance = (rows[..., None, :] - quantizer.codebook.double()).square().sum(-1)
    assert codes.equal(distance.argmin(-1))
    torch.testing.assert_close(quantized, quantizer.lookup(codes))


def test_gradients_pass_the_rounding_unchanged():
    latent, quantizer = latent_and_quantizer()
    latent.requires_grad_()
    quantized, _, _ = quantizer(latent)
    weights = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad((quantized * weights).sum(), latent)
    assert gradient.equal(weights)


def test_commitment_pulls_the_latent_to_its_code():
    latent, quantizer = latent_and_quantizer()
    quantized, _, commitment = quantizer.eval()(latent.requires_grad_())
    (gradient,) = torch.autograd.grad(commitment, latent)
    torch.testing.assert_close(gradient, 2 * (latent - quantized).detach() / latent.numel())


def test_codes_follow_the_mean_of_their_members():
    latent, quantizer = latent_and_quantizer(ema_decay=1e-6, revive_below=0.0)
    _, codes, _ = quantizer.train()(latent)
    rows, flat = latent.movedim(1, -1).flatten(0, 2), codes.flatten()
    for code in flat.unique():
        mean = rows[flat == code].mean(0)
        torch.testing.assert_close(quantizer.codebook[code], mean, rtol=1e-3, atol=1e-3)


def test_starved_codes_move_to_latents_of_the_batch():
    latent, quantizer = latent_and_quantizer(ema_decay=0.5, revive_below=0.6)
    _, codes, _ = quantizer.train()(latent)
    used = codes.unique()
    starved = torch.ones(len(quantizer.codebook), dtype=torch.bool)
    starved[used] = False
    rows = latent.movedim(1, -1).flatten(0, 2)
    revived = quantizer.codebook[starved]
    assert starved.any()
    assert (revived[:, None] == rows).all(-1).any(1).all()


def test_eval_mode_leaves_the_codebook_alone():
    latent, quantizer = latent_and_quantizer()
    before = quantizer.codebook.clone()
    quantizer.eval()(latent)
    assert quantizer.codebook.equal(before)


def test_shapes_there_and_back():
    tokenizer = VisionTokenizer(TINY_VISION).eval()
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(pictures)
    assert codes.shape == (2, *TINY_VISION.grid)
    redrawn = tokenizer.decode(codes)
    assert redrawn.shape == pictures.shape
    assert redrawn.abs().max() <= 1
    again, same, _ = tokenizer(pictures)
    assert same.equal(codes)
    torch.testing.assert_close(again.clamp(-1, 1), redrawn)


def test_a_tokenizer_learns_one_picture():
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(TINY_VISION)
    picture = F.interpolate(torch.rand(4, 3, 4, 4) * 2 - 1, 16, mode="bilinear")
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        redrawn, _, commitment = tokenizer(picture)
        error = F.mse_loss(redrawn, picture)
        optimizer.zero_grad()
        (error + commitment).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0] / 5


def test_a_wrong_shape_is_refused_in_one_line():
    tokenizer = VisionTokenizer(TINY_VISION)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 16, 16\], got \(1, 3, 8, 16\)"):
        tokenizer.encode(torch.zeros(1, 3, 8, 16))


def test_an_image_the_stages_cannot_halve_is_refused():
    with pytest.raises(ValidationError, match="must be a multiple of 2\\^3"):
        VisionSettings(image_size=44)
