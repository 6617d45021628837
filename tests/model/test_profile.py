"""emu3 profile: what it counts, that its rows add up, and what it leaves on disk."""

import json

import pytest
import torch

from emu3.cache import KeyValueCache
from emu3.tools.profile.cost import Cost, Machine
from emu3.tools.profile.report import write_report
from emu3.tools.profile.run import contexts_up_to, count, decode_call, prefill_call, run_profile
from emu3_kernels import use_backend
from tests.model.tiny import TINY, tiny_model


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("profile")
    settings = {"context": 96, "prefill": 32, "against": "reference", "repeats": 1}
    profile = run_profile(TINY, out=out, dtype=torch.float32, **settings)
    write_report(profile, out)
    return profile, out


def test_contexts_are_powers_of_two_and_the_longest():
    assert contexts_up_to(131072) == [1024 << i for i in range(8)]
    assert contexts_up_to(3000) == [1024, 2048, 3000]
    assert contexts_up_to(5) == [5]


def test_the_rows_of_a_call_add_up_to_its_time(found):
    for anatomy in found[0].breakdowns:
        assert sum(row.seconds for row in anatomy.rows) == pytest.approx(anatomy.seconds)
        names = {row.name for row in anatomy.rows}
        assert {"aten::mm", "outside ops"} <= names
        assert all(row.seconds >= 0 for row in anatomy.rows), "an op was counted twice"


def test_a_decode_counts_the_weights_and_the_keys_it_reads():
    model, context = tiny_model(), 50
    cache = KeyValueCache(TINY, 1, 64, dtype=torch.float32)
    with torch.no_grad():
        costs = count(decode_call(model, cache, context)).costs
    token = 4 * TINY.num_kv_heads * TINY.head_dim
    q = 4 * TINY.num_heads * TINY.head_dim
    attended = costs["emu3_kernels::decode_attention"]
    assert attended.num_bytes == TINY.num_layers * (2 * q + 2 * context * token)
    assert attended.flops == TINY.num_layers * 4 * TINY.num_heads * TINY.head_dim * context
    weights = [p for p in model.blocks.parameters() if p.dim() == 2]
    visual = TINY.vocabulary.num_visual * TINY.hidden_size
    assert costs["aten::mm"].flops == 2 * (sum(p.numel() for p in weights) + visual)
    inputs_and_results = sum(sum(p.shape) for p in weights) + TINY.vocabulary.num_visual
    inputs_and_results += TINY.hidden_size
    assert costs["aten::mm"].num_bytes == costs["aten::mm"].flops * 2 + 4 * inputs_and_results


def test_a_launch_of_triton_counts_what_it_moves():
    """On a GPU, its kernels are no ops of PyTorch: the table had no bytes for them."""
    context, rows = 50, 2
    cache = KeyValueCache(TINY, rows, 64, dtype=torch.float32)
    with torch.no_grad(), use_backend("triton"):
        counted = count(decode_call(tiny_model(), cache, context))
    token = 4 * TINY.num_kv_heads * TINY.head_dim
    q = 4 * TINY.num_heads * TINY.head_dim
    attended = counted.costs["decode_attention_kernel"]
    assert attended.num_bytes == TINY.num_layers * rows * (2 * q + 2 * context * token)
    appended = counted.costs["rope_append_kernel"]
    assert appended.num_bytes == TINY.num_layers * rows * 2 * (q + 2 * token)
    assert counted.launches["swiglu_fwd_kernel"] == TINY.num_layers
    assert counted.launches["decode_attention_kernel"] == TINY.num_layers


def test_a_layer_launches_nine_kernels_on_a_gpu(found):
    profile, out = found
    assert profile.launches["in a layer"] == 9
    assert f"{profile.launches['in all']} in all, 9 in a layer" in (out / "profile.md").read_text()


def test_a_forward_of_many_tokens_is_timed_beside_a_plain_one(found):
    profile, out = found
    assert list(profile.windows) == [1, 8, 16, 32, 64]
    bounds = [bound for _, bound in profile.windows.values()]
    assert bounds == sorted(bounds)
    assert "| 16 | " in (out / "profile.md").read_text()


def test_rows_without_a_partner_are_refused(tmp_path):
    with pytest.raises(ValueError, match="profile: rows must be 1, or pairs with guidance, got 3"):
        run_profile(TINY, context=8, prefill=8, rows=3, out=tmp_path)


def test_a_prompt_counts_the_keys_that_its_tokens_see():
    cache = KeyValueCache(TINY, 1, 64, dtype=torch.float32)
    with torch.no_grad():
        costs = count(prefill_call(tiny_model(), cache, 40)).costs
    seen = 40 * 41 // 2
    flops = TINY.num_layers * 4 * TINY.num_heads * TINY.head_dim * seen
    assert costs["emu3_kernels::attention"].flops == flops


def test_the_bound_is_the_slower_of_memory_and_arithmetic():
    machine = Machine(bytes_per_second=10.0, flops_per_second=100.0)
    assert machine.bound(Cost(20, 100)) == 2.0
    assert machine.bound(Cost(20, 500)) == 5.0


def test_backends_are_timed_beside_each_other(found):
    profile, _ = found
    assert set(profile.decode) == set(profile.prefill) == {"default", "reference"}
    assert list(profile.decode["default"]) == list(profile.bounds) == [96]
    assert profile.peak_bytes > 0


def test_table_figures_image_and_trace_are_written(found):
    profile, out = found
    page = (out / "profile.md").read_text()
    assert "| aten::mm |" in page
    assert page.count("## ") == len(profile.breakdowns)
    assert (
        json.loads((out / "profile.json").read_text())["settings"]["num_layers"] == TINY.num_layers
    )
    assert (out / "time_per_token.png").stat().st_size > 1000
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "emu3_kernels::decode_attention" for event in events)


def test_a_context_beyond_the_positions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^profile: context .* max_position_embeddings 128"):
        run_profile(TINY, context=129, prefill=1, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_is_no_longer_than_the_context(tmp_path):
    """A prompt of 64 into a cache of 8 failed after all decodes were timed."""
    found = run_profile(TINY, context=8, prefill=64, out=tmp_path, dtype=torch.float32, repeats=1)
    assert list(found.prefill["default"]) == [8]
    assert found.breakdowns[1].title == "a prompt of 8"


@pytest.mark.parametrize(
    ("against", "fault", "line"),
    [
        ("nothing", ValueError, "attention: unknown backend 'nothing'; expected one of"),
        ("flash_attn", NotImplementedError, "backend 'flash_attn' cannot run this call"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_before_anything_is_measured(
    against, fault, line, tmp_path, monkeypatch
):
    measured = []
    monkeypatch.setattr(
        "emu3.tools.profile.run.measure_machine", lambda *_: measured.append("machine")
    )
    monkeypatch.setattr("emu3.tools.profile.run.random_model", lambda *_: measured.append("model"))
    with pytest.raises(fault, match=line):
        run_profile(TINY, context=8, prefill=8, out=tmp_path, against=against)
    assert measured == []
