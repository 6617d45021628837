"""Training on ranks of torchrun that die: ``python -m tests.e2e.rank_kills`` kills many more."""

import pytest

from tests.e2e.dying_rank import Death
from tests.e2e.rank_kills import faults, torchrun
from tests.train.pretraining import write_data


@pytest.mark.e2e
@pytest.mark.distributed
def test_torchrun_continues_after_a_rank_died_in_a_step_and_another_in_a_save(tmp_path):
    """Curve and weights are those of the unbroken run, byte for byte."""
    write_data(tmp_path)
    words = "parallel.shard=2", "train.steps=4"
    torchrun(2, tmp_path, tmp_path / "whole", [], *words)
    deaths = [Death(1, "step", 6), Death(0, "save", 3)]
    printed = torchrun(2, tmp_path, tmp_path / "run", deaths, *words)
    assert printed.count("wrote ") == 1
    assert faults(tmp_path / "run", tmp_path / "whole") == []
