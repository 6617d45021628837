"""The terms of a contract: which of them the machine code of a launch breaks."""

from collections.abc import Iterator
from dataclasses import dataclass

from emu3_kernels.runtime.contracts import Contract
from emu3_kernels.testing.chips import CHIPS
from emu3_kernels.testing.machine_code import Facts

HGMMAS_PER_WAIT = 2
"""Fewer, and ptxas has serialised them: each then waits for the one before (its warning C7515)."""

FILLED = "sm_90"
"""The target whose SMs every launch must fill: that of the GPU which the sizes are chosen for."""


@dataclass(frozen=True)
class Compiled:
    """One launch compiled for one target."""

    facts: Facts
    target: str
    programs: int | None = None
    """Of the launch; None if it is not known."""
    triton: str = ""
    """Version, major and minor: ``3.6``; none made the kernels of CUDA C++."""


def judge(contract: Contract, compiled: Compiled) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the terms of ``contract`` that are broken: without an exception, and with one."""
    broken = dict(_broken_terms(contract, compiled))
    reasons = {
        term: reason
        for key, reason in contract.exceptions.items()
        for where, _, term in [key.rpartition(": ")]
        if where in (compiled.target, f"{compiled.target}, triton {compiled.triton}")
    }
    if contract.few_programs and "programs" in broken:
        reasons["programs"] = contract.few_programs
    refused = {term: what for term, what in broken.items() if term not in reasons}
    excused = {term: reason for term, reason in reasons.items() if term in broken}
    for term in reasons.keys() - broken.keys():
        refused[term] = f"kept, so the exception on {compiled.target} must go"
    return _lines(refused), _lines(excused)


def _lines(terms: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{term}: {what}" for term, what in terms.items())


def _broken_terms(contract: Contract, compiled: Compiled) -> Iterator[tuple[str, str]]:
    facts, chip = compiled.facts, CHIPS[compiled.target]
    if facts.stack or facts.spills:
        yield "spills", f"must be none, got {facts.spills} and {facts.stack} bytes of stack"
    if facts.shared > chip.shared_limit:
        yield "shared", f"must be at most {chip.shared_limit} bytes, got {facts.shared}"
    if facts.registers > contract.max_registers:
        yield "registers", f"must be at most {contract.max_registers}, got {facts.registers}"
    yield from _narrow_accesses(contract, facts)
    matrix_ops = sum(facts.matrix_ops.values())
    if contract.tensor_cores and not matrix_ops:
        yield "tensor_cores", "must be used, got no matrix opcode"
    if facts.matrix_waits * HGMMAS_PER_WAIT > matrix_ops:
        yield (
            "serialised",
            f"must wait once for {HGMMAS_PER_WAIT} HGMMA or more, "
            f"got {facts.matrix_waits} waits for {matrix_ops}",
        )
    if contract.async_copies and not facts.async_copies:
        yield "async_copies", "must be used, got none"
    yield from _idle_sms(contract, compiled)


def _idle_sms(contract: Contract, compiled: Compiled) -> Iterator[tuple[str, str]]:
    num_sms, programs = CHIPS[FILLED].gpu.num_sms, compiled.programs
    if compiled.target == FILLED and programs is not None and programs < num_sms:
        yield "programs", f"must fill {num_sms} SMs, got {programs}"


def _narrow_accesses(contract: Contract, facts: Facts) -> Iterator[tuple[str, str]]:
    scalars = {"loads": contract.scalar_loads, "stores": contract.scalar_stores}
    for way, allowed in scalars.items():
        accesses = getattr(facts, way)
        narrow = sum(n for width, n in accesses.items() if width < contract.access_bytes)
        if narrow > allowed:
            yield (
                way,
                f"must be {contract.access_bytes} bytes wide but for {allowed}, "
                f"got {listed(accesses)}",
            )


def listed(counts: dict) -> str:
    """Write counts as ``2x16 1x4``: two of 16 bytes, one of 4."""
    return " ".join(f"{n}x{what}" for what, n in sorted(counts.items(), reverse=True)) or "-"
