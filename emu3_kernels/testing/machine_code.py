"""Count registers, spills, accesses, loops and opcodes in the machine code of a compiled kernel."""

import re
import struct
import subprocess
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import triton

from emu3_kernels.testing.loops import Block, Instruction, blocks

SASS_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]+)([^;]*)", re.MULTILINE
)
SASS_TARGET = re.compile(r"\b0x([0-9a-f]+)")
SASS_PREDICATE = re.compile(r"\bU?P\d")
SASS_ENDS = {"BRA", "BRX", "EXIT", "RET"}
"""No instruction follows them, unless they are conditional."""
SASS_SUFFIX = {"sm_80": "", "sm_90": "a", "sm_100": "a"}
SASS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
SASS_MATRIX = re.compile(r"(?:HMMA|IMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)$")
SASS_LOADS, SASS_STORES = {"LDG", "LD", "LDGSTS"}, {"STG", "ST"}
SASS_COPY = {"LDGSTS", "UBLKCP", "UTMALDG"}
# A warpgroup of 4 warps multiplies M x N x K together; 16816 is the M, N and K of one warp.
HGMMA_SHAPE = re.compile(r"^(\d+)x(\d+)x(\d+)$")
HMMA_SHAPE = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}

AMD_LINE = re.compile(r"^\.(LBB\d+_\d+):|^\s+([vs]_|global_|buffer_|flat_|ds_)(\S+)(.*)", re.M)
AMD_LABEL = re.compile(r"\.(LBB\d+_\d+)")
AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
AMD_MATRIX = re.compile(r"^\s+(v_s?mfmac?)_", re.MULTILINE)
AMD_SHAPE = re.compile(r"mfmac?_\w*?(\d+)x(\d+)x(\d+)")
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
    matrix_waits: int = 0
    """How often a thread waits for matrix opcodes that run asynchronously."""
    blocks: tuple[Block, ...] = ()
    """What is in no loop, then each loop."""
    num_warps: int = 0
    """Of a program, if the compiler adds warps to those that it is asked for; else 0."""


def nvidia_facts(kernels: Sequence[tuple[bytes, int]], target: str) -> list[Facts]:
    """Count in cubins of ``target`` with a kernel each, by the CUDA tools in the wheel of Triton.

    Args:
        kernels: cubins, each with the bytes of shared memory of its kernel. They are disassembled
            together, since nvdisasm takes half a second to start.
        target: such as ``sm_90``.
    """
    codes = [_code_of(cubin) for cubin, _ in kernels]
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernels")
        usages = []
        for cubin, _ in kernels:
            path.write_bytes(cubin)
            usages.append(_tool("cuobjdump", "-res-usage", path))
        path.write_bytes(b"".join(codes))
        architecture = target.replace("sm_", "SM") + SASS_SUFFIX[target]
        lines = sass_lines(_tool("nvdisasm", "--binary", architecture, path))
    ends = list(accumulate(map(len, codes)))
    parts = [bisect_left(lines, (end,)) for end in [0, *ends]]
    return [
        _sass_facts(lines[start:stop], usage, shared)
        for (start, stop), usage, (_, shared) in zip(pairwise(parts), usages, kernels, strict=True)
    ]


def sass_lines(listing: str) -> list[tuple[int, str, str, str]]:
    """Return address, predicate, mnemonic and operands of each instruction that nvdisasm lists."""
    return [(int(address, 16), *rest) for address, *rest in SASS_LINE.findall(listing)]


def _code_of(cubin: bytes) -> bytes:
    """Return the instructions of the kernel in a cubin, an ELF file of 64 bits."""
    (sections_at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, sections_at + i * size) for i in range(count)]
    # Of a section: offset of its name, type, flags, address, offset and size.
    names_at = sections[names][4]
    codes = [
        cubin[offset : offset + length]
        for name, *_, offset, length in sections
        if cubin.startswith(b".text.", names_at + name)
    ]
    assert len(codes) == 1, f"a cubin must hold one kernel, got {len(codes)}"
    return codes[0]


def _sass_facts(sass: Sequence[tuple[int, str, str, str]], usage: str, shared: int) -> Facts:
    """Count in the lines of a kernel."""
    resources = {name: int(n) for name, n in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    opcodes = [mnemonic.split(".") for _, _, mnemonic, _ in sass]
    names = Counter(opcode[0] for opcode in opcodes)
    assert names["EXIT"], "no machine code was read: nvdisasm prints another format"
    return Facts(
        registers=resources["REG"],
        stack=resources["STACK"],
        spills=names["LDL"] + names["STL"],
        shared=shared,
        loads=_sass_accesses(opcodes, SASS_LOADS),
        stores=_sass_accesses(opcodes, SASS_STORES),
        matrix_ops={name: n for name, n in names.items() if SASS_MATRIX.match(name)},
        async_copies=sum(names[name] for name in SASS_COPY),
        matrix_waits=sum(opcode[:2] == ["WARPGROUP", "DEPBAR"] for opcode in opcodes),
        blocks=blocks(sass_code(sass)),
    )


def sass_code(sass: Sequence[tuple[int, str, str, str]]) -> Iterator[str | Instruction]:
    """The address of an instruction is its label."""
    for address, predicate, mnemonic, operands in sass:
        name, *suffixes = mnemonic.split(".")
        if name == "NOP":
            continue
        yield f"{address:x}"
        target = SASS_TARGET.search(operands) if name == "BRA" else None
        width = _sass_width(suffixes)
        yield Instruction(
            target=target and target[1],
            loads=width if name in SASS_LOADS else 0,
            stores=width if name in SASS_STORES else 0,
            flops=_sass_flops(name, suffixes),
            continues=not _ends(name, suffixes, predicate + operands),
        )


def _ends(name: str, suffixes: list[str], conditions: str) -> bool:
    return name in SASS_ENDS and "DIV" not in suffixes and not SASS_PREDICATE.search(conditions)


def _sass_flops(name: str, suffixes: list[str]) -> int:
    """Count those of a warp; a matrix opcode of sm_100 does not say its shape."""
    if name == "HMMA":
        return 2 * next((HMMA_SHAPE[suffix] for suffix in suffixes if suffix in HMMA_SHAPE), 0)
    shapes = [shape for suffix in suffixes if (shape := HGMMA_SHAPE.match(suffix))]
    return 2 * prod(map(int, shapes[0].groups())) // 4 if name == "HGMMA" and shapes else 0


def _sass_accesses(opcodes: list[list[str]], names: set[str]) -> dict[int, int]:
    """Count the accesses of ``names`` by bytes."""
    return dict(Counter(_sass_width(suffixes) for name, *suffixes in opcodes if name in names))


def _sass_width(suffixes: list[str]) -> int:
    """Return the bytes of an access: 4 unless a suffix says otherwise."""
    return next((SASS_BYTES[suffix] for suffix in suffixes if suffix in SASS_BYTES), 4)


def amd_facts(assembly: str, shared: int) -> Facts:
    """Count in the assembly of an AMD kernel, whose metadata states registers and spills."""
    metadata = {
        name: int(n) for name, n in re.findall(r"^\s+-?\s*\.(\w+):\s+(\d+)$", assembly, re.M)
    }
    accesses = {"load": Counter(), "store": Counter()}
    for way, kind in AMD_ACCESS.findall(assembly):
        accesses[way][_amd_width(kind)] += 1
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
        blocks=blocks(_amd_code(assembly)),
    )


def _amd_code(assembly: str) -> Iterator[str | Instruction]:
    for label, unit, name, operands in AMD_LINE.findall(assembly):
        if label:
            yield label
            continue
        memory = unit in ("global_", "buffer_", "flat_")
        target = AMD_LABEL.search(operands) if "branch" in name else None
        shape = AMD_SHAPE.match(name) if unit == "v_" else None
        yield Instruction(
            target=target and target[1],
            loads=_amd_width(name) if memory and name.startswith("load_") else 0,
            stores=_amd_width(name) if memory and name.startswith("store_") else 0,
            flops=2 * prod(map(int, shape.groups())) if shape else 0,
            continues=unit != "s_" or name not in ("branch", "endpgm"),
        )


def _amd_width(name: str) -> int:
    return next((width for kind, width in AMD_BYTES.items() if kind in name), 4)


def _tool(name: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, check=True, text=True).stdout
