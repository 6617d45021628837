"""The benchmark of training steps: every entry trains on the same documents, packed or padded."""

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import machine, run
from benchmarks.report import pages
from benchmarks.suites import train
from benchmarks.suites.model import emu3, hugging_face

WORDS = [
    "data.context=512",
    "data.batch_size=3",
    "train.micro_batch_size=1",
    "model.num_layers=2",
    "model.init_std=0.3",  # a loss that depends on what is attended to
]


@pytest.fixture(scope="module")
def recipe():
    return train.recipe_of("stage2-mini", WORDS)


@pytest.fixture(scope="module")
def made(recipe):
    return train.steps_of(recipe, documents=64, steps=3)


def learned(steps):
    """Every document's first token, and all tokens with a loss and their weights."""
    found = [
        (ids[weights > 0].tolist(), weights[weights > 0].tolist()) for ids, weights, _ in steps
    ]
    return sorted(pair for ids, weights in found for pair in zip(ids, weights, strict=True))


def test_packed_and_padded_rows_hold_the_same_tokens_with_a_loss(made):
    assert learned(made.packed) == learned(made.padded) == learned(made.sorted)
    assert len(made.packed) == len(made.padded) == len(made.sorted)
    for padded in made.padded:
        assert padded[0][:, 0].unique().numel() <= 2  # BOS, or a piece of a text
    assert {len(rows[0]) for rows in made.padded} == {len(rows[0]) for rows in made.sorted}
    assert made.filled(made.padded) < made.filled(made.packed) <= 1
    assert made.filled(made.padded) < made.filled(made.sorted) <= 1


@pytest.mark.e2e
@pytest.mark.parametrize("mix", train.RECIPES)
def test_padded_rows_of_the_steps_are_as_full_as_those_of_the_run(mix):
    """A text pads every document of its step: without one, padding costs nothing."""
    recipe = train.recipe_of(mix)
    some, more = (train.steps_of(recipe, steps=steps) for steps in (train.STEPS, 4 * train.STEPS))
    assert some.filled(some.padded) == pytest.approx(more.filled(more.padded), rel=0.1)
    assert some.filled(some.padded) < 0.6


def test_unequal_documents_leave_most_of_padded_rows_empty():
    """Clips of 1 to 12 frames of codes; in the order of length hardly any is left."""
    recipe = train.recipe_of(train.UNEQUAL)
    made = train.steps_of(recipe, documents=512, steps=32, unequal=True)
    lengths = [int(n) for _, _, numbers in made.padded for n in numbers.eq(0).sum(1)]
    assert min(lengths) < 80
    assert max(lengths) > 480
    assert made.filled(made.padded) < 0.6 < 0.8 < made.filled(made.sorted)
    assert made.filled(made.packed) > 0.95


def test_ours_and_hugging_faces_have_one_loss_packed_and_padded(recipe, made):
    theirs = hugging_face(recipe.model, torch.float32)
    ours = emu3(recipe.model, theirs)
    losses = [
        train.mean_loss(ours, train.ours_packed, made.packed),
        train.mean_loss(ours, train.ours_padded, made.padded),
        train.mean_loss(theirs, train.theirs_padded, made.padded),
        train.mean_loss(theirs, train.theirs_padded, made.sorted),
        train.mean_loss(theirs, train.theirs_packed, made.packed),
    ]
    assert losses == pytest.approx([losses[0]] * 5, rel=train.SAME_LOSS)
    blind = [(ids, w, torch.zeros_like(documents)) for ids, w, documents in made.packed]
    other = train.mean_loss(ours, train.ours_packed, blind)
    assert other != pytest.approx(losses[0], rel=10 * train.SAME_LOSS)


def test_entries_on_the_same_steps_end_at_the_same_weights(recipe, made):
    """Three steps of one optimizer, from the same weights on the same documents."""
    theirs = hugging_face(recipe.model, torch.float64)
    pairs = (
        (made.packed, train.ours_packed, train.theirs_packed),
        (made.padded, train.ours_padded, train.theirs_padded),
    )
    for steps, our_loss, their_loss in pairs:
        ours, other = emu3(recipe.model, theirs), hugging_face(recipe.model, torch.float64)
        train.training(recipe, ours, our_loss, steps)()
        train.training(recipe, other, their_loss, steps)()
        after = our_loss(ours, steps[0]).item(), their_loss(other, steps[0]).item()
        assert after[0] == pytest.approx(after[1], rel=10 * train.SAME_LOSS)


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


def test_a_dry_run_shows_every_entry_of_every_mix_and_writes_nothing(monkeypatch):
    monkeypatch.setattr(run, "time_one", lambda *args: pytest.fail("timed"))
    shown = CliRunner().invoke(front.app, ["train", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    for name in (train.OURS, train.PADDED, train.THEIRS, train.SORTED, train.THEIRS_PACKED):
        assert shown.output.count(name) == len(train.MIXES), shown.output


def test_a_busy_machine_times_no_training(monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    monkeypatch.setattr(run, "run_pytest", lambda *args: pytest.fail("timed under load"))
    assert CliRunner().invoke(front.app, ["train"]).exit_code == 1
