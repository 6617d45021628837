"""Peers of the benchmark of the ops: checked before they are timed, and named if missing."""

from dataclasses import replace

import pytest
import torch

from benchmarks.harness import bounds, calls, entries
from benchmarks.harness.bounds import COPY, READ
from benchmarks.peers import cpu as peers
from benchmarks.peers import eager, gpu
from benchmarks.tests.one_row import CASE, IN_BFLOAT16
from emu3_kernels.testing import suite
from emu3_kernels.testing.suite import cases, reference

SMALL = {
    "rms_norm": {"num_rows": 2},
    "swiglu": {"num_rows": 2},
    "cross_entropy": {"tokens": 2},
    "linear_cross_entropy": {"tokens": 2, "width": 8, "classes": 33},
}


def test_nothing_is_compiled_for_a_size_of_scale(monkeypatch):
    monkeypatch.setattr(entries, "is_scaling", lambda case: True)
    found = entries.peers_of(replace(CASE, direction="backward"), {}, ())
    with pytest.raises(peers.UnavailableError, match="only show how time and memory grow"):
        found[peers.COMPILED]()


def test_a_peer_that_the_compiler_leaves_as_it_is_is_not_timed_twice(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "swiglu", peers.Peers(eager.swiglu, uncompiled="same"))
    monkeypatch.setattr(entries, "LARGE_RESULT", 0)
    timed = entries.entries_of(CASE)
    assert set(timed.calls) == {"cpu", "eager", READ, COPY, bounds.EMPTY}
    assert timed.missing == {peers.COMPILED: "same"}


def test_a_backend_that_fails_its_check_is_not_timed(monkeypatch):
    right = suite.public("swiglu")
    wrong = lambda gate, up, backend: 1.1 * right(gate, up, backend=backend)  # noqa: E731
    monkeypatch.setattr(suite, "public", lambda op: wrong)
    entries.check.cache_clear()
    with pytest.raises(AssertionError, match="exceeds its budget"):
        entries.entries_of(CASE)
    entries.check.cache_clear()


def test_a_peer_that_cannot_run_is_named_with_its_reason(monkeypatch):
    peers.vllm.cache_clear()
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    entry = peers.Peers(eager.swiglu, peers.PEERS["swiglu"].libraries)
    monkeypatch.setattr(entries, "peers_of", lambda _, inputs, __: uncompiled(entry, inputs))
    timed = entries.entries_of(CASE)
    assert set(timed.calls) == {"cpu", "eager", READ, COPY, bounds.EMPTY}
    assert timed.missing["vLLM"].endswith(peers.VLLM)
    peers.vllm.cache_clear()


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    entry = peers.Peers(lambda gate, up: gate * up)
    monkeypatch.setattr(entries, "peers_of", lambda _, inputs, __: uncompiled(entry, inputs))
    timed = entries.entries_of(CASE)
    assert "eager" not in timed.calls
    assert "exceeds its budget" in timed.missing["eager"]


@pytest.mark.parametrize("op", gpu.PEERS)
def test_a_gpu_peer_that_is_not_installed_is_named_with_what_installs_it(op, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(gpu, "import_module", missing)
    own = ("torch", "SDPA", "cuDNN")  # PyTorch's, which need no installation
    for build in (build for name, build in gpu.PEERS[op].items() if not name.startswith(own)):
        with pytest.raises(peers.UnavailableError, match="cannot be imported: pip install"):
            build()


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "cross_entropy", "linear_cross_entropy"])
def test_liger_takes_what_an_op_of_ours_takes(op, monkeypatch):
    """Its own host code and our adapter run here; its kernels, interpreted or not, do not."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is in the extra bench")
    inputs = cases(op).make(**cases(op).time[0] | SMALL[op], **IN_BFLOAT16)
    launches = []
    launched = lambda *args, **options: launches.append(args)  # noqa: E731
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", launched)
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", launched)
    results = calls.as_tuple(gpu.PEERS[op]["Liger"]()(**inputs))
    assert launches
    plain = calls.as_tuple(reference(op)(**inputs))
    assert [r.shape for r in results] == [r.shape for r in plain]


def test_every_peer_of_a_row_on_a_gpu_has_its_own_inputs(monkeypatch):
    """Liger writes over its inputs: nobody else may see it."""

    def greedy():
        return lambda gate, up: gate.zero_()

    monkeypatch.setattr(gpu, "PEERS", {"swiglu": {"greedy": greedy}})
    inputs = cases("swiglu").make(**CASE.size, dtype=CASE.dtype, device="cpu")
    before = inputs["gate"].clone()
    found = entries.peers_of(replace(CASE, device="cuda"), inputs, inputs["gate"])
    found["greedy"]()()
    assert torch.equal(inputs["gate"], before)


def uncompiled(entry: peers.Peers, inputs: dict) -> dict:
    """The peers of ``entry`` without the compiler, which takes seconds."""
    found = {"eager": lambda: lambda: entry.eager(**inputs)}
    return found | {name: lambda b=build: b(**inputs) for name, build in entry.libraries.items()}
