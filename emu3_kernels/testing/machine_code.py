"""Count registers, spills, accesses and opcodes in the machine code of one compiled kernel."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import triton

MNEMONIC = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
SASS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
SASS_MATRIX = re.compile(r"(?:HMMA|IMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)$")
SASS_COPY = {"LDGSTS", "UBLKCP", "UTMALDG"}

AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
AMD_MATRIX = re.compile(r"^\s+(v_s?mfmac?)_", re.MULTILINE)
AMD_COPY = re.compile(r"^\s+(?:global|buffer)_load_.*\blds\b", re.MULTILINE)
AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


@dataclass(frozen=True)
class Facts:
    """Counted in the machine code: a thread's registers, an access's bytes, opcodes by name."""

    registers: int
    stack: int
    spills: int
    shared: int
    loads: dict[int, int]
    """How many global loads there are, by their bytes a thread."""
    stores: dict[int, int]
    matrix_ops: dict[str, int]
    async_copies: int


def nvidia_facts(cubin: bytes, shared: int) -> Facts:
    """Count in a cubin, with the CUDA tools in the wheel of Triton."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", path)
        sass = _tool("nvdisasm", "-c", path)
    resources = {name: int(n) for name, n in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    opcodes = [mnemonic.split(".") for mnemonic in MNEMONIC.findall(sass)]
    names = Counter(opcode[0] for opcode in opcodes)
    assert names["EXIT"], "no machine code was read: nvdisasm prints another format"
    return Facts(
        registers=resources["REG"],
        stack=resources["STACK"],
        spills=names["LDL"] + names["STL"],
        shared=shared,
        loads=_sass_accesses(opcodes, {"LDG", "LD", "LDGSTS"}),
        stores=_sass_accesses(opcodes, {"STG", "ST"}),
        matrix_ops={name: n for name, n in names.items() if SASS_MATRIX.match(name)},
        async_copies=sum(names[name] for name in SASS_COPY),
    )


def amd_facts(assembly: str, shared: int) -> Facts:
    """Count in the assembly of an AMD kernel, whose metadata states registers and spills."""
    metadata = {
        name: int(n) for name, n in re.findall(r"^\s+-?\s*\.(\w+):\s+(\d+)$", assembly, re.M)
    }
    accesses = {"load": Counter(), "store": Counter()}
    for way, kind in AMD_ACCESS.findall(assembly):
        accesses[way][next(n for name, n in AMD_BYTES.items() if name in kind)] += 1
    assert "s_endpgm" in assembly, "no machine code was read: Triton prints another format"
    return Facts(
        registers=metadata["vgpr_count"],
        stack=metadata["private_segment_fixed_size"],
        spills=metadata["vgpr_spill_count"] + metadata["sgpr_spill_count"],
        shared=shared,
        loads=dict(accesses["load"]),
        stores=dict(accesses["store"]),
        matrix_ops=dict(Counter(AMD_MATRIX.findall(assembly))),
        async_copies=len(AMD_COPY.findall(assembly)),
    )


def _sass_accesses(opcodes: list[list[str]], names: set[str]) -> dict[int, int]:
    """Count the accesses of ``names`` by bytes: 4 unless a suffix says otherwise."""
    return dict(
        Counter(
            next((SASS_BYTES[suffix] for suffix in suffixes if suffix in SASS_BYTES), 4)
            for name, *suffixes in opcodes
            if name in names
        )
    )


def _tool(name: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, check=True, text=True).stdout
