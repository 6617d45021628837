"""The benchmark of guided generation: both draw the same codes greedily, on a tiny model."""

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import machine, run
from benchmarks.suites import generate, model
from benchmarks.tests.test_model import TINY
from emu3.generate import Sampling
from emu3.text import ByteTokenizer

GRID = 3, 2
SETTINGS = TINY.model_copy(update={"max_position_embeddings": 256})
TEXT = ByteTokenizer(SETTINGS.vocabulary)


@pytest.fixture(scope="module")
def both():
    ours, theirs, _ = model.trained_models(SETTINGS, torch.float32)
    return ours.model, theirs.model


def test_both_are_timed_and_draw_an_image_of_the_grid(both):
    entries = generate.entries_of(*both, TEXT, GRID)
    assert list(entries.calls) == [generate.OURS, generate.THEIRS]
    assert entries.calls[generate.OURS]().shape == (1, *GRID)
    ids = entries.calls[generate.THEIRS]()
    end = torch.tensor(SETTINGS.vocabulary.eol)
    assert ids.eq(end).nonzero().flatten().tolist() == [2, 5]  # the last needs no forward
    assert len(generate.codes_of(ids, SETTINGS.vocabulary)) == 6


def test_a_peer_that_draws_other_codes_is_not_timed(both):
    _, theirs = both
    other = model.trained_models(SETTINGS, torch.float32)[0].model
    torch.nn.init.normal_(other.head.weight)
    entries = generate.entries_of(other, theirs, TEXT, GRID)
    assert list(entries.calls) == [generate.OURS]
    assert entries.missing == {generate.THEIRS: "greedy, it draws other codes"}


def test_guidance_and_the_negative_prompt_change_their_codes(both):
    """An unguided peer would do half of the work."""
    ids = SETTINGS.vocabulary
    drawn = [
        generate.codes_of(generate.their_ids(both[1], TEXT, (3, 4), how)(), ids).tolist()
        for how in (
            Sampling(top_k=1, negative=generate.NEGATIVE),
            Sampling(top_k=1, negative="something else"),
            Sampling(top_k=1, guidance=1.0),
        )
    ]
    assert len({tuple(codes) for codes in drawn}) == 3


def test_a_busy_machine_times_no_generation(monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    monkeypatch.setattr(run, "run_pytest", lambda *args: pytest.fail("timed under load"))
    assert CliRunner().invoke(front.app, ["generate"]).exit_code == 1
