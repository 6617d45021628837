"""The vision tokenizer against Hugging Face's and against the released code, transcribed."""

import pytest
import torch

from emu3.config import VisionSettings
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision, save_vision
from emu3.weights.files import read_tensors
from emu3_kernels.testing.budget import assert_as_accurate
from tests.model import official_vision
from tests.model.vision_parts import SMALL, images, random_tokenizer

SAME = 1e-4
"""Largest difference of a reconstruction: eight times what rounding makes of 30 layers."""
SAME_AT_FULL_SIZE = 4 * SAME
"""A value in a hundred may differ so much there: random weights of 60 layers amplify rounding. Of
three images theirs lay up to 8.5e-5 from float64 and ours 1.0e-4; of six, the largest difference
of the two lay anywhere between 2.2e-5 and 1.6e-4, with either of two roundings (measured)."""


def hugging_face(settings: VisionSettings) -> torch.nn.Module:
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE, Emu3VQVAEConfig

    return Emu3VQVAE(
        Emu3VQVAEConfig(
            codebook_size=settings.num_codes,
            embed_dim=settings.code_width,
            latent_channels=settings.code_width,
            base_channels=settings.base_channels,
            channel_multiplier=list(settings.multipliers),
            num_res_blocks=settings.num_res_blocks,
            attn_resolutions=list(settings.attention_stages),
            hidden_size=settings.widths[-1],
            temporal_downsample_factor=settings.temporal_factor,
        )
    )


def both(
    settings: VisionSettings, tmp_path, num_images: int = 4
) -> tuple[VisionTokenizer, torch.nn.Module]:
    """Ours with random weights, and theirs with the same, carried over in a file."""
    ours = random_tokenizer(settings, num_images=num_images)
    save_vision(tmp_path / "vision.safetensors", ours, layout="huggingface")
    with torch.device("meta"):
        theirs = hugging_face(settings)
    theirs.load_state_dict(read_tensors(tmp_path / "vision.safetensors")[0], assign=True)
    return ours, theirs


@torch.no_grad()
def assert_same_images(
    ours: VisionTokenizer, theirs: torch.nn.Module, *size: int, largest: float = SAME
) -> None:
    x = images(*size)
    codes = ours.encode(x)
    sizes = torch.tensor([size[2:]] * size[0])
    assert codes.equal(torch.stack(theirs.encode(x, image_sizes=sizes).image_tokens))
    assert codes.unique().numel() > min(codes.numel(), ours.settings.num_codes) // 8
    reconstructed, expected = ours.decode(codes), theirs.decode(codes)
    differences = (reconstructed - expected).abs() / expected.abs().max()
    assert differences.quantile(0.99) <= SAME
    assert differences.max() <= largest


@pytest.mark.parametrize("size", [(1, 3, 8, 8), (2, 3, 64, 48), (3, 3, 40, 88), (1, 3, 128, 128)])
def test_images_have_hugging_face_codes_and_pixels(size, tmp_path):
    assert_same_images(*both(SMALL, tmp_path), *size)


@pytest.mark.e2e  # theirs encodes and decodes four copies
def test_a_large_image_has_hugging_face_codes_and_pixels(tmp_path):
    assert_same_images(*both(SMALL, tmp_path), 1, 3, 512, 160)


@pytest.mark.e2e  # 1.1 GB of weights twice
def test_the_full_size_has_hugging_face_codes_and_pixels(tmp_path):
    models = both(VisionSettings(), tmp_path, num_images=1)
    assert_same_images(*models, 1, 3, 32, 32, largest=SAME_AT_FULL_SIZE)


@pytest.mark.parametrize(
    "changes",
    [
        {"multipliers": (1, 2), "attention_stages": ()},
        {"multipliers": (2, 1, 2), "num_res_blocks": 1, "attention_stages": (0, 2)},
        {"temporal_factor": 2, "code_width": 8},
    ],
)
def test_other_shapes_are_hugging_face_s_too(changes, tmp_path):
    ours, theirs = both(SMALL.model_copy(update=changes), tmp_path)
    loaded = load_vision(theirs.state_dict())
    assert loaded.settings == ours.settings.model_copy(update={"image_size": 512})
    x = images(2, 3, 32, 48)
    codes = loaded.encode(x)
    sizes = torch.tensor([[32, 48]] * 2)
    assert codes.equal(torch.stack(theirs.encode(x, image_sizes=sizes).image_tokens))


def assert_drawn_as_accurately(ours: VisionTokenizer, codes: torch.Tensor) -> None:
    """Hold a clip and its first frame alone to twice the error of the released code."""
    weights = ours.state_dict()
    low = official_vision.decode(weights, codes)
    exact = official_vision.decode({name: w.double() for name, w in weights.items()}, codes)
    assert_as_accurate("clip", ours.decode(codes), low, exact)
    assert_as_accurate("image", ours.decode(codes[:, 0]), low[:, 0], exact[:, 0])


@pytest.mark.parametrize("frames", [4, pytest.param(12, marks=pytest.mark.e2e)])
def test_video_has_the_released_code_s_codes_and_pixels(frames):
    ours = random_tokenizer()
    clips = images(2, frames, 3, 32, 48)
    codes = ours.encode(clips)
    assert codes.equal(official_vision.encode(ours.state_dict(), clips))
    assert codes.unique().numel() > codes.numel() // 8
    assert ours.decode(codes).shape == clips.shape
    assert_drawn_as_accurately(ours, codes)


def test_an_image_is_the_first_frame_of_four_alike():
    ours = random_tokenizer()
    x = images(2, 3, 40, 32)
    codes = official_vision.encode(ours.state_dict(), x[:, None].repeat(1, 4, 1, 1, 1))
    assert ours.encode(x).equal(codes[:, 0])
    assert_drawn_as_accurately(ours, codes)


def test_forward_draws_what_decode_draws_from_what_encode_reads():
    ours = random_tokenizer()
    for x in (images(2, 3, 40, 32), images(1, 8, 3, 40, 32)):
        reconstructed, codes, _ = ours(x)
        assert codes.equal(ours.encode(x))
        expected = ours.decode(codes)
        assert (reconstructed - expected).abs().max() <= SAME * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_as_accurate_as_the_released_code_s(dtype):
    ours = random_tokenizer().to(dtype)
    codes = torch.randint(SMALL.num_codes, (1, 2, 6, 5), generator=torch.Generator().manual_seed(0))
    assert_drawn_as_accurately(ours, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_as_accurate_as_the_released_code_s(dtype):
    ours = random_tokenizer().to(dtype)
    weights, frames = ours.state_dict(), images(1, 4, 3, 48, 40).to(dtype)
    low = official_vision.latents(weights, frames)
    exact = official_vision.latents(
        {name: w.double() for name, w in weights.items()}, frames.double()
    )
    with torch.no_grad():
        assert_as_accurate("latents", ours.latents(frames), low, exact)
