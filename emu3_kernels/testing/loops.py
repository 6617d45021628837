"""The loops of a kernel, found in its machine code: what one thread executes in one iteration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    target: str | None = None
    """The label that a branch goes to."""
    loads: int = 0
    """Bytes of a thread."""
    stores: int = 0
    flops: int = 0
    """Of a warp, by tensor cores."""


@dataclass(frozen=True)
class Block:
    """The instructions of one loop without those of loops inside; ``depth`` 0 is in no loop."""

    depth: int
    instructions: int
    loads: int
    """Bytes that a thread loads from global memory in one iteration."""
    stores: int
    flops: int
    """Of a warp in one iteration, by tensor cores."""


@dataclass
class _Loop:
    first: int
    last: int
    members: list[Instruction] = field(default_factory=list)


def blocks(code: Iterable[str | Instruction]) -> tuple[Block, ...]:
    """Return the block outside all loops, then each loop in the order of the code.

    A string in ``code`` is a label; a branch back to one closes a loop. A branch to itself, which
    pads the end of a kernel, is none.
    """
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    loops: dict[int, int] = {}
    for item in code:
        if isinstance(item, str):
            labels[item] = len(instructions)
            continue
        first = labels.get(item.target)
        if first is not None and first < len(instructions):
            loops[first] = len(instructions)
        instructions.append(item)
    whole = _Loop(-1, len(instructions))
    found = [whole, *(_Loop(first, last) for first, last in sorted(loops.items()))]
    for i, instruction in enumerate(instructions):
        around = [loop for loop in found if loop.first <= i <= loop.last]
        min(around, key=lambda loop: loop.last - loop.first).members.append(instruction)
    return tuple(_block(loop, found) for loop in found)


def _block(loop: _Loop, found: Sequence[_Loop]) -> Block:
    around = [other for other in found if other.first <= loop.first and loop.last <= other.last]
    return Block(
        depth=len(around) - 1,
        instructions=len(loop.members),
        loads=sum(i.loads for i in loop.members),
        stores=sum(i.stores for i in loop.members),
        flops=sum(i.flops for i in loop.members),
    )
