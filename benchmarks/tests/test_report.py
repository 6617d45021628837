"""The report of the benchmarks: every figure labelled, charts beside, machine code apart."""

import json

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks import bars, charts, contestants, machine, report, run, tables
from tests.test_benchmarks import row


def sized(tokens: int, direction: str = "forward", ours: float = 2.0) -> dict:
    """A row of cross_entropy with one peer that takes six milliseconds and much memory."""
    size = {"tokens": tokens, "classes": 184_622, "ignored": False}
    written = row() | {"op": "cross_entropy", "size": size, "direction": direction}
    written |= {"ms": ours, "peak_mib": 90.0}
    ratio = {"median": 6.0 / ours, "min": 1.0, "max": 4.0}
    peer = {"ms": 6.0, "ratio": ratio, "peak_mib": 4327.0, "of_bound": 0.1, "gb_s": 9.0}
    return written | {"peers": {"eager": peer, "torch.compile": peer}}


def published(folder, *rows: dict) -> str:
    made = {
        "machine_info": machine.facts(),
        "commit_info": machine.commit(),
        "datetime": "2000-01-02T03:04:05",
        "benchmarks": [{"extra_info": written} for written in rows],
    }
    report.publish(folder, rows[0]["op"], 1, made)
    return report.write_page(folder).read_text()


def test_a_report_names_machine_peers_and_who_is_missing(tmp_path):
    page = published(tmp_path, row())
    assert machine.processor() in page
    assert "| eager | 7e+03 | 2.50x (2.00-3.00) |" in page
    assert "Not timed: vLLM (forward): not installed" in page
    for label in ("MEASURED ms", "COUNTED / MEASURED", "of BOUND", "MEASURED MiB"):
        assert f"| {label} |" in page


def test_a_size_says_what_is_on_and_leaves_out_what_is_off():
    stated = {"tokens": 2048, "shape": [8, 4], "dropped": 0.75, "ignored": False}
    assert tables.size({"size": stated}) == "2048 x [8, 4], dropped 0.75"


def test_charts_are_drawn_where_there_are_rows_for_them(tmp_path):
    assert charts.draw(tmp_path, {}) == []
    shown = charts.draw(tmp_path, {"swiglu": [row()]})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["memory.png", "time.png"]
    assert "![Time of each op beside its peers and its bound](time.png)\n" in shown
    assert imread(tmp_path / "time.png").std() > 0


def test_a_panel_without_a_row_is_blank():
    """Three fit on a line, and a fourth begins another."""
    figure = charts.bars(charts.times({"swiglu": 4 * [row()]})[:1] * 4, charts.ms, True)
    assert [axis.axison for axis in figure.axes] == [True] * 4 + [False] * 2


def test_a_sweep_needs_three_sizes_that_differ_in_one_figure():
    rows = [sized(tokens) for tokens in (2048, 256, 1024)]
    ((heading, name, found),) = charts.sweeps({"cross_entropy": [*rows, sized(9, "backward")]})
    assert name == "tokens"
    assert [r["size"]["tokens"] for r in found] == [256, 1024, 2048]
    assert "classes 184622" in heading
    assert charts.sweeps({"cross_entropy": rows[:2]}) == []


def test_a_bar_is_kept_by_a_row_that_reaches_it():
    covering = [b for b in bars.BARS if b.covers(sized(256))]
    assert [(bar.op, bar.of, bar.at_least) for bar in covering] == [("cross_entropy", "time", 2.0)]
    assert covering[0].kept(sized(256, ours=2.9))
    assert not covering[0].kept(sized(256, ours=3.1))
    assert not covering[0].covers(sized(256) | {"device": "cuda"})
    assert "**missed**" in report.bars([sized(256, ours=3.1)])


def test_a_call_is_held_to_microseconds_above_an_empty_one(tmp_path):
    token = row() | {"op": "rms_norm", "size": {"num_rows": 1, "width": 4096}}
    assert not [bar for bar in bars.BARS if bar.covers(token)]
    for above, verdict in ((4.94, "kept"), (5.06, "**missed**")):
        page = published(tmp_path, token | {"above_empty_us": above})
        assert f"| within 5 us | {above:.1f} us more | {verdict} |" in page
        assert f"a call on 1 x 4096, 1 thr., takes {above:.1f} us more than" in page


COUNTED = {
    "label": "COUNTED",
    "triton": "3.8.0",
    "rows": [
        {
            "op": "swiglu",
            "config": "8 x 9",
            "target": "sm_90",
            "num_bytes": 4096,
            "kernel": kernel,
            "held": held,
            "broken": [],
            "excused": excused,
            "facts": {
                "registers": 40,
                "stack": 0,
                "spills": 0,
                "shared": 32,
                "async_copies": 3,
                "loads": {"2": 1, "16": 8},
                "stores": {},
                "matrix_ops": {"HGMMA": 4},
            },
        }
        for kernel, held, excused in [
            ("_fwd_kernel", True, ["loads: odd rows"]),
            ("Liger k", False, []),
        ]
    ],
}


def test_machine_code_has_a_page_of_its_own_and_is_no_timed_run(tmp_path):
    (tmp_path / report.CODEGEN).write_text(json.dumps(COUNTED))
    published(tmp_path / "avx2", row())
    page = report.write_pages(tmp_path).read_text()
    assert "[codegen](codegen.md)" in page
    assert "[avx2](avx2/README.md)" in page
    counted = (tmp_path / "codegen.md").read_text()
    ours, liger = (line for line in counted.splitlines() if "sm_90" in line)
    figures = "| 40 | 0 | 0 | 32 | 8x16 1x2 | - | 4xHGMMA | 3 | 4,096 |"
    assert ours == f"| **`_fwd_kernel`** | 8 x 9 | sm_90 {figures} excused: loads |"
    assert liger == f"| `Liger k` | 8 x 9 | sm_90 {figures} - |"


@pytest.fixture
def suite(monkeypatch):
    """Everything that ``all`` does, written down instead of done."""
    done = []
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    monkeypatch.setattr(run, "time_one", lambda asked, write: done.append(str(asked)))
    monkeypatch.setattr(front, "count_all", lambda write: done.append("codegen") or [])
    monkeypatch.setattr(front, "write_pages", lambda results: done.append("report"))
    monkeypatch.setattr(machine, "device", lambda: "cpu")
    monkeypatch.setattr(machine, "cores", lambda: 2)
    return done


def test_one_command_times_counts_and_reports_everything(suite):
    shown = CliRunner().invoke(front.app, ["all"])
    assert shown.exit_code == 0, shown.output
    timed = [f"{op}, 1 and 2 threads" for op in front.OPS if contestants.ours(op)]
    assert suite == [*timed, "model, 2 threads", "vision, 2 threads", "codegen", "report"]


def test_one_command_does_nothing_on_a_busy_machine(suite, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    assert CliRunner().invoke(front.app, ["all"]).exit_code == 1
    assert suite == []


def test_a_gpu_is_timed_once_by_its_own_clock(suite, monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: "cuda")
    (asked,) = run.runs(["swiglu"], None, 1.0)
    assert str(asked) == "swiglu, GPU"
    assert "--benchmark-timer=benchmarks.clock.Mark" in asked.arguments()
    assert "--scale" in asked.arguments()
