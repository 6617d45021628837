"""Pages of results: every number has a label, targets come first, a run replaces its rows."""

import json

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from benchmarks import __main__ as front
from benchmarks.harness import clock, entries, machine, results, run
from benchmarks.report import charts, gpu_page, pages, tables, targets
from benchmarks.tests.one_row import row, session


def sized(tokens: int, direction: str = "forward", ours: float = 2.0) -> dict:
    """A row of cross_entropy with one peer that takes six milliseconds and much memory."""
    size = {"tokens": tokens, "classes": 184_622, "ignored": False}
    made = row() | {"op": "cross_entropy", "size": size, "direction": direction}
    made |= {"ms": ours, "peak_mib": 90.0}
    ratio = {"median": 6.0 / ours, "min": 1.0, "max": 4.0}
    peer = {"ms": 6.0, "ratio": ratio, "peak_mib": 4327.0, "of_bound": 0.1, "gb_s": 9.0}
    return made | {"peers": {"eager": peer, "torch.compile": peer}}


def published(folder, *rows: dict) -> str:
    path = results.store(folder / "avx2.jsonl", results.of_session(session(*rows)))
    return pages.write_page(folder, "avx2", results.read(path)).read_text()


def test_a_run_replaces_the_rows_it_measured_and_leaves_the_others(tmp_path):
    path = tmp_path / "avx2.jsonl"
    results.store(path, [sized(256), sized(512), row()])
    before = path.read_text().splitlines()
    results.store(path, [sized(512, ours=1.0)])
    after = path.read_text().splitlines()
    changed = [old for old, new in zip(before, after, strict=True) if old != new]
    assert [json.loads(line)["size"]["tokens"] for line in changed] == [512]
    assert [r["ms"] for r in results.read(path)] == [2.0, 1.0, 3000.0]


def test_a_row_is_known_by_the_values_of_its_size():
    renamed = sized(256) | {"size": {"T": 256, "V": 184_622, "ignored": False}}
    assert results.identity(renamed) == results.identity(sized(256))
    assert results.identity(sized(256)) != results.identity(sized(257))


def test_numbers_are_stored_in_six_digits():
    assert results.rounded({"ms": [1.23456789, True], "size": 184_622}) == {
        "ms": [1.23457, True],
        "size": 184_622,
    }


def test_the_first_page_lists_missed_and_reached_targets(tmp_path):
    rows = [sized(256, ours=3.1), sized(256, "forward+backward", ours=1.0)]
    results.store(tmp_path / "avx2.jsonl", results.of_session(session(*rows)))
    page = pages.write_pages(tmp_path).read_text()
    missed, reached = page.split("## Targets missed")[1].split("## Targets reached")
    assert "| 2.0x | **1.94x** | avx2: at 0.62 of the bound |" in missed
    assert "| 2.0x | 6.00x |" in reached
    assert "[avx2](avx2.md)" in page


def test_a_target_that_the_bound_excludes_says_so():
    (target,) = [t for t in targets.TARGETS if t.applies(sized(256))]
    near = sized(256, ours=4.0) | {"of_bound": 0.9}
    assert target.limit(near) == "the bound allows 1.67x"
    assert target.limit(near | {"of_bound": 0.5}) == ""


def test_rows_of_another_source_may_lack_ranges_and_memory(tmp_path):
    theirs = {"tflop_s": 585.0, "ratio": {"median": 0.4}}
    made = results.made_by(machine.facts(), machine.commit(), "2000-01-02")
    plain = row() | {"peers": {"cuDNN": theirs}, "tflop_s": 233.0, "note": "tiles"} | made
    for name in ("ms", "gb_s", "peak_mib", "of_bound", "bound"):
        plain.pop(name)
    page = pages.write_page(tmp_path, "h200", [plain]).read_text()
    assert "| 233.00 TFLOP/s | cuDNN: 585.00 TFLOP/s | 0.40x | tiles |" in page
    assert "| cuDNN | - | 0.40x | 585.00 TFLOP/s | - | - |" in page


def test_a_page_names_machine_peers_and_missing_peers(tmp_path):
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
    assert charts.draw(tmp_path, "avx2", {}) == []
    shown = charts.draw(tmp_path, "avx2", {"swiglu": [row()]})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "avx2-memory.png",
        "avx2-time.png",
    ]
    assert "![Time of each op beside its peers and its bound](avx2-time.png)\n" in shown
    assert imread(tmp_path / "avx2-time.png").std() > 0


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


def test_a_row_reaches_or_misses_a_target():
    (target,) = [t for t in targets.TARGETS if t.applies(sized(256))]
    assert (target.op, target.of, target.value) == ("cross_entropy", "time", 2.0)
    assert target.reached(sized(256, ours=2.9))
    assert not target.reached(sized(256, ours=3.1))
    assert not target.applies(sized(256) | {"device": "cuda"})
    assert "**missed**" in "".join(pages.targets([sized(256, ours=3.1)]))


def test_the_targets_of_a_gpu_are_on_the_page_of_one_alone():
    on_cpu = row() | {"op": "cross_entropy", "size": {"tokens": 4096}, "direction": "forward"}
    assert gpu_page.targets([on_cpu]) == []
    assert "**6666.67x of it**" in "".join(gpu_page.targets([on_cpu | {"device": "cuda"}]))


def test_a_call_has_a_target_in_microseconds_above_an_empty_one(tmp_path):
    token = row() | {"op": "rms_norm", "size": {"num_rows": 1, "width": 4096}}
    assert not [target for target in targets.TARGETS if target.applies(token)]
    for above, verdict in ((4.94, "reached"), (5.06, "**missed**")):
        page = published(tmp_path, token | {"above_empty_us": above})
        assert f"| at most 5 us more | {above:.1f} us more | {verdict} |" in page
        assert f"A call on 1 x 4096, 1 thr., takes {above:.1f} us more than" in page


COUNTED = {
    "label": "COUNTED",
    "triton": "3.8.0",
    "rows": [
        {
            "op": "swiglu",
            "config": "8 x 9",
            "target": "sm_90",
            "num_bytes": 4096,
            "sizes": {"q_ptr": 1024, "num_keys": 512},
            "programs": 264,
            "num_warps": 4,
            "resident": 12,
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
                "matrix_waits": 1,
                "blocks": [
                    {"depth": 0, "instructions": 100, "loads": 32, "stores": 0, "flops": 0},
                    {"depth": 1, "instructions": 50, "loads": 16, "stores": 0, "flops": 256},
                ],
            },
        }
        for kernel, held, excused in [
            ("attention_fwd_kernel", True, ["loads: odd rows"]),
            ("Liger k", False, []),
        ]
    ],
}


def test_machine_code_has_its_own_page(tmp_path):
    (tmp_path / pages.CODEGEN).write_text(json.dumps(COUNTED))
    published(tmp_path, row())
    page = pages.write_pages(tmp_path).read_text()
    assert "[codegen](codegen.md)" in page
    assert "[avx2](avx2.md)" in page
    counted = (tmp_path / "codegen.md").read_text()
    ours, liger = (line for line in counted.splitlines() if "sm_90" in line)
    figures = "| 40 | 32 | 8x16 1x2 | - | 4xHGMMA | 3 |"
    assert ours == f"| **`attention_fwd_kernel`** | 8 x 9 | sm_90 {figures} excused: loads |"
    assert liger == f"| `Liger k` | 8 x 9 | sm_90 {figures} - |"
    # 1,056 warps run 100 instructions once and 50 for each 256 of 1,048,576 FLOPs, in 32 lanes.
    executed = (1056 * 100 + 4096 * 50) * 32 / 1024
    predicted = next(line for line in counted.splitlines() if "| 264 | 12 | 0.17 |" in line)
    assert f"| 4.0 | {executed:.1f} |" in predicted


@pytest.fixture
def suite(monkeypatch):
    """Lists what ``all`` would do."""
    done = []
    monkeypatch.setattr(machine, "load", lambda: 0.0)
    monkeypatch.setattr(run, "time_one", lambda asked, write, show: done.append(str(asked)))
    monkeypatch.setattr(front, "count_all", lambda write: done.append("codegen") or [])
    monkeypatch.setattr(front, "write_pages", lambda results: done.append("report"))
    monkeypatch.setattr(machine, "device", lambda: "cpu")
    monkeypatch.setattr(machine, "cores", lambda: 2)
    return done


def test_one_command_times_counts_and_reports_everything(suite):
    shown = CliRunner().invoke(front.app, ["all"])
    assert shown.exit_code == 0, shown.output
    timed = [f"{op}, 1 and 2 threads" for op in front.OPS if entries.own_backends(op)]
    wholes = [f"{name}, 2 threads" for name in run.WHOLE]
    assert suite == [*timed, *wholes, "codegen", "report"]


def test_one_command_does_nothing_on_a_busy_machine(suite, monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 1.2 * machine.cores())
    assert CliRunner().invoke(front.app, ["all"]).exit_code == 1
    assert suite == []


def test_a_gpu_is_timed_once_by_its_own_clock(suite, monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: "cuda")
    (asked,) = run.runs(["swiglu"], None, 1.0)
    assert str(asked) == "swiglu, GPU"
    assert f"--benchmark-timer={clock.EVENTS.name}" in asked.arguments()
    assert "--scale" in asked.arguments()
