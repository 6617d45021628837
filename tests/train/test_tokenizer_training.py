"""The tokenizer's training: losses, crops, usage, what it starts from, and the stage itself."""

import json
from copy import deepcopy

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from emu3.config import SettingsError
from emu3.data.crops import CropStream, load_split
from emu3.data.media import open_video, read_image, write_image
from emu3.demo.redraw import run_redraw
from emu3.tasks import load_recipe
from emu3.train.adversary import PatchDiscriminator, discriminator_loss, generator_loss
from emu3.train.start import LIFT, begin
from emu3.train.tokenizer import TokenizerStage
from emu3.train.usage import WINDOW, CodeUsage
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision, save_vision
from tests.train.recipes import TOKENIZER_WORDS, VISION_WORDS, tiny_recipe, tokenizer_words


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe("tokenizer", tmp_path)


def changed(recipe, table, **values):
    group = getattr(recipe, table).model_copy(update=values)
    return recipe.model_copy(update={table: group})


def make_stage(recipe, perceptual=None):
    torch.manual_seed(0)
    train_set, _ = load_split(recipe.media)
    stream = CropStream(train_set, recipe.media, seed=0)
    return TokenizerStage(recipe, begin(recipe), stream, perceptual)


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return any(not value.equal(before[name]) for name, value in module.state_dict().items())


def test_the_hinge_asks_for_a_margin_of_one_and_no_more():
    real, reconstructed = torch.tensor([3.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(real, reconstructed).item() == pytest.approx((2.5 / 3 + 1.5 / 2) / 2)
    assert generator_loss(reconstructed).item() == 0.75


def test_a_score_sees_34_pixels_a_side_and_the_next_one_four_further():
    judge = PatchDiscriminator(4, 2).eval()
    images = torch.randn(1, 3, 96, 96, requires_grad=True)
    scores = judge(images)
    seen = []
    for column in (8, 9):
        (derivative,) = torch.autograd.grad(scores[0, 0, 8, column], images, retain_graph=True)
        columns = derivative.abs().sum((0, 1, 2)).nonzero().flatten()
        seen.append((columns.min().item(), len(columns)))
    assert seen[0][1] == seen[1][1] == 34
    assert seen[1][0] - seen[0][0] == 4


def test_usage_forgets_after_a_window_and_perplexity_counts_even_codes():
    usage = CodeUsage(8)
    metrics = usage.update(torch.arange(4))
    assert metrics == {"usage": 0.5, "perplexity": pytest.approx(4)}
    for _ in range(WINDOW - 1):
        metrics = usage.update(torch.tensor([0]))
    assert metrics["usage"] == 0.5
    assert 1 < metrics["perplexity"] < 2
    assert usage.update(torch.tensor([0]))["usage"] == 0.125


def test_training_sees_neither_the_files_validation_nor_the_end_of_a_clip(recipe, tmp_path):
    train_set, validation_set = load_split(recipe.media)
    frames = torch.stack(list(open_video(tmp_path / "moving.mp4")))
    assert train_set.images.keys() == {"seen"}
    assert train_set.clips["moving"].equal(frames[:8])
    assert validation_set.images["unseen"].equal(read_image(tmp_path / "unseen.png"))
    assert validation_set.clips["moving"].equal(frames[8:])


def test_files_that_share_a_name_are_all_read_and_validation_together(recipe, tmp_path):
    """The last of them took the place of the others, and with it its images."""
    folder = tmp_path / "many"
    paths = [folder / f"{name}.png" for name in ("a", "one/a", "two/a", "b", "one/b")]
    for level, path in enumerate(paths):
        write_image(path, torch.full((3, 4, 4), level, dtype=torch.uint8))
    sources = {"sources": (folder, paths[0]), "validation": ("b",)}
    train_set, validation_set = load_split(recipe.media.model_copy(update=sources))
    levels = {name: int(image[0, 0, 0]) for name, image in train_set.images.items()}
    assert levels == {"a": 0, "a-2": 1, "a-3": 2}
    assert validation_set.images.keys() == {"b", "b-2"}


def test_a_folder_without_images_is_refused_and_not_replaced_by_the_samples(recipe, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").touch()
    for sources in ((empty,), (tmp_path / "seen.png", empty)):
        media = recipe.media.model_copy(update={"sources": sources, "validation": ()})
        with pytest.raises(ValueError, match=f"media.sources: {empty} contains no image"):
            load_split(media)


def test_a_source_that_is_not_there_is_named_as_such(recipe, tmp_path):
    """It was "not a video, or truncated"."""
    media = recipe.media.model_copy(update={"sources": (tmp_path / "nowhere",), "validation": ()})
    with pytest.raises(ValueError, match=r"^media.sources: no file or folder .*nowhere$"):
        load_split(media)


def test_a_validation_name_that_is_no_file_is_refused(recipe):
    media = recipe.media.model_copy(update={"validation": ("unsene",)})
    with pytest.raises(ValueError, match=r"media.validation: no file is called unsene"):
        load_split(media)


def test_crops_are_windows_of_the_image_or_their_mirror_images(recipe):
    media = recipe.media.model_copy(update={"shrink": 1, "clips": 0})
    train_set, _ = load_split(media)
    images, clips = CropStream(train_set, media, seed=3).next_batch()
    assert clips.shape == (0, 4, 3, 16, 16)
    whole = train_set.images["seen"] / 127.5 - 1
    windows = whole.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    for crop in images:
        both = torch.stack((crop, crop.flip(-1)))
        assert (both[:, None] == windows).flatten(2).all(-1).any()


def test_a_clip_is_cropped_at_one_place_in_consecutive_frames(recipe):
    media = recipe.media.model_copy(update={"shrink": 1, "images": 0, "clips": 6})
    train_set, _ = load_split(media)
    _, clips = CropStream(train_set, media, seed=3).next_batch()
    whole = train_set.clips["moving"] / 127.5 - 1
    windows = whole.unfold(2, 16, 1).unfold(3, 16, 1).permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
    runs = windows.unfold(1, 4, 1).permute(0, 1, 5, 2, 3, 4)
    for crop in clips:
        assert any((runs == kind).flatten(2).all(-1).any() for kind in (crop, crop.flip(-1)))


def test_a_restored_stream_goes_on_where_it_stood(recipe):
    train_set, _ = load_split(recipe.media)
    stream, other = (CropStream(train_set, recipe.media, seed) for seed in (1, 2))
    stream.next_batch()
    other.restore(stream.state())
    for one, two in zip(stream.next_batch(), other.next_batch(), strict=True):
        assert one.equal(two)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["media.frames=6"], "media.frames (6) must be a multiple of temporal_factor (4)"),
        (["media.crop=17"], "media.crop (17) must be a multiple of 2, the side of a code"),
        (["media.crop=10"], "media.crop (10) must be 12 at least, for the discriminator"),
        (["media.images=0", "media.clips=0"], "media.images or media.clips must be above 0"),
    ],
)
def test_crops_that_do_not_fit_the_codes_are_refused_before_files_are_read(words, line):
    """They ended in a traceback inside the first step, after all files had been read."""
    words = [*TOKENIZER_WORDS, "media.sources=['/nowhere']", *words]
    with pytest.raises(SettingsError) as fault:
        load_recipe("tokenizer", words)
    assert line in str(fault.value)


def test_frames_need_not_fit_where_a_step_has_no_clips():
    load_recipe("tokenizer", [*TOKENIZER_WORDS, "media.frames=6", "media.clips=0"])


def test_a_stage_without_crops_does_not_check_them():
    load_recipe("vision", [*VISION_WORDS, "media.crop=17", "media.images=0", "media.clips=0"])


def test_nothing_as_large_as_a_crop_is_refused(recipe):
    train_set, _ = load_split(recipe.media)
    media = recipe.media.model_copy(update={"crop": 64})
    with pytest.raises(ValueError, match=r"media.images: nothing as large as a crop of 64"):
        CropStream(train_set, media, seed=0)


def test_the_discriminator_learns_from_its_first_step_on_and_only_then(recipe):
    stage = make_stage(recipe)
    before = copied(stage.discriminator.body[0])
    metrics = stage.step(2, *stage.stream.next_batch())
    assert not moved(stage.discriminator.body[0], before)
    assert "adversarial" not in metrics
    metrics = stage.step(3, *stage.stream.next_batch())
    assert moved(stage.discriminator.body[0], before)
    assert {"adversarial", "discriminator"} <= metrics.keys()


def test_each_player_moves_on_its_own_loss_alone(recipe):
    """The tokenizer's step must not teach the discriminator, nor the other way round."""
    stage = make_stage(recipe)
    real, reconstructed, _, _ = stage._reconstruct(*stage.stream.next_batch())
    loss = generator_loss(stage.discriminator(reconstructed))
    weights = {n: p.clone() for n, p in stage.discriminator.named_parameters()}
    loss.backward()
    stage.optimizer.step()
    assert all(p.equal(weights[n]) for n, p in stage.discriminator.named_parameters())
    before = copied(stage.tokenizer)
    stage.discriminator.zero_grad()
    clean = [p.grad.clone() for p in stage.tokenizer.parameters() if p.grad is not None]
    stage._train_discriminator(real, reconstructed.detach(), 1e-2)
    assert not moved(stage.tokenizer, before)
    kept = [p.grad for p in stage.tokenizer.parameters() if p.grad is not None]
    assert all(one.equal(two) for one, two in zip(clean, kept, strict=True))


def test_the_loss_is_the_weighted_sum_of_its_terms(recipe):
    recipe = changed(recipe, "objective", perceptual_weight=0.3, adversarial_weight=0.2)
    stage = make_stage(
        recipe, perceptual=lambda reconstructed, real: (reconstructed - real).abs().mean((1, 2, 3))
    )
    f = stage.step(5, *stage.stream.next_batch())
    beside = 0.3 * f["perceptual"] + 0.2 * f["adversarial"]
    total = f["error"] + recipe.vision.commitment * f["commitment"] + beside
    torch.testing.assert_close(f["loss"], total)


def test_bfloat16_rounds_weights_and_pixels_of_the_encoder_and_leaves_the_weights(recipe):
    stage = make_stage(changed(recipe, "objective", bfloat16=True))
    images, _ = stage.stream.next_batch()
    rounded = deepcopy(stage.tokenizer.encoder).bfloat16()(
        images.bfloat16().contiguous(memory_format=torch.channels_last)
    )
    seen = []
    stage.tokenizer.encoder.register_forward_hook(lambda *call: seen.append(call[2]))
    stage.step(0, images, images[:0, None])
    assert seen[0].equal(rounded)
    kept = [*stage.tokenizer.parameters(), *stage.average.parameters()]
    assert {value.dtype for value in kept} == {torch.float32}


def test_the_averaged_weights_are_what_a_run_leaves(recipe, tmp_path):
    stage = make_stage(changed(recipe, "objective", average=0.75))
    first = None
    for step in range(2):
        stage.step(step, *stage.stream.next_batch())
        first = stage.tokenizer.encoder.conv_in.weight.detach().clone() if first is None else first
    second = stage.tokenizer.encoder.conv_in.weight.detach()
    stage.save(tmp_path / "t.safetensors")
    saved = load_vision(tmp_path / "t.safetensors").encoder.conv_in.weight
    torch.testing.assert_close(saved, 0.75 * first + 0.25 * second)


def test_before_training_every_block_is_reconstructed_in_its_colour(recipe):
    """Unrounded; what is lost is an eighth of the variance at most, and nearly all at random."""
    torch.manual_seed(0)
    tokenizer = begin(recipe).eval()
    colours = torch.rand(4, 3, 12, 12) * 2 - 1
    images = colours.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        reconstructed = tokenizer.pixels(tokenizer.latents(images[:, None]), is_image=True)[:, 0]
    assert (reconstructed - images).square().mean() < images.var() / 8


def test_a_still_clip_is_reconstructed_as_its_image_before_training(recipe):
    torch.manual_seed(0)
    tokenizer = begin(recipe).eval()
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    clip = image[:, None].expand(-1, 4, -1, -1, -1)
    assert tokenizer.encode(clip)[:, 0].equal(tokenizer.encode(image))
    codes = tokenizer.encode(image)
    reconstructed = tokenizer.decode(codes[:, None])
    torch.testing.assert_close(
        reconstructed, tokenizer.decode(codes)[:, None].expand_as(reconstructed)
    )


def test_a_run_starts_from_a_tokenizer_of_images(recipe, tmp_path):
    """MoVQGAN's encoder, 1x1 convolution and codes come through the new temporal layers."""
    torch.manual_seed(0)
    settings = recipe.vision.model_copy(update={"num_codes": 20})
    images = VisionTokenizer(settings)
    images.encoder.conv_out.weight.data.mul_(0.2)
    mix = nn.Conv2d(4, 4, 1)
    found = {
        n: v for n, v in images.state_dict().items() if "time_" not in n and "quant_conv" not in n
    }
    found = {
        n: v.contiguous()
        for n, v in found.items()
        if n not in ("quantize.cluster_size", "quantize.sums")
    }
    for name in ("quant_conv", "post_quant_conv"):
        found |= {f"{name}.weight": mix.weight.data.clone(), f"{name}.bias": mix.bias.data.clone()}
    found["loss.discriminator.main.0.bias"] = torch.ones(1)
    save_file(found, tmp_path / "movq.safetensors")
    start = changed(recipe, "objective", start=tmp_path / "movq.safetensors")
    tokenizer = begin(start).eval()
    assert tokenizer.codebook[:20].equal(images.codebook)
    with torch.no_grad():
        # A smaller image's latents stay where SiLU, lifted, is the identity but for 1 %.
        before = 0.1 * torch.rand(1, 3, 16, 16)
        plain = images.encoder(before)
        assert plain.abs().max() < LIFT - 2
        actual = tokenizer.latents(before[:, None])[:, :, 0]
        lost = 2 * nn.functional.silu(plain.abs().max() - LIFT).abs()
        assert (actual - mix(plain)).abs().max() <= lost * mix.weight.abs().sum(1).max() + 1e-5


def test_a_run_starts_from_a_whole_tokenizer(recipe, tmp_path):
    torch.manual_seed(0)
    whole = VisionTokenizer(recipe.vision)
    save_vision(tmp_path / "whole.safetensors", whole)
    tokenizer = begin(changed(recipe, "objective", start=tmp_path / "whole.safetensors"))
    assert not moved(tokenizer, copied(whole))


def test_weights_of_another_shape_are_refused(recipe, tmp_path):
    save_vision(tmp_path / "whole.safetensors", VisionTokenizer(recipe.vision))
    other = changed(recipe, "vision", num_codes=25)
    other = changed(other, "objective", start=tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match=r"of another configuration: quantize.embedding.weight is"):
        begin(other)


@pytest.mark.e2e
def test_training_lowers_the_error_of_a_batch(recipe):
    stage = make_stage(changed(recipe, "train", steps=30))
    batch = stage.stream.next_batch()
    errors = [stage.step(step, *batch)["error"].item() for step in range(30)]
    assert sum(errors[-5:]) < 0.8 * sum(errors[:5])


@pytest.mark.e2e
def test_the_demo_writes_metrics_and_images_of_the_validation_files(tmp_path):
    words = tokenizer_words(tmp_path)
    report = run_redraw(tmp_path / "demo", words=words)
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == report
    assert report["images"]["unseen"]["size"] == [40, 48]
    assert report["clips"]["moving"]["frames"] == 8
    assert 0 < report["validation_codes"]["usage"] <= report["all_codes"]["usage"] <= 1
    with Image.open(tmp_path / "demo" / "unseen.png") as image:
        assert image.size == (96, 40)
    assert next(iter(open_video(tmp_path / "demo" / "moving.mp4"))).shape == (3, 32, 80)
    again = run_redraw(tmp_path / "demo", words=words)
    assert {**again, "train_seconds": 0} == {**report, "train_seconds": 0}


@pytest.mark.parametrize(
    ("word", "frames"), [("vision.temporal_factor=1", 8), ("media.validation_tail=0.2", 3)]
)
def test_the_demo_measures_clips_that_do_not_fill_a_code(word, frames, tmp_path):
    """The tokenizer was trained first, and then refused them."""
    words = [*tokenizer_words(tmp_path), "train.steps=1", word]
    report = run_redraw(tmp_path / "demo", words=words)
    assert report["clips"]["moving"]["frames"] == frames


def test_no_clip_as_long_as_a_crop_is_refused(recipe):
    media = recipe.media.model_copy(update={"frames": 12})
    train_set, _ = load_split(media)
    with pytest.raises(ValueError, match=r"as large as a crop of 16 and of 12 frames"):
        CropStream(train_set, media, seed=0)
