"""``emu3 evaluate``: its numbers against their formulas, on the smallest models, and its page.

One file above 400 lines: all tests share one model and its files, which are made once.
"""

import json
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.media import write_image, write_video
from emu3.demo import voters
from emu3.demo.digits import COLORS, DIGITS, at_rest, caption, load_split, render
from emu3.tools.evaluate.answers import Answered
from emu3.tools.evaluate.frechet import Moments, frechet_distance
from emu3.tools.evaluate.generation import judge_generation
from emu3.tools.evaluate.lines import PromptLine, QuestionLine
from emu3.tools.evaluate.perplexity import Modality, measure_perplexity, modalities
from emu3.tools.evaluate.reconstruction import HowSeen, reconstruct_files
from emu3.tools.origin import Origin
from emu3.weights import load
from tests.train.stores import IDS, TEXT, mixed_documents, pair_document, text_document, write_store
from tests.train.tiny_files import tiny_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_files(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(files):
    return load(files[1], vision=files[3])


def evaluate(files, *words):
    return CliRunner().invoke(app, ["evaluate", *files, *map(str, words)])


def picture(path, seed=0, side=8):
    levels = torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, levels.byte())
    return levels.byte()


def write_lines(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_perplexity_equals_its_formula_in_float64(tmp_path, loaded):
    store = write_store(tmp_path, mixed_documents(7), shards=2)
    report = measure_perplexity(loaded, store).report()
    model = loaded.model.double()
    losses = {part: [] for part in Modality}
    try:
        for number in range(len(store)):
            ids = torch.from_numpy(store.find(number)[0].ids(store.find(number)[1]).astype(int))
            with torch.no_grad():
                logits = model(ids[None, :-1])[0] @ model.head.weight.T
            loss = -logits.log_softmax(1)[torch.arange(len(ids) - 1), ids[1:]]
            for part in Modality:
                losses[part] += loss[modalities(ids.numpy(), TEXT)[1:] == part].tolist()
    finally:
        model.float()
    for part in (Modality.TEXT, Modality.IMAGE, Modality.STRUCTURE):
        found = report[part.name.lower()]
        assert found["tokens"] == len(losses[part])
        assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses[part])), rel=1e-4)
    everything = [loss for of in losses.values() for loss in of]
    assert report["all"]["tokens"] == len(everything) == store.tokens - len(store)
    assert report["all"]["perplexity"] == pytest.approx(math.exp(np.mean(everything)), rel=1e-4)
    assert "video" not in report


def test_every_token_has_the_modality_of_what_it_is_part_of():
    ids = pair_document("a cat", (2, 3)).ids
    kinds = modalities(np.array(ids), TEXT)
    head = len(TEXT.encode("2*3")) + 2
    body = [Modality.IMAGE] * 3 + [Modality.STRUCTURE]
    assert kinds.tolist() == [
        Modality.STRUCTURE,
        *[Modality.TEXT] * 5,
        *[Modality.STRUCTURE] * head,
        *body * 2,
        *[Modality.STRUCTURE] * 3,
    ]


def test_codes_of_a_clip_are_video():
    ids = clip_ids_and_image()
    kinds = modalities(np.array(ids), TEXT)
    assert (kinds == Modality.VIDEO).sum() == 2 * 4
    assert (kinds == Modality.IMAGE).sum() == 4


def clip_ids_and_image():
    from emu3.prompt import Clip, document

    clip = Clip(torch.zeros(2, 2, 2, dtype=torch.int64), Fraction(8))
    return document(["one ", clip, torch.ones(2, 2, dtype=torch.int64)], TEXT)


def test_a_text_longer_than_the_context_is_cut_and_an_image_left_out(tmp_path, loaded):
    documents = [text_document(600), pair_document("x", (24, 24)), text_document(9)]
    report = measure_perplexity(loaded, write_store(tmp_path, documents)).report()
    assert (report["documents"], report["left_out"]) == (2, 1)
    assert report["all"]["tokens"] == 512 + 8


def test_a_part_of_a_store_is_spread_over_it(tmp_path, loaded):
    store = write_store(tmp_path, [text_document(5 + number) for number in range(7)])
    for count, tokens in ((1, 4), (3, 4 + 6 + 8), (7, 7 * 7), (9, 7 * 7)):  # of 0, 2 and 4; of all
        report = measure_perplexity(loaded, store, count).report()
        assert (report["documents"], report["all"]["tokens"]) == (min(count, 7), tokens)


class Shifted:
    """A vision tokenizer that adds 10 levels to every pixel."""

    def __init__(self, vision):
        self.settings, self.codebook = vision.settings, vision.codebook

    def encode(self, pixels):
        self.pixels = pixels
        shape = pixels.shape[:-3] if pixels.ndim == 4 else (len(pixels), pixels.shape[1] // 4)
        return torch.zeros(*shape, 4, 4, dtype=torch.int64)

    def decode(self, codes):
        return self.pixels + 10 / 127.5


def test_a_known_error_has_its_psnr(tmp_path, loaded):
    for number in range(3):
        levels = torch.full((3, 16, 16), 50 + number, dtype=torch.uint8)
        write_image(tmp_path / f"{number}.png", levels)
    write_video(tmp_path / "clip.mp4", [torch.full((3, 16, 16), 90, dtype=torch.uint8)] * 6, 8)
    found = reconstruct_files([tmp_path], Shifted(loaded.vision), HowSeen(16))
    report = found.report()
    assert report["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert (report["files"], report["frames"], report["codes_used"]) == (4, 9, 1)
    assert found.shown[0][2].equal(found.shown[0][1] + 10)


def test_equal_images_are_counted_and_not_in_the_mean(tmp_path, loaded, monkeypatch):
    exact = Shifted(loaded.vision)
    exact.decode = lambda codes: exact.pixels
    picture(tmp_path / "a.png")
    report = reconstruct_files([tmp_path], exact, HowSeen(16)).report()
    assert report["exact_files"] == 1
    assert "psnr" not in report
    assert report["of_each"][0]["psnr"] is None


def test_generated_images_are_those_of_the_prompts_and_judged_with_them(loaded):
    seen = []

    def judge(images, prompts):
        seen.append((images, tuple(prompts)))
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    lines = [
        PromptLine(prompt="one", tag="short", choices=("o",)),
        PromptLine(prompt="three", tag="long", choices=("sixteen",)),
    ]
    judged = judge_generation(loaded, lines, {"length": judge}, Origin(seed=4), count=2, batch=3)
    report = judged.report()
    assert report["images"] == 4
    assert report["judges"]["length"] == {
        "mean": 4.0,
        "by_tag": {"long": 5.0, "short": 3.0},
        "choice_accuracy": 0.5,
        "choice_accuracy_by_tag": {"long": 0.0, "short": 1.0},
    }
    alone = judge_generation(loaded, lines[1:], {"length": judge}, Origin(seed=6), batch=1)
    assert alone.shown[0].equal(judged.shown[2])  # the seed counts up over all images
    assert seen[0][1] == ("one", "one", "three")
    assert seen[0][0].min() >= 0
    assert seen[0][0].max() <= 1


def test_lines_of_geneval_are_compared_within_their_tag(loaded):
    def judge(images, prompts):
        return torch.tensor([float("cat" in prompt) for prompt in prompts])

    lines = [
        PromptLine(prompt=f"a {of}", tag="object", include=({"class": of, "count": 1},))
        for of in ("cat", "dog")
    ]
    lines.append(PromptLine(prompt="a sea", tag="other"))
    judges = {"cat": judge, "alike": lambda images, prompts: torch.ones(len(images))}
    report = judge_generation(loaded, lines, judges, Origin()).report()
    assert "choice_accuracy" not in report["judges"]["alike"]
    assert report["judges"]["cat"]["choice_accuracy"] == 0.5
    assert report["judges"]["cat"]["choice_accuracy_by_tag"] == {"object": 0.5}


def test_the_demos_judges_are_voters():
    digits = load_split(0.25)[1]
    chosen = torch.arange(len(digits))[:40]
    colors = chosen % len(COLORS)
    images = (render(digits[chosen].scans, colors, at_rest(40), 48) + 1) / 2
    labels = digits[chosen].labels
    right = [caption(int(d), int(c)) for d, c in zip(labels, colors, strict=True)]
    wrong = [caption(int(d + 1) % len(DIGITS), int(c)) for d, c in zip(labels, colors, strict=True)]
    assert voters.digit(images, right).mean() > 0.9
    assert voters.color(images, right).mean() == 1
    assert voters.digit(images, wrong).mean() < 0.1
    with pytest.raises(ValueError, match='a prompt must read "a red seven" for digits, got'):
        voters.digit(images[:1], ["a cat"])


class Embedding:
    """A CLIP whose embedding of an image is its mean colours."""

    width = 3

    def images(self, images):
        return images.mean((2, 3))


def test_the_frechet_distance_is_that_of_two_gaussians():
    """Of covariances that commute: the squared distances of means and of standard deviations."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    n = len(signs)
    one, other = Moments(Embedding()), Moments(Embedding())
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    one.add_embeddings(signs * a @ turn)
    other.add_embeddings((signs * b + torch.tensor([0.0, 4.0, 3.0])) @ turn)
    expected = 25 + n / (n - 1) * (a - b).square().sum().item()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-5)


def test_generated_images_are_compared_with_real_ones(tmp_path, loaded):
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    how = HowSeen(8, clip=Embedding())
    found = reconstruct_files([tmp_path], loaded.vision, how)
    assert found.real.count == found.made.count == 3
    assert found.report()["frechet_clip"] == frechet_distance(found.real, found.made) > 0
    lines = [PromptLine(prompt=words) for words in ("a", "b")]
    judged = judge_generation(loaded, lines, {}, Origin(), real=found.real)
    made = Moments(Embedding())
    made.add(torch.stack(list(judged.shown.values())))
    assert judged.report()["frechet_clip"] == pytest.approx(frechet_distance(found.real, made))


@pytest.mark.parametrize(
    ("answer", "right", "is_right"),
    [
        ("Seven.", "seven", True),
        ("  a  red\nseven ", "A red seven.", True),
        ("seventeen", "seven", False),
        ("", "seven", False),
        ("two", ("one", "two"), True),
    ],
)
def test_an_answer_is_right_if_it_matches_exactly(answer, right, is_right):
    line = QuestionLine(question="which?", answer=right)
    assert Answered([line], [answer]).right == [is_right]


def answering(monkeypatch, *answers):
    """Whatever is asked; the prompts are returned."""
    prompts, left = [], list(answers)

    def answer(model, text, asked, most):
        prompts.extend(asked)
        return [left.pop(0) for _ in asked]

    monkeypatch.setattr("emu3.tools.evaluate.answers.generate_text", answer)
    return prompts


def test_questions_are_asked_about_their_files_and_counted(tmp_path, files, monkeypatch):
    from emu3.prompt import parse_document

    picture(tmp_path / "in/a.png")
    lines = write_lines(
        tmp_path / "q.jsonl",
        {"question": "which", "image": "in/a.png", "answer": "seven", "tag": "digit"},
        {"question": "both", "images": ["in/a.png", "in/a.png"], "answer": ["x", "no"]},
        {"question": "red", "answer": "yes", "tag": "digit"},
    )
    prompts = answering(monkeypatch, " Seven.", " no", " green")
    done = evaluate(files, "--questions", lines, "--out", tmp_path / "out", "--batch", 2)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/evaluation.json").read_text())["answers"]
    assert report == {
        "accuracy": pytest.approx(2 / 3, abs=1e-6),
        "by_tag": {"digit": 0.5},
        "questions": 3,
    }
    kinds = [
        [type(part).__name__ for part in parse_document([*ids, IDS.eos], TEXT)] for ids in prompts
    ]
    assert kinds == [["str", "Tensor", "str"], ["str", "Tensor", "Tensor", "str"], ["str"]]


def test_one_run_measures_all_and_its_page_needs_nothing_else(tmp_path, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_judges", sys.modules[__name__])
    for number in range(2):
        picture(tmp_path / f"in/{number}.png", number)
    write_store(tmp_path / "store", mixed_documents(4))
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "a <b> cat", "tag": "x"})
    questions = write_lines(
        tmp_path / "q.jsonl", {"question": "<i>", "image": "in/0.png", "answer": "&"}
    )
    words = ["--images", tmp_path / "in", "--prompts", prompts, "--judge", "my_judges:bright"]
    words += ["--questions", questions, "--store", tmp_path / "store", "--max-tokens", 4]
    done = evaluate(files, *words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert set(report) == {"model", "reconstruction", "generation", "answers", "perplexity"}
    assert report["reconstruction"]["files"] == 2
    page = (tmp_path / "out/evaluation.html").read_text()
    assert page.count("data:image/") == 2 * 2 + 1 + 1
    assert "a &lt;b&gt; cat" in page
    assert "<i>" not in page
    assert "http" not in page
    assert "<script" not in page


def bright(images, prompts):
    return images.mean((1, 2, 3))


def test_a_tokenizer_alone_reconstructs(tmp_path, files):
    picture(tmp_path / "in/0.png", side=16)
    words = [*files[2:], "--images", tmp_path / "in", "--area", 256, "--out", tmp_path / "out"]
    done = evaluate([], *words)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert report["reconstruction"]["of_each"][0]["size"] == [16, 16]


def test_a_file_that_cannot_be_read_costs_itself(tmp_path, files):
    picture(tmp_path / "in/0.png")
    (tmp_path / "in/1.png").write_bytes(b"no image")
    done = evaluate(files, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "emu3: image: " in done.stderr
    report = json.loads((tmp_path / "out/evaluation.json").read_text())["reconstruction"]
    assert (report["files"], report["failed_files"]) == (1, 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "evaluate: --images, --prompts, --questions or --store must say what to evaluate"),
        (["--store", "{tmp}", "--clip", "{tmp}"], "evaluate: --clip compares with --images"),
        (["--prompts", "{tmp}/p.jsonl"], "evaluate: --prompts and --judge must come together"),
        (["--questions", "{tmp}/none"], "[Errno 2] No such file or directory: '{tmp}/none'"),
        (["--questions", "{tmp}/bad.jsonl"], "evaluate: {tmp}/bad.jsonl line 2: must be a JSON"),
        (
            ["--questions", "{tmp}/p.jsonl"],
            "evaluate: {tmp}/p.jsonl line 1: question: Field required",
        ),
        (["--questions", "{tmp}/gone.jsonl"], "image: {tmp}/gone.png cannot be read: No such"),
        (["--images", "{tmp}/none"], "no file or folder {tmp}/none"),
        (["--store", "{tmp}"], "store: no shard in {tmp}: no file ends in .idx"),
        (["--images", "{tmp}/x.png", "--fps", "x"], "fps: must be frames per second"),
        (
            ["--prompts", "{tmp}/p.jsonl", "--judge", "clip:{tmp}"],
            "voter: no file {tmp}/tokenizer_config.json",
        ),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(tmp_path, files, words, told):
    write_lines(tmp_path / "p.jsonl", {"prompt": "a cat"})
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n[1]\n')
    write_lines(
        tmp_path / "gone.jsonl",
        {"question": "a", "answer": "b", "image": str(tmp_path / "gone.png")},
    )
    words = [word.format(tmp=tmp_path) for word in words]
    done = evaluate(files, *words, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"emu3: {told.format(tmp=tmp_path)}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_is_named_where_one_is_needed(tmp_path, files):
    picture(tmp_path / "0.png")
    done = evaluate([], "--images", tmp_path, "--out", tmp_path / "out")
    assert done.stderr == "emu3: evaluate: --model or --vision must be given\n"
    write_store(tmp_path / "store", mixed_documents(2))
    words = ["--store", tmp_path / "store", "--out", tmp_path / "out"]
    assert evaluate(files[2:], *words).stderr == "emu3: evaluate: --model must be given\n"
    done = evaluate(files, *words, "--weights", "int8")
    told = "emu3: evaluate: perplexity needs a decoder that is not quantized\n"
    assert (done.exit_code, done.stderr) == (1, told)


def test_a_store_of_another_vocabulary_is_refused(tmp_path, loaded):
    from emu3.data.store import Document, Kind, Store, write_shard
    from tests.train.stores import MADE

    other = IDS.model_copy(update={"num_visual": IDS.num_visual + 1})
    made = MADE.model_copy(update={"vocabulary": other})
    write_shard(tmp_path / "a", [Document([1, 2], Kind.TEXT)], made)
    with pytest.raises(ValueError, match="must have the vocabulary of the model"):
        measure_perplexity(loaded, Store(tmp_path))
