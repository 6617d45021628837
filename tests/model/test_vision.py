"""The vision tokenizer: its shape, its quantizer, its training, its errors."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from emu3.config import VisionSettings
from emu3.vision import Quantizer, VisionTokenizer
from tests.model.tiny import TINY_VISION
from tests.model.vision_parts import SMALL, images, random_tokenizer


def test_the_defaults_have_emu3_s_parameters():
    with torch.device("meta"):
        tokenizer = VisionTokenizer(VisionSettings())
    parts = {"encoder": 109_488_252, "decoder": 161_120_859, "quantize": 131_072}
    parts |= {"quant_conv": 52, "post_quant_conv": 52}
    for name, number in parts.items():
        assert sum(p.numel() for p in getattr(tokenizer, name).parameters()) == number, name
    assert sum(p.numel() for p in tokenizer.parameters()) == 270_740_287


def latent_and_quantizer(**changes) -> tuple[torch.Tensor, Quantizer]:
    torch.manual_seed(0)
    quantizer = Quantizer(TINY_VISION.model_copy(update=changes))
    return torch.randn(3, TINY_VISION.code_width, 4, 4), quantizer


def test_codes_are_the_nearest_and_look_up_to_what_was_decoded():
    latent, quantizer = latent_and_quantizer()
    quantized, codes, _ = quantizer.eval()(latent)
    rows = latent.movedim(1, -1).double()
    distance = (rows[..., None, :] - quantizer.embedding.weight.double()).square().sum(-1)
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
    latent, quantizer = latent_and_quantizer(ema_decay=1e-6, dead_code_threshold=0.0)
    _, codes, _ = quantizer.train()(latent)
    rows, flat = latent.movedim(1, -1).flatten(0, 2), codes.flatten()
    for code in flat.unique():
        mean = rows[flat == code].mean(0)
        torch.testing.assert_close(quantizer.embedding.weight[code], mean, rtol=1e-3, atol=1e-3)


def test_a_code_that_no_latent_chooses_stays_where_it_is():
    """Never revived, it became garbage and then NaN, as its running means decayed to nothing."""
    latent, quantizer = latent_and_quantizer(ema_decay=0.1, dead_code_threshold=0.0)
    before = quantizer.embedding.weight.clone()
    quantizer.embedding.weight[0] = before[0] = 9.0
    quantizer.restart()
    quantizer.train()
    for _ in range(60):
        quantizer(latent)
    assert quantizer.cluster_size[0] == 0
    assert quantizer.embedding.weight[0].equal(before[0])
    assert quantizer.embedding.weight.isfinite().all()
    chosen = torch.full_like(latent[:1, :, :1, :1], 9.0)
    quantizer(chosen)
    torch.testing.assert_close(quantizer.embedding.weight[0], chosen.flatten())


def test_starved_codes_move_to_latents_of_the_batch():
    latent, quantizer = latent_and_quantizer(ema_decay=0.5, dead_code_threshold=0.6)
    quantizer.cluster_size.zero_()
    _, codes, _ = quantizer.train()(latent)
    used = codes.unique()
    starved = torch.ones(len(quantizer.embedding.weight), dtype=torch.bool)
    starved[used] = False
    rows = latent.movedim(1, -1).flatten(0, 2)
    revived = quantizer.embedding.weight[starved]
    assert starved.any()
    assert (revived[:, None] == rows).all(-1).any(1).all()


def test_eval_mode_leaves_the_codebook_alone():
    latent, quantizer = latent_and_quantizer()
    before = quantizer.embedding.weight.clone()
    quantizer.eval()(latent)
    assert quantizer.embedding.weight.equal(before)


@pytest.mark.parametrize("shape", [(2, 3, 40, 32), (2, 8, 3, 16, 24)])
def test_training_reaches_every_parameter(shape):
    tokenizer = VisionTokenizer(SMALL).train()
    reconstructed, codes, commitment = tokenizer(images(*shape))
    assert reconstructed.shape == shape
    assert codes.shape == (shape[0], *(s // 4 for s in shape[1:-3]), shape[-2] // 8, shape[-1] // 8)
    (reconstructed.square().mean() + commitment).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        # A batch norm takes the mean away, and with it the bias ahead of it.
        assert parameter.grad.abs().sum() > 0 or name.endswith("conv1.conv.bias"), name


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (2, 4, 3, 16, 24)])
def test_a_tokenizer_works_and_trains_under_autocast(shape):
    """Convolutions 3x3 refused what others had rounded, and so did the running means."""
    tokenizer, x = random_tokenizer(TINY_VISION), images(*shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.decode(tokenizer.encode(x)).shape == x.shape
        reconstructed, _, commitment = tokenizer.train()(x)
        (reconstructed.square().mean() + commitment).backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_a_codebook_without_running_means_learns_by_gradient():
    torch.manual_seed(0)
    quantizer = Quantizer(TINY_VISION.model_copy(update={"ema_decay": None}))
    latent = torch.randn(3, TINY_VISION.code_width, 4, 4)
    _, codes, commitment = quantizer.train()(latent)
    commitment.backward()
    moved = quantizer.embedding.weight.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().equal(codes.unique())


def test_a_tokenizer_of_images_alone_has_no_temporal_layers():
    tokenizer = VisionTokenizer(TINY_VISION.model_copy(update={"temporal_factor": 1})).eval()
    assert not any("time" in name or "quant_conv" in name for name in tokenizer.state_dict())
    x = images(2, 3, 16, 24)
    codes = tokenizer.encode(x)
    assert codes.shape == (2, 8, 12)
    assert tokenizer.decode(codes).shape == x.shape
    with pytest.raises(ValueError, match="takes images alone"):
        tokenizer.encode(x[:, None])


def test_a_tokenizer_learns_one_image():
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(TINY_VISION.model_copy(update={"temporal_factor": 1}))
    image = F.interpolate(torch.rand(4, 3, 4, 4) * 2 - 1, 16, mode="bilinear")
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        reconstructed, _, commitment = tokenizer(image)
        error = F.mse_loss(reconstructed, image)
        optimizer.zero_grad()
        (error + commitment).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0] / 5


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ((1, 4, 16, 16), r"must be \[B, 3, H, W\] or \[B, T, 3, H, W\], .*got \(1, 4, 16, 16\)"),
        ((1, 3, 16, 12), r"multiples of 8, got \(1, 3, 16, 12\)"),
        ((1, 3, 0, 8), "not empty"),
        ((0, 3, 8, 8), "not empty"),
        ((3, 16, 16), "must be"),
        ((1, 6, 3, 16, 16), "frames must be a multiple of 4, got 6"),
    ],
)
def test_pixels_of_a_wrong_shape_are_refused_in_one_line(shape, line):
    for call in (random_tokenizer().encode, random_tokenizer()):
        with pytest.raises(ValueError, match=line) as fault:
            call(torch.zeros(shape))
        assert "\n" not in str(fault.value)


def test_bytes_and_unknown_codes_are_refused_in_one_line():
    tokenizer = random_tokenizer()
    with pytest.raises(TypeError, match=r"must be floats, got torch\.uint8"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"codes must be integers, got torch\.float32"):
        tokenizer.decode(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"codes must be in \[0, 512\), got 3 to 512"):
        tokenizer.decode(torch.tensor([[[3, 512]]]))
    with pytest.raises(ValueError, match=r"\[B, h, w\] or \[B, t, h, w\], not empty, got \(2,\)"):
        tokenizer.decode(torch.tensor([3, 5]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_codes_are_integers_of_any_width(dtype):
    """int16, in which files hold them, passed the check and failed in the look-up."""
    tokenizer = random_tokenizer(TINY_VISION)
    codes = torch.tensor([[[3, 200], [7, 0]]])
    for narrow in (codes.to(dtype), codes[None].to(dtype)):
        assert tokenizer.decode(narrow).equal(tokenizer.decode(narrow.long()))


def test_truth_values_are_no_codes():
    with pytest.raises(TypeError, match=r"codes must be integers, got torch\.bool"):
        random_tokenizer(TINY_VISION).decode(torch.ones(1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image_size": 44}, r"image_size \(44\) must be a multiple of 8"),
        ({"groups": 24}, r"groups \(24\) must divide every width of \(256, 512, 512, 1024\)"),
        ({"attention_stages": [4]}, "attention_stages must be below 4"),
        ({"temporal_factor": 3}, r"temporal_factor \(3\) must be a power of two"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, line):
    with pytest.raises(ValidationError, match=line):
        VisionSettings(**changes)
