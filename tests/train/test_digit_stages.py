"""The miniature's stages: digits as files, their stores, and the demo of both on tiny shapes."""

import json
from fractions import Fraction

import pytest
import torch
from typer.testing import CliRunner

from emu3.cli import app
from emu3.config import BYTE_VOCABULARY, load_recipe
from emu3.data.media import open_video, read_image, write_image
from emu3.data.store import Store
from emu3.demo import judge, run_moving, run_stages
from emu3.demo.config import ClipRecipe
from emu3.demo.files import descriptions, write_clips, write_images, write_texts
from emu3.demo.moving_stream import sample_clips
from emu3.demo.stream import DigitStream, training_digits
from emu3.prompt import parse_document
from emu3.text import ByteTokenizer
from emu3.train.layout import check_fits
from emu3.train.store_recipe import StoreRecipe
from emu3.vision import VisionTokenizer, encode_pieces, preprocess
from emu3.vision.images import to_levels
from emu3.weights import save_vision
from tests.train.recipes import VISION_WORDS

TEXT = ByteTokenizer(BYTE_VOCABULARY)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("clips-vision", VISION_WORDS, ClipRecipe)


def emu3(words):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output


def test_files_of_digits_become_documents_with_their_codes_and_captions(recipe, tmp_path):
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(recipe.vision).eval()
    save_vision(tmp_path / "vision.safetensors", tokenizer)
    inputs = write_images(tmp_path, recipe, 5), write_clips(tmp_path, recipe, 3)
    how = ["--preset", "mini", "--vision", tmp_path / "vision.safetensors"]
    how += ["--min-pixels", 256, "--max-pixels", 256]
    emu3(["prepare", *inputs, write_texts(tmp_path), "--out", tmp_path / "store", *how])
    store = Store(tmp_path / "store")
    assert store.kinds() == {"text": len(descriptions()), "pair": 8, "mixed": 0, "chat": 0}
    found = [shard.ids(n) for shard in store.shards for n in range(len(shard))]
    clips, images, texts = found[:3], found[3:8], found[8:]
    for ids, line in zip(images, inputs[0].read_text().splitlines(), strict=True):
        record, (words, codes) = json.loads(line), parse_document(ids.tolist(), TEXT)
        rows = read_image(tmp_path / record["image"]).permute(1, 2, 0)
        pixels = preprocess(rows, min_pixels=256, max_pixels=256)
        assert words == record["caption"]
        assert codes.equal(tokenizer.encode(pixels[None])[0])
    for ids, line in zip(clips, inputs[1].read_text().splitlines(), strict=True):
        record, (words, clip) = json.loads(line), parse_document(ids.tolist(), TEXT)
        video = open_video(tmp_path / record["video"])
        pixels = torch.stack([f / 127.5 - 1 for f in video])[None]
        assert words == record["caption"]
        assert (clip.fps, clip.codes.shape[0]) == (Fraction(8), recipe.clips.frames // 4)
        ((expected,),) = encode_pieces(tokenizer, [pixels])
        assert clip.codes.equal(expected)
    assert parse_document(texts[0].tolist(), TEXT) == [descriptions()[0].strip()]


def test_written_clips_are_those_that_the_demo_encodes(recipe, tmp_path):
    """The same digits, colours and directions in their order, to the last bit of a pixel."""
    lines = write_clips(tmp_path, recipe, 70).read_text().splitlines()
    digits = training_digits(recipe.data)
    stream = DigitStream(digits, recipe.data, recipe.vision.image_size, recipe.train.seed)
    expected = []
    for count in (64, 6):
        clips, shown = sample_clips(stream, recipe, count)
        expected += [shown.caption(number) for number in range(count)]
    assert [json.loads(line)["caption"] for line in lines] == expected
    last = torch.stack(list(open_video(tmp_path / "clips/000069.mp4")))
    assert last.equal(to_levels(clips[-1]))


def test_the_files_are_of_training_digits_and_colours_of_both_kinds(recipe, tmp_path):
    captions = [
        json.loads(line)["caption"]
        for line in write_images(tmp_path, recipe, 200).read_text().splitlines()
    ]
    assert len({words.split()[-1] for words in captions}) == 10
    assert len({words.split()[1] for words in captions}) == 8
    assert len(list((tmp_path / "images").iterdir())) == 200


STORES = {"images": run_stages.WORKERS, "clips": run_stages.WORKERS, "texts": 1}
STAGE_WORDS = [
    "train.steps=3",
    "train.save_every=3",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.intermediate_size=48",
    "optim.warmup_steps=2",
]


@pytest.mark.e2e
def test_the_demo_runs_the_commands_of_both_stages_and_measures_them(tmp_path, monkeypatch):
    """The plots of images, which take most of it, are black."""
    black = torch.zeros(3, 8, 8).byte()
    for name in ("draw_grid", "draw_curves"):
        monkeypatch.setattr(run_stages.plots, name, lambda path, _: write_image(path, black))
    monkeypatch.setattr(run_stages, "_ROUNDS", 1)
    monkeypatch.setattr(judge, "_MOVED_COPIES", 0)
    monkeypatch.setattr(run_moving, "_SHOWN", 2)
    monkeypatch.setattr(run_moving, "_CONTINUED", 2)
    commands = []

    def run(words, processes):
        commands.append((processes, list(words)))
        emu3(words)

    few = ["data.validation=0.02", "clips.batch_size=4", "clips.colors=1", "train.steps=2"]
    words = [*VISION_WORDS, *few], STAGE_WORDS, STAGE_WORDS
    report = run_stages.run_stages(tmp_path, words, images=12, clips=8, run=run)
    assert [(count, words[:2]) for count, words in commands] == [
        (1, ["train", "clips-vision"]),
        *[(n, ["prepare", f"{tmp_path}/data/{name}.jsonl"]) for name, n in STORES.items()],
        (1, ["train", "stage1-mini"]),
        (1, ["train", "stage2-mini"]),
    ]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (report["images_documents"], report["clips_documents"]) == (12, 8)
    for name in ("stage1_caption_digit", "stage2_generated_color", "clip_digit", "continued_color"):
        assert 0 <= report[f"{name}_accuracy"] <= 1
    assert 0.9 < report["stage2-mini_tokens"] / (3 * 2048) <= 1  # the rest is padding
    written = "stage1.png", "stage2.png", "loss.png", "clips.png", "continued.png", "clips.gif"
    assert all((tmp_path / name).exists() for name in written)


@pytest.mark.parametrize(("stage", "shard", "context"), [(1, 4, 1), (2, 1, 4)])
def test_four_processes_share_the_rows_of_a_step(stage, shard, context):
    name = f"stage{stage}-mini"
    recipe = load_recipe(name, run_stages.layout(name, 4), StoreRecipe)
    assert (recipe.parallel.shard, recipe.parallel.context) == (shard, context)
    assert recipe.parallel.num_ranks == 4
    check_fits(recipe.parallel, recipe.model, recipe.data.context)
    assert recipe.num_micro_batches == 1


@pytest.mark.e2e
def test_a_command_that_fails_ends_the_demo_in_a_line(tmp_path):
    with pytest.raises(ValueError, match=r"^demo: emu3 train ended with exit code 1$"):
        run_stages.run_command(["train", "no-such-recipe", "--out", str(tmp_path)], 1)
