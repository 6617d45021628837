"""The loops of a kernel, found in its machine code: what one thread executes in one iteration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


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
    continues: bool = True
    """Whether the next one may follow: not after an exit or a branch that is always taken."""


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
class _Straight:
    """Instructions of which all or none are executed."""

    members: list[Instruction]
    before: list[int]
    """What may come before it, and after."""
    after: list[int]


def blocks(code: Iterable[str | Instruction]) -> tuple[Block, ...]:
    """Return the block outside all loops, then each loop in the order of the code.

    A string in ``code`` is a label. A branch back closes a loop if its target is on every way to
    it: not if it returns to the middle of one, as code behind the end of a kernel does that waits
    for a barrier. A branch to itself, which pads the end, closes none.
    """
    parts = _straight(code)
    dominators = _dominators(parts)
    loops: dict[int, set[int]] = {}
    for i, part in enumerate(parts):
        for first in part.after:
            if dominators[i] >> first & 1 and (first != i or len(part.members) > 1):
                loops.setdefault(first, {first}).update(_between(parts, first, i))
    # No loop is as large as all, which -1 makes larger.
    found = [{-1, *range(len(parts))}, *(loops[first] for first in sorted(loops))]
    members: list[list[Instruction]] = [[] for _ in found]
    for i, part in enumerate(parts):
        around = [n for n, loop in enumerate(found) if i in loop]
        innermost = min(around, key=lambda n: len(found[n]))
        members[innermost] += part.members
    return tuple(
        Block(
            depth=sum(loop <= other for other in found) - 1,
            instructions=len(own),
            loads=sum(x.loads for x in own),
            stores=sum(x.stores for x in own),
            flops=sum(x.flops for x in own),
        )
        for loop, own in zip(found, members, strict=True)
    )


def _straight(code: Iterable[str | Instruction]) -> list[_Straight]:
    """Cut ``code`` where branches go to and come from."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for item in code:
        if isinstance(item, str):
            labels[item] = len(instructions)
        else:
            instructions.append(item)
    end = len(instructions)
    targets = [labels.get(x.target, end) for x in instructions]
    cuts = {0, end} | set(targets)
    cuts |= {i + 1 for i, x in enumerate(instructions) if targets[i] < end or not x.continues}
    bounds = sorted(cut for cut in cuts if cut <= end)
    nth = {first: n for n, first in enumerate(bounds[:-1])}
    parts = [_Straight(instructions[a:b], [], []) for a, b in pairwise(bounds)]
    for n, (part, last) in enumerate(zip(parts, bounds[1:], strict=True)):
        ways = [targets[last - 1], *([last] if part.members[-1].continues else [])]
        part.after = [nth[way] for way in dict.fromkeys(ways) if way < end]
        for way in part.after:
            parts[way].before.append(n)
    return parts


def _dominators(parts: Sequence[_Straight]) -> list[int]:
    """Return for each part a bit for every part that is on all ways to it.

    Ways begin at the first part and at those that nothing known leads to: an indirect branch does.
    """
    everything = (1 << len(parts)) - 1
    found = [everything] * len(parts)
    changed = True
    while changed:
        changed = False
        for i, part in enumerate(parts):
            common = everything if i and part.before else 0
            for before in part.before if i else ():
                common &= found[before]
            common |= 1 << i
            changed |= common != found[i]
            found[i] = common
    return found


def _between(parts: Sequence[_Straight], first: int, last: int) -> set[int]:
    """Return the parts from which ``last`` is reached without ``first``."""
    between, left = {first}, [last]
    while left:
        if (i := left.pop()) not in between:
            between.add(i)
            left += parts[i].before
    return between
