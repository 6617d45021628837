"""``emu3 prefer``: prompts to samples to votes to pairs of stored codes, and given pairs."""

import json
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.media import read_image
from emu3.data.pairs import load_pairs, weights_fingerprint
from emu3.generate import Sampling, generate_images
from emu3.prompt import generation_document
from emu3.tasks import load_recipe
from emu3.tasks import train as train_recipe
from emu3.text import ByteTokenizer
from emu3.tools.prefer import run as sampling
from emu3.tools.prefer.votes import choose, combined
from emu3.train.metrics import read_metrics
from emu3.vision import VisionTokenizer, preprocess
from emu3.weights import load_decoder, load_vision, save_decoder, save_vision
from tests.model.tiny import TINY_VISION, tiny_model
from tests.train.raters import brightness

needs_arrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="needs pyarrow")
PROMPTS = [f"a red {number}" for number in range(20)]
SAMPLES, GRID = 3, (4, 4)
BRIGHT = ["--voter", "tests.train.raters:brightness"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefer")
    torch.manual_seed(0)
    save_vision(folder / "vision.safetensors", VisionTokenizer(TINY_VISION))
    save_decoder(folder / "decoder.safetensors", tiny_model())
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def prefer(folder: Path, out: Path, *words, inputs=None):
    given = inputs or [folder / "prompts.txt"]
    of = ["--model", folder / "decoder.safetensors", "--area", 64, "--samples", SAMPLES]
    command = ["prefer", *given, "--out", out, *of, "--batch", 7, *words]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, command)))


@pytest.fixture(scope="module")
def whole(folder):
    done = prefer(folder, folder / "whole", *BRIGHT, "--seed", 5)
    assert done.exit_code == 0, done.output
    return folder / "whole"


def pixels_of(folder: Path, codes: torch.Tensor) -> torch.Tensor:
    vision = load_vision(folder / "vision.safetensors")
    return (vision.decode(codes.long()).clamp(-1, 1) + 1) / 2


def test_the_best_and_the_worst_sample_of_a_prompt_are_its_pair(folder, whole):
    """Sampled alone by its seed, an image has the codes that are stored."""
    model, text = (
        load_decoder(folder / "decoder.safetensors"),
        ByteTokenizer(tiny_model().settings.vocabulary),
    )
    pairs = load_pairs(whole / "dpo.safetensors")
    assert list(pairs.prompts) == PROMPTS
    how = Sampling(guidance=1.0, top_k=None)
    for number in (0, 7, 19):
        seeds = [5 + number * SAMPLES + k for k in range(SAMPLES)]
        codes = torch.cat(
            [generate_images(model, text, [PROMPTS[number]], GRID, how, [s]) for s in seeds]
        )
        scores = brightness(pixels_of(folder, codes), [])
        assert torch.equal(pairs.chosen[number].long(), codes[scores.argmax()])
        assert torch.equal(pairs.rejected[number].long(), codes[scores.argmin()])
        torch.testing.assert_close(pairs.scores[number], torch.stack((scores.max(), scores.min())))
    assert pairs.header.voters == ("tests.train.raters:brightness",)
    assert pairs.header.sampled.seed == 5


def test_the_reference_is_that_of_whole_logits_in_float64(folder, whole):
    pairs = load_pairs(whole / "dpo.safetensors")
    path = folder / "decoder.safetensors"
    model = load_decoder(path)
    ids, text = model.settings.vocabulary, ByteTokenizer(model.settings.vocabulary)
    model = model.double()
    for number in (0, 11):
        for side, codes in enumerate((pairs.chosen, pairs.rejected)):
            document = generation_document(PROMPTS[number], codes[number].long(), text)
            assert pairs.documents(number)[side] == document
            tokens = torch.tensor(document)
            logits = (model(tokens[None, :-1])[0] @ model.head.weight.T).log_softmax(1)
            targets = tokens[1:]
            found = logits.gather(1, targets[:, None])[:, 0][targets >= ids.visual_start].sum()
            assert pairs.reference[number, side].item() == pytest.approx(found.item(), rel=1e-6)
    assert pairs.header.decoder == weights_fingerprint(path)


class Killed(BaseException):
    """Ends a run where a kill would."""


def test_a_run_that_was_killed_goes_on_and_samples_nothing_twice(
    folder, whole, tmp_path, monkeypatch
):
    calls = []

    def counted(*args):
        calls.append(len(args[2]))
        if len(calls) == 8:
            raise Killed
        return generate_images(*args)

    monkeypatch.setattr(sampling, "generate_images", counted)
    with pytest.raises(Killed):
        prefer_directly(folder, tmp_path)
    assert not (tmp_path / "dpo.safetensors").exists()
    calls.clear()
    calls += [0] * 100
    prefer_directly(folder, tmp_path)
    assert sum(calls) == 4 * SAMPLES  # those of the second group
    for name in ("dpo.safetensors", "samples/00000.safetensors", "votes/00016.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def prefer_directly(folder: Path, out: Path) -> None:
    done = prefer(folder, out, *BRIGHT, "--seed", 5)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


def test_other_voters_and_gaps_sample_nothing_again(folder, whole, tmp_path, monkeypatch):
    before = load_pairs(whole / "dpo.safetensors")
    out = tmp_path / "out"
    copy(whole, out)
    monkeypatch.delattr(sampling, "generate_images")
    differences = before.scores[:, 0] - before.scores[:, 1]
    middle = differences.median().item()
    done = prefer(folder, out, *BRIGHT, "--seed", 5, "--gap", middle)
    assert done.exit_code == 0, done.output
    assert len(load_pairs(out / "dpo.safetensors")) == (differences > middle).sum()
    both = [*BRIGHT, "--voter", "tests.train.raters:redness"]
    done = prefer(folder, out, *both, "--seed", 5, "--combine", "rank")
    assert done.exit_code == 0, done.output
    pairs = load_pairs(out / "dpo.safetensors")
    assert pairs.votes.shape[2] == 2
    assert pairs.scores.max() <= 1


def copy(source: Path, target: Path) -> None:
    for path in source.rglob("*.safetensors"):
        where = target / path.relative_to(source)
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(path.read_bytes())


def test_people_vote_on_png_files(folder, tmp_path):
    done = prefer(folder, tmp_path, "--images")
    assert done.exit_code == 0, done.output
    assert "sampled 20 prompts" in done.output
    assert not (tmp_path / "dpo.safetensors").exists()
    assert len(list((tmp_path / "images").glob("*.png"))) == 20 * SAMPLES
    votes = tmp_path / "votes.jsonl"
    lines = [("00003-2.png", 1), ("00003-2.png", 3), ("images/00003-0.png", 1), ("00017-1", 1)]
    votes.write_text("".join(json.dumps({"image": i, "score": s}) + "\n" for i, s in lines))
    done = prefer(folder, tmp_path, "--images", "--votes", votes)
    assert done.exit_code == 0, done.output
    pairs = load_pairs(tmp_path / "dpo.safetensors")
    assert list(pairs.prompts) == [PROMPTS[3]]
    assert pairs.scores.tolist() == [[2, 1]]
    for codes, name in ((pairs.chosen, "00003-2"), (pairs.rejected, "00003-0")):
        seen = read_image(tmp_path / "images" / f"{name}.png") / 255
        assert (seen - pixels_of(folder, codes)[0]).abs().max() < 1 / 255


def test_ranks_weigh_voters_alike_and_equal_scores_are_no_pair():
    votes = torch.tensor([[[1.0, 900], [2, 100], [2, 500]], [[4, 7], [4, 7], [4, 7]]])
    ranks = combined(votes, "rank")
    torch.testing.assert_close(ranks[0], torch.tensor([0.5, 0.375, 0.625]))
    assert combined(votes, "mean")[0].tolist() == [450.5, 51, 251]
    kept, best, worst = choose(ranks, 0.0)
    assert (kept.tolist(), best.tolist(), worst.tolist()) == ([0], [2], [1])
    partly = torch.tensor([[torch.nan, 1.0, torch.nan], [torch.nan, 1, 0]])
    assert [part.tolist() for part in choose(partly, 0.0)] == [[1], [1], [2]]


def test_what_does_not_fit_is_told_in_one_line(folder, whole, tmp_path):
    def line(*words, inputs=None, out=tmp_path):
        done = prefer(folder, out, *words, inputs=inputs)
        assert done.exit_code == 1, done.output
        (told,) = done.stderr.strip().splitlines()
        return told

    assert "was sampled from other prompts, weights or settings" in line(*BRIGHT, out=whole)
    (tmp_path / "empty.txt").write_text("\n")
    assert "has no prompt" in line(inputs=[tmp_path / "empty.txt"])
    votes = tmp_path / "votes.jsonl"
    votes.write_text('{"image": "00000-0", "score": 1}\n{"image": "x", "score": 1}\n')
    assert f"line 2 of {votes} must read" in line("--votes", votes)
    votes.write_text('{"image": "00020-0", "score": 1}')
    assert "line 1 of" in line("--votes", votes)
    both = [folder / "prompts.txt", tmp_path / "x.parquet"]
    assert "must be one file of prompts, or .parquet files" in line(inputs=both)
    assert "no two images of a prompt differ by more" in line(*BRIGHT, "--gap", 9)
    done = prefer(folder, tmp_path, "--voter", "tests.train.raters:broken")
    assert done.exit_code == 1
    assert "finite" in done.stderr


def test_pairs_of_a_run_train_the_weights_that_sampled_them(folder, whole, tmp_path):
    start = folder / "decoder.safetensors"
    shape = load_decoder(start).settings.model_dump(exclude={"vocabulary"})
    words = [f"model.{name}={value}" for name, value in shape.items()]
    words += [
        f"data.pairs={whole}",
        f"train.start={start}",
        "data.context=128",
        "data.batch_size=2",
    ]
    recipe = load_recipe("dpo-mini", [*words, "train.micro_batch_size=2", "train.steps=1"])
    train_recipe(recipe, tmp_path)
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    assert step["preference_loss"] == pytest.approx(0.6931472, rel=1e-4)


def jpeg(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (*size, 3), generator=random, dtype=torch.uint8)
    out = BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "JPEG")
    return out.getvalue()


@needs_arrow
def test_pairs_of_pick_a_pic_are_encoded_once(folder, tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [
        {"caption": "one", "jpg_0": jpeg(0), "jpg_1": jpeg(1), "label_0": 1.0, "label_1": 0.0},
        {"caption": "two", "jpg_0": jpeg(2), "jpg_1": jpeg(3), "label_0": 0.0, "label_1": 1.0},
        {"caption": "tie", "jpg_0": jpeg(4), "jpg_1": jpeg(5), "label_0": 0.5, "label_1": 0.5},
        {"caption": "bad", "jpg_0": b"no", "jpg_1": jpeg(5), "label_0": 0.0, "label_1": 1.0},
        {
            "caption": "wide",
            "jpg_0": jpeg(6, (16, 32)),
            "jpg_1": jpeg(7, (16, 32)),
            "label_0": 1.0,
            "label_1": 0.0,
        },
        {
            "caption": "mixed",
            "jpg_0": jpeg(6, (16, 32)),
            "jpg_1": jpeg(7),
            "label_0": 1.0,
            "label_1": 0.0,
        },
    ]
    path, sizes = tmp_path / "pick.parquet", ["--min-pixels", 256, "--max-pixels", 256]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    done = prefer(folder, tmp_path / "out", *sizes, inputs=[path])
    assert done.exit_code == 0, done.output
    for words in ("1 ties", "1 damaged rows", "1 pairs of two sizes"):
        assert words in done.output
    pairs = load_pairs(tmp_path / "out" / "dpo-8x8.safetensors")
    assert list(pairs.prompts) == ["one", "two"]
    vision = load_vision(folder / "vision.safetensors")
    chosen = [
        preprocess(Image.open(BytesIO(jpeg(n))), min_pixels=256, max_pixels=256) for n in (0, 3)
    ]
    assert torch.equal(pairs.chosen.long(), vision.encode(torch.stack(chosen)))
    others = [p.name for p in (tmp_path / "out").glob("dpo-*") if p.name != "dpo-8x8.safetensors"]
    assert len(others) == 1
    before = (tmp_path / "out" / "dpo-8x8.safetensors").read_bytes()
    done = prefer(folder, tmp_path / "out", *sizes, inputs=[path])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "dpo-8x8.safetensors").read_bytes() == before
    parquet.write_table(arrow.table({"caption": ["one"]}), path)
    done = prefer(folder, tmp_path / "out2", inputs=[path])
    assert "must have the columns jpg_0" in done.stderr
