"""The loss curve on disk."""

from emu3.train.metrics import Metrics, read_metrics


def test_lines_after_the_checkpoint_are_cut_also_half_written_ones(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(5):
        metrics.log(step, {"loss": 1 / (step + 1)}, seconds=100.0)
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as lines:
        lines.write('{"step": 5, "lo')
    Metrics(tmp_path, 3).close()
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]
    assert path.read_text().endswith("\n")


def test_losses_keep_every_bit(tmp_path):
    loss = 0.1 + 2**-50
    metrics = Metrics(tmp_path, 0)
    metrics.log(0, {"loss": loss}, seconds=1.0)
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": loss}]


def test_the_clock_goes_to_tensorboard_alone(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.log(0, {"loss": 1.0}, seconds=123.0)
    metrics.close()
    assert "123" not in (tmp_path / "metrics.jsonl").read_text()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_run_that_logged_nothing_has_no_curve(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
