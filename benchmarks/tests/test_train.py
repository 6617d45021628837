"""The benchmark of training steps: every entry trains on the same documents, packed or padded."""

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import machine, run
from benchmarks.report import pages
from benchmarks.suites import train
from benchmarks.suites.model import emu3, hugging_face
from emu3.config import load_recipe
from emu3.train.store_recipe import StoreRecipe

WORDS = [
    "data.context=512",
    "data.batch_size=3",
    "train.micro_batch_size=1",
    "model.num_layers=2",
    "model.init_std=0.3",  # a loss that depends on what is attended to
]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("stage2-mini", WORDS, StoreRecipe)


@pytest.fixture(scope="module")
def made(recipe):
    return train.steps_of(recipe, documents=64, steps=3)


def test_packed_and_padded_rows_hold_the_same_tokens_with_a_loss(made):
    for packed, padded in zip(made.packed, made.padded, strict=True):
        learned = [
            sorted(zip(ids[w > 0].tolist(), w[w > 0].tolist(), strict=True))
            for ids, w, _ in (packed, padded)
        ]
        assert learned[0] == learned[1]
        assert len(padded[0]) > len(packed[0])
        assert padded[0][:, 0].unique().numel() <= 2  # BOS, or a piece of a text
    assert made.filled(made.padded) < made.filled(made.packed) <= 1


def test_ours_and_hugging_faces_have_one_loss_packed_and_padded(recipe, made):
    theirs = hugging_face(recipe.model, torch.float32)
    ours = emu3(recipe.model, theirs)
    for packed, padded in zip(made.packed, made.padded, strict=True):
        losses = [
            train.ours_packed(ours, packed).item(),
            train.ours_padded(ours, padded).item(),
            train.theirs_padded(theirs, padded).item(),
            train.theirs_packed(theirs, packed).item(),
        ]
        assert losses == pytest.approx([losses[0]] * 4, rel=train.SAME_LOSS)
        ids, weights, documents = packed
        blind = train.ours_packed(ours, (ids, weights, torch.zeros_like(documents))).item()
        assert blind != pytest.approx(losses[0], rel=10 * train.SAME_LOSS)


def test_all_entries_end_at_the_same_weights(recipe, made):
    """Three steps of one optimizer, from the same weights on the same documents."""
    theirs = hugging_face(recipe.model, torch.float32)
    after = []
    for loss, rows in ((train.ours_packed, made.packed), (train.ours_padded, made.padded)):
        model = emu3(recipe.model, theirs)
        train.training(recipe, model, loss, rows)()
        after.append(train.ours_packed(model, made.packed[0]).item())
    for loss, rows in ((train.theirs_padded, made.padded), (train.theirs_packed, made.packed)):
        model = hugging_face(recipe.model, torch.float32)
        train.training(recipe, model, loss, rows)()
        after.append(train.theirs_packed(model, made.packed[0]).item())
    assert after == pytest.approx([after[0]] * 4, rel=10 * train.SAME_LOSS)


def test_a_row_names_the_gains_of_packing_and_of_kernels_apart(recipe, made):
    entries = train.Entries()
    taken = {train.OURS: [1.0], train.PADDED: [4.0], train.THEIRS: [6.0]}
    entries.peak_mib = dict.fromkeys(taken, 1.0)
    entries.drop(train.THEIRS_PACKED, "it cannot")
    row = train.row(recipe, made, entries, taken, 1, [0.0, 0.0])
    gains = {name: one["median"] for name, one in row["gains"].items()}
    assert gains == {"packing, ours": 4.0, "kernels, padded": 1.5, "both": 6.0}
    assert row["tokens_per_s"] == made.useful
    assert row["peers"][train.THEIRS]["tokens_per_s"] == pytest.approx(made.useful / 6)
    page = pages.section("train", [{**row, "backend": train.OURS}])
    assert "packing, ours 4.00x" in page
    assert f"packed {made.filled(made.packed):.1%}" in page


def test_a_dry_run_shows_every_entry_of_both_recipes_and_writes_nothing(monkeypatch):
    monkeypatch.setattr(run, "time_one", lambda *args: pytest.fail("timed"))
    shown = CliRunner().invoke(front.app, ["train", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    for name in (train.OURS, train.PADDED, train.THEIRS, train.THEIRS_PACKED):
        assert shown.output.count(name) == 2, shown.output


def test_a_busy_machine_times_no_training(monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    monkeypatch.setattr(run, "run_pytest", lambda *args: pytest.fail("timed under load"))
    assert CliRunner().invoke(front.app, ["train"]).exit_code == 1
