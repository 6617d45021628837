"""PREDICTED times: loops found in machine code, programs that run at once, and the error."""

import json
from dataclasses import replace

import pytest

if not __import__("importlib").util.find_spec("triton"):
    pytest.skip("triton is not installed: no machine code is counted", allow_module_level=True)

from benchmarks.harness import calibration, prediction, results
from benchmarks.harness.prediction import CARDS, MODEL, Work
from benchmarks.report import codegen_page, gpu_page, pages
from emu3_kernels.testing.chips import CHIPS
from emu3_kernels.testing.loops import Block, Instruction, blocks
from emu3_kernels.testing.machine_code import Facts, sass_code, sass_lines

SASS = """
        /*0000*/                   LDG.E.128 R4, [R2] ;
        /*0010*/                   LDG.E.U16 R4, [R2] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   STG.E.64 [R2], R4 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
        /*0080*/                   NOP ;
"""


def test_loops_are_found_in_the_machine_code():
    assert blocks(sass_code(sass_lines(SASS))) == (
        Block(depth=0, instructions=3, loads=16, stores=0, flops=0),
        Block(depth=1, instructions=3, loads=2, stores=8, flops=0),
        Block(depth=2, instructions=2, loads=0, stores=0, flops=2 * 64 * 128 * 16 // 4),
    )


def test_two_branches_back_to_one_label_are_one_loop():
    code = ["a", Instruction(), Instruction(target="a"), Instruction(), Instruction(target="a")]
    assert [block.instructions for block in blocks(code)] == [0, 4]


def facts(registers: int = 64, shared: int = 0, *found: Block) -> Facts:
    outside = Block(depth=0, instructions=100, loads=64, stores=0, flops=0)
    return Facts(registers, 0, 0, shared, {}, {}, {}, 0, blocks=(outside, *found))


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "programs"),
    [(64, 0, 8, 4), (65, 0, 8, 3), (16, 0, 8, 8), (16, 0, 1, 32), (64, 100 << 10, 4, 2)],
)
def test_the_tightest_limit_decides_how_many_programs_are_resident(
    registers, shared, num_warps, programs
):
    assert CHIPS["sm_90"].resident(facts(registers, shared), num_warps) == programs


def work(programs: int, num_bytes: int = 1 << 30, **counted: int) -> Work:
    return Work(facts(), programs, 8, num_bytes, **counted)


def test_more_bandwidth_and_more_programs_take_less_time():
    times = {card: prediction.microseconds(work(8192), CARDS[card], MODEL) for card in CARDS}
    assert times["H200"] < times["H100"] < times["A100"]
    few = prediction.microseconds(work(32), CARDS["H200"], MODEL)
    assert few > 2 * times["H200"]


def test_waves_quantise_the_time_of_instructions():
    """Five programs fit one SM four at a time: the fifth takes as long as four."""
    sms = CHIPS["sm_90"].gpu.num_sms
    one, two = (
        replace(work(programs * sms, 1), trips=0, facts=facts(64, 0)) for programs in (4, 5)
    )
    issue = replace(MODEL, launch_us=0)
    times = [prediction.microseconds(w, CARDS["H200"], issue) for w in (one, two)]
    assert times[1] == pytest.approx(2 * times[0])


def recorded() -> list[calibration.Measured]:
    return calibration.read((results.RESULTS / pages.CALIBRATION).read_text())


def test_the_median_error_on_the_h200_is_a_quarter_at_most():
    calls = recorded()
    assert len(calibration.compared(calls)) >= 40
    assert calibration.median_error(calls, MODEL) <= 0.25


def test_a_call_that_was_not_fitted_is_predicted_too():
    """Of every fifth call, by a fit to the others."""
    pytest.importorskip("scipy", reason="scipy is in the extra bench")
    calls = calibration.compared(recorded())
    model = calibration.fit([call for i, call in enumerate(calls) if i % 5], MODEL)
    assert calibration.median_error(calls[::5], model) <= 0.25


def test_the_record_repeats_the_times_of_the_page_of_the_h200():
    """But for the tiles of its notes; there a rate stands for the time of attention."""
    rows = results.read(results.RESULTS / "h200.jsonl")
    published = {(row["op"], row["direction"], row["ms"]) for row in rows if "ms" in row}
    calls = [c for c in recorded() if not c.tiles and c.op not in ("attention", "causal_conv3d")]
    for call in calls:
        by_kernel = (call.op, call.direction) == ("rms_norm", "backward")
        assert by_kernel or (call.op, call.direction, call.us / 1e3) in published, call.op


def test_every_target_of_our_kernels_has_a_prediction_of_its_launches():
    rows = json.loads((results.RESULTS / "codegen.json").read_text())["rows"]
    lines = codegen_page.targets(rows).splitlines()[-len(gpu_page.TARGETS) :]
    cells = [line.strip("| ").split(" | ") for line in lines]
    for target, (op, _, direction, launches, ms, us) in zip(gpu_page.TARGETS, cells, strict=True):
        assert (op, direction) == (target.op, target.direction)
        assert (launches == us == "-") == (target.counted is None)
        assert ms == f"{1e3 * target.ms:,.0f}"
    forward, both = (int(c[5].replace(",", "")) for c in cells if c[0] == "cross_entropy")
    assert 0 < forward < both
