"""Voters by name: what they score, what they refuse, and that no file is fetched or run."""

import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from emu3.voters import colourfulness, load_voter, sharpness
from emu3.weights.clip import Clip, fold, from_open_clip
from tests.model import clip_parts
from tests.model.clip_parts import EMBEDDING, SIDE, OpenClip, ids_of, write_clip, write_tokenizer

PROMPTS = ["a red one", "two"]


def images(count=2, height=SIDE, width=SIDE):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def predictor(width):
    """LAION's layers; dropout is off when it scores."""
    torch.manual_seed(2)
    widths = [(width, 12), (12, 8), (8, 6), (6, 4), (4, 1)]
    layers = [nn.Linear(*of) for of in widths]
    return nn.Sequential(
        layers[0], nn.Dropout(), layers[1], nn.Dropout(), layers[2], nn.Dropout(), *layers[3:]
    ).eval()


def state_of(model):
    """Under LAION's names: 0, 2, 4, 6 and 7."""
    return {f"layers.{name}": value for name, value in model.state_dict().items()}


def test_the_folded_predictor_equals_its_layers():
    model = predictor(EMBEDDING)
    x = torch.randn(5, EMBEDDING, dtype=torch.float64)
    weight, bias = fold(state_of(model))
    expected = model.double()(x)[:, 0]
    rounding = torch.finfo(torch.float32).eps * expected.abs().max()
    assert (x.float() @ weight + bias - expected).abs().max() <= 8 * rounding


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_aesthetic_voter_scores_normalised_embeddings(tmp_path, ending):
    from safetensors.torch import save_file

    clip, head = write_clip(tmp_path), predictor(EMBEDDING)
    write = save_file if ending == ".safetensors" else torch.save
    write(state_of(head), tmp_path / f"aesthetic{ending}")
    scores = load_voter(f"aesthetic:{tmp_path}")(images(), PROMPTS)
    with torch.no_grad():
        pixels = Clip(clip, tmp_path, "cpu").pixels(images())
        seen = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        expected = head(F.normalize(seen, dim=1))[:, 0]
    assert torch.allclose(scores, expected, atol=1e-5)


def test_the_clip_voter_is_the_cosine_of_image_and_prompt(tmp_path):
    clip = write_clip(tmp_path)
    scores = load_voter(f"clip:{tmp_path}")(images(), PROMPTS)
    with torch.no_grad():
        pixels = Clip(clip, tmp_path, "cpu").pixels(images())
        seen = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        read = torch.cat(
            [clip.text_projection(clip.text_model(ids_of(p)).pooler_output) for p in PROMPTS]
        )
    assert torch.allclose(scores, F.cosine_similarity(seen, read), atol=1e-5)


def test_weights_of_open_clip_score_as_its_own_model_does(tmp_path):
    """The model is open_clip's layout in plain PyTorch, not the one that is filled."""
    from transformers import CLIPConfig

    torch.manual_seed(3)
    model = OpenClip().eval()
    write_tokenizer(tmp_path)
    CLIPConfig(**clip_parts.CONFIG).save_pretrained(tmp_path)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_tiny.pt")
    scores = load_voter(f"hpsv2:{tmp_path}")(images(), PROMPTS)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    deviation = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    with torch.no_grad():
        seen = model.visual((images() - mean) / deviation)
        read = torch.cat([model.encode_text(ids_of(p)) for p in PROMPTS])
    assert torch.allclose(scores, F.cosine_similarity(seen, read), atol=1e-5)


def test_every_weight_of_open_clip_has_a_place():
    torch.manual_seed(3)
    names = from_open_clip(OpenClip().state_dict())
    assert len(names) == len(OpenClip().state_dict()) + 4 * 2 * clip_parts.LAYERS  # q, k and v


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (40, 60), (61, 33)])
def test_an_image_is_resized_and_cropped_as_by_pillow(tmp_path, height, width):
    clip = Clip(write_clip(tmp_path), tmp_path, "cpu")
    levels = (images(1, height, width) * 255).round().byte()
    scale = SIDE / min(height, width)
    size = max(SIDE, int(width * scale)), max(SIDE, int(height * scale))
    picture = Image.fromarray(levels[0].permute(1, 2, 0).numpy())
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = ((edge - SIDE) // 2 for edge in size)
    cropped = np.array(picture.crop((left, top, left + SIDE, top + SIDE)))
    actual = clip.pixels(levels.float() / 255)
    expected = clip.pixels(torch.from_numpy(cropped).permute(2, 0, 1)[None] / 255)
    assert (actual - expected).abs().max() < 1.6 / 255 / 0.26  # levels that Pillow rounds


def test_a_padded_image_keeps_its_edges(tmp_path):
    clip = Clip(write_clip(tmp_path), tmp_path, "cpu", pad=True)
    pixels = clip.pixels(torch.ones(1, 3, 20, 40))
    black, white = clip.pixels(torch.zeros(1, 3, 16, 16)), clip.pixels(torch.ones(1, 3, 16, 16))
    assert torch.allclose(pixels[..., 4:12, :], white[..., 4:12, :], atol=1e-5)
    assert pixels[..., :4, :].equal(black[..., :4, :])
    assert pixels[..., 12:, :].equal(black[..., 12:, :])


def test_blur_lowers_sharpness_and_grey_has_no_colour():
    x = images(1, 32, 32)
    blurred = F.avg_pool2d(x, 3, 1, 1)
    assert sharpness(blurred, ["a"]) < sharpness(x, ["a"]) / 4
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert colourfulness(grey, ["a"]).item() == pytest.approx(0, abs=1e-3)
    assert colourfulness(x, ["a"]) > 50


def test_sharpness_is_the_variance_of_the_laplacian():
    """Of one bright pixel of luma 255 in 8x8: 1 x -4, 4 x 1."""
    x = torch.zeros(1, 3, 8, 8)
    x[..., 4, 4] = 1
    assert sharpness(x, ["a"]).item() == pytest.approx(255**2 * (16 + 4) / 64, rel=1e-5)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) + len(prompts[0])


def broken(images, prompts):
    return torch.full((len(images),), float("nan"))


def one_score(images, prompts):
    return torch.ones(1)


def test_a_function_of_ones_own_votes(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_voters", sys.modules[__name__])
    x = images(2, 4, 4)
    expected = x.mean((1, 2, 3)) + len(PROMPTS[0])
    assert load_voter("my_voters:brightness")(x, PROMPTS).equal(expected)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickled_model_is_refused_and_not_run(tmp_path, capsys):
    write_clip(tmp_path)
    (tmp_path / "head.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"^voter: .*head.pth must be a state dict"):
        load_voter(f"aesthetic:{tmp_path}")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("clip", "voter: a name must be KIND:WHAT, got 'clip'; known: damage:sharpness, "),
        ("damage:beauty", "voter damage:beauty: no such measure; known: sharpness, "),
        ("clip:{tmp}", "voter: no file {tmp}/tokenizer_config.json"),
        ("hpsv2:{tmp}/none", "voter: no file {tmp}/none/tokenizer_config.json"),
        ("aesthetic:{tmp}", "voter: {tmp} must hold one .safetensors, .pt or .pth of the "),
        ("no_such_module:score", "voter no_such_module:score: No module named 'no_such_module'"),
        ("math:score", "voter math:score: module 'math' has no attribute 'score'"),
        ("math:pi", "voter math:pi: must be a function, got <class 'float'>"),
    ],
)
def test_a_voter_that_is_not_there_is_one_line(tmp_path, name, told):
    with pytest.raises((ValueError, OSError)) as error:
        load_voter(name.format(tmp=tmp_path))
    assert str(error.value).startswith(told.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", ["broken", "one_score"])
def test_scores_that_are_no_numbers_of_images_are_refused(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "my_voters", sys.modules[__name__])
    with pytest.raises(ValueError, match=rf"my_voters:{function}: scores must be 2 finite numbers"):
        load_voter(f"my_voters:{function}")(images(), PROMPTS)


def test_images_without_a_prompt_each_are_refused():
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\] with B prompts, got .* and 1"):
        load_voter("damage:sharpness")(images(), ["one"])
