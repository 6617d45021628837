"""Training on preference pairs: the loss, its gradients and memory, resume, four processes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from emu3.cli import app
from emu3.data.pair_stream import PairStream
from emu3.data.pairs import load_pairs, save_pairs, weights_fingerprint
from emu3.model import Emu3
from emu3.settings import SettingsError
from emu3.train import pretrain
from emu3.train.metrics import read_metrics
from emu3.train.preference_recipe import PreferenceRecipe
from emu3.train.preferences import PreferenceTraining
from emu3.train.pretrain_loop import pretrain as train
from emu3.train.ranks import process_group
from emu3.train.sharded import checkpoints
from emu3.weights import load_decoder, save_decoder
from emu3_kernels import linear_cross_entropy
from tests.ranks import Ranks
from tests.train.preferring import make_pairs, tiny, with_reference, write_data

KINDS = {
    "dpo": ["preference.label_smoothing=0.1", "preference.margin=0.2", "preference.beta=0.3"],
    "ipo": ["preference.kind=ipo", "preference.normalize=mean", "preference.beta=0.5"],
    "simpo": ["preference.kind=simpo", "preference.normalize=mean", "preference.beta=20"],
    "no ntp": ["preference.ntp_weight=0"],
}


class Killed(Exception):
    """Ends a run where a kill would."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """An unbroken run of six steps."""
    train(tiny(folder), folder / "whole")
    return folder / "whole"


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r".") as fault:
        call()
    (line,) = str(fault.value).splitlines()
    return line


def exact_loss(model: Emu3, batches: list, of) -> torch.Tensor:
    """The formula on whole logits, image by image, in the dtype of the model."""
    losses, chosen_nll, num_tokens = [], 0.0, 0
    for ids, documents, reference in batches:
        logps = []
        for number in range(2 * int(reference.isfinite()[:, 0].sum())):
            image = ids[documents == number]
            logits = model(image[None, :-1])[0] @ model.head.weight.T
            nll = F.cross_entropy(logits, image[1:], reduction="none")
            nll = nll[image[1:] >= model.settings.vocabulary.visual_start]
            logps.append(-nll.mean() if of.normalize == "mean" else -nll.sum())
            length = len(nll)
            reference[number // 2, number % 2] /= length if of.normalize == "mean" else 1
            if number % 2 == 0:
                chosen_nll, num_tokens = chosen_nll + nll.sum(), num_tokens + length
        for pair, (chosen, rejected) in enumerate(zip(logps[::2], logps[1::2], strict=True)):
            ahead = chosen - rejected
            if of.kind != "simpo":
                ahead = ahead - (reference[pair, 0] - reference[pair, 1])
            z, s = of.beta * ahead - of.margin, of.label_smoothing
            dpo = -(1 - s) * F.logsigmoid(z) - s * F.logsigmoid(-z)
            losses.append((ahead - 1 / (2 * of.beta)) ** 2 if of.kind == "ipo" else dpo)
    return torch.stack(losses).mean() + of.ntp_weight * chosen_nll / num_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_loss_and_the_gradients_of_the_formula_in_float64(folder, kind):
    """Packed rows of several pairs, two micro-batches, weights that have left the reference."""
    recipe = tiny(folder, *KINDS[kind], "train.micro_batch_size=2")
    with process_group("cpu") as device:
        run = PreferenceTraining(recipe, device)
        run.begin()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.to_local().mul_(1.05)
        rows = run.stream.next_batch()
        found = run.accumulate(run.on_device(rows), None)
        gradients = {n: p.grad.full_tensor() for n, p in run.model.named_parameters()}
        weights = {n: p.full_tensor().double() for n, p in run.model.named_parameters()}
    model = Emu3(recipe.model).double()
    model.load_state_dict(weights, strict=False)
    ids, _, documents, reference = rows
    assert reference.shape[1] > 1
    batches = list(zip(ids, documents, reference.clone(), strict=True))
    loss = exact_loss(model, batches, recipe.preference)
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max()
        assert error < 1e-5 * largest, name


def test_the_margin_starts_at_zero_and_grows(folder, whole):
    first, *_, last = read_metrics(whole / "metrics.jsonl")
    assert abs(first["margin"]) < 1e-5
    assert first["preference_loss"] == pytest.approx(0.6931472, rel=1e-5)
    assert abs(first["chosen_change"]) < 1e-4 > abs(first["rejected_change"])
    assert last["margin"] > 0.05
    assert last["pair_accuracy"] > 0.9
    assert last["chosen_change"] > last["rejected_change"]
    assert last["loss"] == pytest.approx(last["preference_loss"] + last["ntp_loss"], rel=1e-6)
    assert last["validation_loss"] > 0
    assert load_decoder(whole / "dpo.safetensors").settings.num_layers == 1


def test_no_tensor_of_all_tokens_and_classes_is_made(tmp_path):
    """A step takes less than a fourth of the float32 logits; with logits it would take 3 of them.

    By default the loss may take 512 MiB, more than the logits of a test.
    """
    recipe = tiny_of_many_classes(tmp_path)
    with process_group("cpu") as device:
        run = PreferenceTraining(recipe, device)
        run.begin()
        run.model.linear_cross_entropy = partial(linear_cross_entropy, memory=32 << 20)
        (batch,) = run.on_device(run.stream.next_batch())
        how = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
        with profile(**how) as recorded:
            run.accumulate([batch], None)
    events = recorded.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    num_tokens = int(batch.rows.weights.sum())
    logits = 4 * num_tokens * recipe.model.vocabulary.size
    peak = max(accumulate(sizes))
    assert num_tokens == 4 * 2 * 256
    assert peak < logits / 4, f"{peak / 2**20:.0f} MiB of {logits / 2**20:.0f}"


def tiny_of_many_classes(folder: Path) -> PreferenceRecipe:
    """Pairs of 16 x 16 codes of 32,768: logits of 271 MB, beside a head of 1 MB."""
    write_data(folder)
    start, of = (folder / f"many{ending}.safetensors" for ending in ("", "_pairs"))
    words = ["model.vocabulary.num_visual=32768", "vision.num_codes=32768", "model.hidden_size=8"]
    words += ["model.num_heads=1", "model.num_kv_heads=1", "model.max_position_embeddings=2560"]
    words += ["data.context=2560", "data.batch_size=1", "evaluation.rows=1"]
    words += [f"data.pairs={of}", f"evaluation.pairs={of}", f"train.start={start}"]
    recipe = tiny(folder, *words)
    save_decoder(start, Emu3(recipe.model))
    pairs = make_pairs(4, grid=(16, 16))
    header = pairs.header.model_copy(update={"vocabulary": recipe.model.vocabulary})
    pairs = replace(pairs, header=header)
    save_pairs(of, with_reference(pairs, start))
    return recipe


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_that_was_killed_continues_as_if_it_never_was(
    folder, whole, tmp_path, monkeypatch, step
):
    make = pretrain.Pretraining.step

    def counted(self, now, batches):
        if now == step:
            raise Killed
        return make(self, now, batches)

    monkeypatch.setattr(pretrain.Pretraining, "step", counted)
    with pytest.raises(Killed):
        train(tiny(folder), tmp_path)
    monkeypatch.undo()
    train(tiny(folder), tmp_path, resume=bool(checkpoints(tmp_path)))
    for name in ("metrics.jsonl", "dpo.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_an_epoch_has_each_pair_once(folder):
    recipe = tiny(folder, "data.batch_size=1")
    stream = PairStream(recipe.data, recipe.model.vocabulary, 0)
    seen, count = [], sum(map(len, stream.rows.files))
    while len(seen) < count:
        ids, weights, documents, reference = stream.next_batch()
        seen += reference[reference.isfinite()].view(-1, 2).tolist()
        assert weights.sum() == (ids >= recipe.model.vocabulary.visual_start).sum()
        assert documents.max() <= 2 * reference.shape[1]
    expected = torch.cat([pairs.reference for pairs in stream.rows.files]).tolist()
    assert sorted(seen) == sorted(expected)


def test_pairs_are_read_as_they_were_written(folder, tmp_path):
    pairs = with_reference(make_pairs(5), folder / "start.safetensors")
    pairs = replace(pairs, prompts=["", "ä", "一", "a b", "x"])
    save_pairs(tmp_path / "dpo.safetensors", pairs)
    found = load_pairs(tmp_path / "dpo.safetensors")
    assert found.header == pairs.header
    assert list(found.prompts) == list(pairs.prompts)
    for name in ("chosen", "rejected", "votes", "scores", "reference"):
        assert torch.equal(getattr(found, name), getattr(pairs, name)), name
    assert all(map(torch.equal, found.ids, pairs.ids))


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(folder, tmp_path):
    model = load_decoder(folder / "start.safetensors")
    first = weights_fingerprint(folder / "start.safetensors")
    save_decoder(tmp_path / "same.safetensors", model)
    assert weights_fingerprint(tmp_path / "same.safetensors") == first
    with torch.no_grad():
        model.head.weight[-1, -1] += 1e-6
    save_decoder(tmp_path / "other.safetensors", model)
    assert weights_fingerprint(tmp_path / "other.safetensors") != first


def test_a_reference_of_other_weights_is_refused(folder, tmp_path):
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_decoder(other, Emu3(tiny(folder).model))
    line = refused(lambda: train(tiny(folder, f"train.start={other}"), tmp_path / "run"))
    assert "must have log-probabilities of the reference" in line
    assert "give it to emu3 prefer --model" in line
    assert not checkpoints(tmp_path / "run")
    bare = tmp_path / "bare.safetensors"
    save_pairs(bare, make_pairs(6))
    line = refused(lambda: train(tiny(folder, f"data.pairs={bare}"), tmp_path / "run"))
    assert ", got none: " in line
    simpo = [f"data.pairs={bare}", "preference.kind=simpo", "train.steps=1"]
    recipe = tiny(folder, *simpo, "evaluation.rows=4", f"evaluation.pairs={bare}")
    train(recipe, tmp_path / "simpo")
    (step,) = read_metrics(tmp_path / "simpo/metrics.jsonl")
    assert "margin" in step
    assert "chosen_change" not in step


def test_pairs_that_changed_do_not_continue_a_run(folder, whole, tmp_path):
    other = tmp_path / "dpo.safetensors"
    save_pairs(other, with_reference(make_pairs(20, 9), folder / "start.safetensors"))
    recipe = tiny(folder, f"data.pairs={other}")
    assert "has changed since" in refused(lambda: train(recipe, whole, resume=True))


def test_settings_and_files_that_do_not_fit_are_named(folder, tmp_path):
    for word, line in (
        ("train.z_loss=1e-4", r"train.z_loss must be 0 with pairs"),
        ("data.context=512", r"data.context \(512\) must be at most"),
        ("data.sources=[]", "data.sources: unknown setting"),
        ("preference.label_smoothing=0.5", "preference.label_smoothing: "),
    ):
        with pytest.raises(SettingsError, match=f"^{line}"):
            tiny(folder, word)
    with pytest.raises(SettingsError, match="ipo must be without margin"):
        tiny(folder, "preference.kind=ipo", "preference.margin=1")
    short = refused(lambda: train(tiny(folder, "data.context=48"), tmp_path))
    assert short.startswith("data: no pair of ")
    gone = refused(lambda: train(tiny(folder, "data.pairs=gone"), tmp_path))
    assert gone == "pairs: no file gone"
    wrong = refused(lambda: load_pairs(folder / "start.safetensors"))
    assert wrong == f"pairs: {folder}/start.safetensors is not a file of pairs"


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_adapters_start_at_the_reference_and_leave_it(folder, tmp_path):
    train(tiny(folder, "lora.rank=2", "train.steps=3", "train.save_every=9"), tmp_path)
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert abs(first["margin"]) < 1e-5 < abs(last["margin"])
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize("words", [["dpo"], ["dpo", "--gpus", "64", "--suggest"]], ids=" ".join)
def test_the_plan_of_8b_fits_cards_of_80_gb_without_pairs(words):
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["train", *words, "--plan"])
    assert done.exit_code == 0, done.output
    assert "589,824" in done.output


def test_the_plan_of_pairs_counts_the_steps_of_an_epoch(folder):
    words = [str(folder / "recipe.toml"), "--plan"]
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["train", *words])
    assert done.exit_code == 0, done.output
    tokens = PairStream(tiny(folder).data, tiny(folder).model.vocabulary, 0).rows.tokens
    assert f"of {tokens:,} tokens" in done.output


def on_rank(_group, folder: str, out: str, words: list[str]) -> None:
    train(tiny(Path(folder), *words), Path(out))


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


MESHES = [
    ["parallel.shard=4"],
    ["parallel.replicate=2", "parallel.tensor=2"],
    ["parallel.context=2", "parallel.shard=2", "train.micro_batch_size=2"],
    ["parallel.context=4", "parallel.context_style=ring", "train.micro_batch_size=4"],
    ["parallel.context=2", "parallel.tensor=2", "parallel.recompute=all"],
]


@pytest.mark.distributed
@pytest.mark.parametrize("words", MESHES, ids=" ".join)
def test_four_processes_make_the_steps_of_one(ranks, folder, whole, tmp_path, words):
    ranks.run(on_rank, str(folder), str(tmp_path), words)
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (tmp_path, whole))
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), name
