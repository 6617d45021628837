"""Training from token stores: one process, or four that make the same steps."""

import gzip
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Emu3ForCausalLM, Emu3TextConfig

from emu3 import tasks
from emu3.config import PRESETS
from emu3.data.stream import StoreStream
from emu3.model import Emu3
from emu3.settings import SettingsError
from emu3.tasks import load_recipe
from emu3.train import sharded
from emu3.train.flops import num_gemm_weights, step_flops
from emu3.train.guard import Guard
from emu3.train.metrics import read_metrics
from emu3.train.pretrain_loop import pretrain as train
from emu3.train.sharded import checkpoints
from emu3.train.store_recipe import GuardSettings
from emu3.weights import load_decoder, official_views
from tests.ranks import Ranks
from tests.train.pretraining import (
    Killed,
    assert_same_run,
    before_step,
    killed,
    on_rank,
    poisoned,
    stopped_after,
    tiny,
    write_data,
)
from tests.train.stores import IDS, mixed_documents, write_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """An unbroken run of six steps."""
    train(tiny(folder), folder / "whole")
    return folder / "whole"


def test_a_run_learns_and_leaves_weights_and_the_last_checkpoints(whole):
    losses = [step["loss"] for step in read_metrics(whole / "metrics.jsonl")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert [path.name for path in checkpoints(whole)] == ["step-4", "step-6"]
    assert load_decoder(whole / "pretrain.safetensors").settings.num_layers == 1


def test_the_validation_loss_is_that_of_the_saved_weights(folder, whole):
    """By modality, against plain PyTorch on whole logits."""
    recipe, model = tiny(folder), load_decoder(whole / "pretrain.safetensors")
    of = recipe.evaluation
    data = recipe.data.model_copy(update={"sources": of.sources, "batch_size": of.rows})
    ids, weights, documents = StoreStream(data, IDS, 0).next_batch()
    hidden = model(ids[:, :-1], document_ids=documents[:, :-1])
    targets, weights = ids[:, 1:], weights[:, 1:].double()
    logits = (hidden @ model.head.weight.T).double()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view_as(targets)
    valid, is_visual = weights > 0, targets >= IDS.visual_start
    expected = {
        "validation_loss": (losses * weights).sum() / weights.sum(),
        "validation_text_loss": losses[valid & ~is_visual].mean(),
        "validation_vision_loss": losses[valid & is_visual].mean(),
    }
    last = read_metrics(whole / "metrics.jsonl")[-1]
    for name, value in expected.items():
        assert last[name] == pytest.approx(value.item(), rel=1e-5), name


def test_hugging_faces_class_loads_the_weights_and_gives_the_same_logits(folder, whole):
    """By their names, q, k, v, gate and up apart; nothing is missing or left over."""
    settings = tiny(folder).model
    config = Emu3TextConfig(
        vocab_size=settings.vocabulary.size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        rms_norm_eps=settings.norm_eps,
        pad_token_id=settings.vocabulary.pad,
    )
    theirs, weights = Emu3ForCausalLM(config).eval(), whole / "pretrain.safetensors"
    theirs.load_state_dict(load_file(weights))
    ours = load_decoder(weights)
    ids = StoreStream(tiny(folder).data, IDS, 0).next_batch()[0][:, :64]
    with torch.no_grad():
        logits, expected = ours.head(ours(ids)), theirs(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_that_was_killed_at_any_step_continues_as_if_it_never_was(
    folder, whole, tmp_path, monkeypatch, step
):
    """Dropout, order, packing, moments, learning rate: the same bytes."""
    before_step(monkeypatch, step, killed)
    with pytest.raises(Killed):
        train(tiny(folder), tmp_path)
    monkeypatch.undo()
    train(tiny(folder), tmp_path, resume=bool(checkpoints(tmp_path)))
    assert_same_run(tmp_path, whole)


def test_micro_batches_add_up_to_the_step(folder, whole, tmp_path):
    """Also with dropout: rows are numbered as in the step."""
    train(tiny(folder, "train.micro_batch_size=2"), tmp_path)
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (tmp_path, whole))
    for a, b in zip(found, expected, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_sigterm_saves_and_exits_with_0(folder, whole, tmp_path, monkeypatch):
    before_step(monkeypatch, 2, lambda _run: os.kill(os.getpid(), signal.SIGTERM))
    recipe = tiny(folder, "train.save_every=100")
    with pytest.raises(SystemExit) as left:
        train(recipe, tmp_path)
    assert left.value.code == 0
    (saved,) = checkpoints(tmp_path)
    assert saved.name in ("step-3", "step-4")
    monkeypatch.undo()
    train(recipe, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(folder, tmp_path, monkeypatch):
    poisoned(monkeypatch, {2})
    before = {}

    def keep(run):
        before.update((n, p.to_local().clone()) for n, p in run.model.named_parameters())

    before_step(monkeypatch, 2, keep)
    weights = train(tiny(folder, "train.steps=3"), tmp_path)
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [step["skipped"] for step in steps] == [0, 0, 1]
    assert "grad_norm" not in steps[-1]
    after = load_decoder(weights).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_steps_that_are_skipped_in_a_row_end_the_run(folder, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(2, 99)))
    with pytest.raises(ValueError, match=r"^train: step 4: 3 steps in a row were skipped"):
        train(tiny(folder, "guard.limit=3"), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2", "step-4"]


def test_a_spike_is_skipped_and_does_not_move_the_mean():
    guard = Guard(GuardSettings(spike=3.0, warmup_steps=2), torch.device("cpu"))
    norms = [1.0, 5.0, 1.0, 9.0, 2.0, math.inf, math.nan]
    found = [guard.skips(torch.tensor(1.0), torch.tensor(norm)).item() for norm in norms]
    assert found == [0, 0, 0, 1, 0, 1, 1]
    again = Guard(guard.settings, torch.device("cpu"))
    again.restore(guard.state())
    assert {name: int(value) for name, value in again.metrics().items()} == {
        "skipped": 3,
        "in_a_row": 2,
    }
    assert again.state()["mean"] == pytest.approx((1 + 5 + 1 + 2) / 4)


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


MESHES = [
    ["parallel.shard=4"],
    ["parallel.replicate=2", "parallel.tensor=2"],
    ["parallel.context=2", "parallel.shard=2", "train.micro_batch_size=2"],
]


@pytest.mark.distributed
@pytest.mark.parametrize("words", MESHES, ids=" ".join)
def test_four_processes_make_the_steps_of_one(ranks, folder, whole, tmp_path, words):
    """The same rows, the same dropout, and the same validation loss, to float32."""
    ranks.run(on_rank, str(folder), str(tmp_path), words, False)
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (tmp_path, whole))
    for a, b in zip(found, expected, strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


@pytest.mark.distributed
def test_a_run_continues_on_another_mesh_and_on_one_process(ranks, folder, whole, tmp_path):
    """With other settings of the machine, and stores that were moved."""
    words = ["parallel.shard=2", "parallel.tensor=2"]
    ranks.run(stopped_after, str(folder), str(tmp_path), words, 2)
    moved = tmp_path / "moved"
    (folder / "store").rename(moved)
    try:
        train(tiny(folder, f'data.sources=[{{store="{moved}"}}]'), tmp_path, resume=True)
    finally:
        moved.rename(folder / "store")
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (tmp_path, whole))
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r".") as fault:
        call()
    (line,) = str(fault.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("model.hidden_size=16", "model.hidden_size was 32, is 16"),
        ("data.context=64", "data.context was 96, is 64"),
        ("train.steps=7", "train.steps was 6, is 7"),
        ("optim.lr=1e-4", "optim.lr was 0.003, is 0.0001"),
    ],
)
def test_another_recipe_does_not_continue_a_run(folder, whole, word, line):
    message = refused(lambda: train(tiny(folder, word), whole, resume=True))
    assert message == f"resume: {whole / 'step-6'} belongs to another recipe: {line}"


def test_a_folder_that_holds_a_run_needs_resume_and_one_that_holds_none_refuses_it(
    folder, whole, tmp_path
):
    assert "already holds a run; resume it" in refused(lambda: train(tiny(folder), whole))
    assert "no run in" in refused(lambda: train(tiny(folder), tmp_path, resume=True))


def copy_of(whole: Path, folder: Path) -> Path:
    return Path(shutil.copytree(whole, folder))


def test_a_damaged_checkpoint_is_named(folder, whole, tmp_path):
    run = copy_of(whole, tmp_path / "run")
    for path in (run / "step-6").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    assert refused(lambda: train(tiny(folder), run, resume=True)).startswith(
        f"resume: {run / 'step-6'} is damaged: "
    )


def test_a_store_that_changed_does_not_continue_a_run(folder, whole, tmp_path):
    write_store(tmp_path / "other", mixed_documents(120, 7), 2)
    recipe = tiny(folder, f'data.sources=[{{store="{tmp_path}/other"}}]')
    assert "a store has changed since" in refused(lambda: train(recipe, whole, resume=True))


def test_a_store_that_is_damaged_on_the_way_ends_the_run_in_a_line(folder, tmp_path):
    """What was saved stays."""
    store = Path(shutil.copytree(folder / "store", tmp_path / "store"))
    data = bytearray((store / "shard-1.bin").read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    (store / "shard-1.bin").write_bytes(data)
    recipe = tiny(folder, f'data.sources=[{{store="{store}"}}]', "train.save_every=1")
    assert "shard-1 is damaged" in refused(lambda: train(recipe, tmp_path / "run"))


def test_a_disk_that_is_full_ends_the_run_in_a_line(folder, tmp_path, monkeypatch):
    """The checkpoint before it stays, and continues."""
    save = sharded.dcp.save

    def full(state, *, checkpoint_id, **settings):
        if checkpoint_id.name.startswith("step-4"):
            raise OSError(28, "No space left on device")
        return save(state, checkpoint_id=checkpoint_id, **settings)

    monkeypatch.setattr(sharded.dcp, "save", full)
    line = refused(lambda: train(tiny(folder), tmp_path))
    assert line == f"train: cannot save step 4 to {tmp_path}: [Errno 28] No space left on device"
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-2"]


def test_a_run_starts_from_weights_of_another_context(folder, whole, tmp_path):
    """As the second stage from the first; a file of another shape is refused."""
    words = [f"train.start={whole / 'pretrain.safetensors'}", "train.steps=1", "optim.lr=1e-9"]
    longer = [*words, "model.max_position_embeddings=512"]
    weights = train(tiny(folder, *longer), tmp_path / "run")
    first, second = (load_decoder(path) for path in (whole / "pretrain.safetensors", weights))
    assert second.settings.max_position_embeddings == 512
    torch.testing.assert_close(second.head.weight, first.head.weight)
    other = tiny(folder, *words, "model.hidden_size=16")
    assert "is of another configuration" in refused(lambda: train(other, tmp_path / "other"))


def test_settings_that_do_not_fit_are_named(folder):
    for word, line in (
        ("train.vision_weight=1", "train: vision_weight of a stage that reads stores is"),
        ("data.context=512", r"data.context \(512\) must be at most model.max_position_embeddings"),
        ("train.micro_batch_size=3", r"data.batch_size \(4\) must be a multiple of 1 data ranks x"),
        ("train.profile=[3, 1]", "train: profile must be a first and a last step"),
    ):
        with pytest.raises(SettingsError, match=f"^{line}"):
            tiny(folder, word)


def test_a_profile_is_a_trace_of_the_steps_that_were_asked_for(folder, tmp_path):
    train(tiny(folder, "train.steps=3", "train.profile=[1, 1]"), tmp_path)
    with gzip.open(tmp_path / "trace-1-1.json.gz") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("linear_cross_entropy" in name for name in names)


def test_flops_count_the_weights_of_gemms_and_the_pairs_of_attention():
    with torch.device("meta"):
        weights = official_views(Emu3(PRESETS["8b"]))
    matrices = sum(w.numel() for n, w in weights.items() if w.ndim > 1 and "embed_tokens" not in n)
    assert num_gemm_weights(PRESETS["8b"]) == matrices
    pairs = 8 * 9 // 2
    assert step_flops(PRESETS["8b"], 8, pairs) == 6 * matrices * 8 + 3 * 4 * 32 * 4096 * pairs


def test_a_stage_of_one_process_is_refused_under_torchrun(tmp_path, monkeypatch):
    """Each of them would train the same."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(lambda: tasks.train(load_recipe("vision"), tmp_path / "run"))
    assert message == "train: the stage vision runs on one process, got 2 of torchrun"
