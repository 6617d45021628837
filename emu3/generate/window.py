"""Windows of path decoding: what a forward feeds, and which of its codes are final. Integers alone.

An image or clip is a sequence of slots: codes in raster order, EOL after each row, EOF after each
frame. A window feeds the last final code (its root), the slots after it with drafts for codes, and
siblings: other drafts of the next code, which attend to the same tokens and end their branch.

The code of a position is a function of the seed and of the codes before it, the draw of
:func:`emu3_kernels.sample_guided`. A draft is final if it is what is drawn in its context, so the
codes are those of plain decoding whatever the drafts are.

``B`` images, ``T`` nodes of a window: a chain of ``M`` slots and ``F - 1`` siblings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emu3.cache import MOST_NEW
from emu3.config import Vocabulary

_MOST_FORK = 8


@dataclass(frozen=True)
class Window:
    """How many tokens a forward feeds for each image."""

    size: int = 1
    """T, up to 64; 1 decodes one code a forward."""
    fork: int | None = None
    """F, drafts of the next code; None is a quarter of the size, at most 8."""

    @property
    def drafts(self) -> int:
        return min(_MOST_FORK, max(1, self.size // 4)) if self.fork is None else self.fork

    def check(self, frames: int) -> None:
        """Raise unless a window fits a forward and its chain reaches the next code."""
        chain = 2 if frames == 1 else 3  # the last code of a row, EOL, and EOF in a clip
        if not (self.size == 1 or chain <= self.size <= MOST_NEW):
            raise ValueError(
                f"generate: a window must be 1 or {chain} to {MOST_NEW} tokens, got {self.size}"
            )
        if not 1 <= self.drafts <= max(1, self.size - chain + 1):
            raise ValueError(
                f"generate: a window of {self.size} tokens must have a fork of 1 to "
                f"{max(1, self.size - chain + 1)} drafts, got {self.drafts}"
            )


PLAIN = Window()
"""One code a forward."""


class Layout:
    """Slots and codes of images or clips of ``shapes``: frames, rows and columns of each.

    Methods take and return ``[B, X]`` int64.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        sizes = torch.tensor(shapes, device=device)
        frames, height, self.width = sizes.split(1, dim=1)
        self.area = height * self.width
        self.num_codes = frames * self.area
        self._frame = self.area + height + 1

    def slot(self, code: Tensor) -> Tensor:
        return code + code // self.width + code // self.area

    def code(self, slot: Tensor) -> Tensor:
        """The code in a slot; after an EOL or EOF the next one."""
        inside = slot % self._frame
        return slot // self._frame * self.area + inside - inside // (self.width + 1)

    def ends_row(self, slot: Tensor) -> Tensor:
        """Whether a slot holds EOL."""
        return slot % self._frame % (self.width + 1) == self.width

    def ends_frame(self, slot: Tensor) -> Tensor:
        """Whether a slot holds EOF."""
        return slot % self._frame == self._frame - 1


class Nodes(NamedTuple):
    """What one forward feeds, the chain first."""

    tokens: Tensor
    """``[B, T]`` ids."""
    depths: Tensor
    """``[B, T]`` int64, positions after the length of the row."""
    mask: Tensor
    """``[B, T]`` int64 words of :func:`emu3_kernels.decode_attention`."""
    places: Tensor
    """``[B, T]`` int64, the code that a node predicts; -1 if none."""
    drafts: Tensor
    """``[B, M]`` int64, the code in each slot of the chain."""
    follows: Tensor
    """``[B, M]`` int64, the first code after each slot of the chain."""
    forces: Tensor
    """``[B, M]`` bool, whether EOL or EOF follows a slot of the chain."""
    fork: Tensor
    """``[B, 1]`` int64, the node that predicts the next code: the root, or EOL or EOF after it."""


class Kept(NamedTuple):
    """What is final after a forward."""

    counts: Tensor
    """``[B]`` int64, tokens before the new root that were fed."""
    source: Tensor
    target: Tensor
    """``[B]`` int64: the node at ``source`` belongs at ``target``; both are 0 if none moves."""
    decided: Tensor
    """``[B, T]`` bool, the nodes that predicted final codes."""


class Paths:
    """Final codes and drafts of ``B`` images, updated in place on the device.

    Args:
        layout: of the images.
        most_codes: of the largest image.
        window: of more than one token.
        ids: the vocabulary.
    """

    def __init__(self, layout: Layout, most_codes: int, window: Window, ids: Vocabulary) -> None:
        batch, device = len(layout.width), layout.width.device
        self.layout, self.ids = layout, ids
        self.num_chain = window.size - window.drafts + 1
        self.codes = torch.full((batch, most_codes + window.size + 1), -1, device=device)
        """Final up to ``known``, then drafts, -1 where there is none; the last column is unused."""
        self.known = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        """``[B, 1]``, final codes of each image."""
        self.siblings = torch.full((batch, window.drafts - 1), -1, device=device)
        """Drafts of the next code beside that in ``codes``."""
        self._index = torch.arange(window.size + 1, device=device)
        words = [_signed((2 << i) - 1) for i in range(self.num_chain)]
        bits = [_signed(1 << i) for i in range(self.num_chain, window.size)]
        self._words = torch.tensor(words, device=device).expand(batch, -1)
        self._bits = torch.tensor(bits, dtype=torch.int64, device=device)

    def begin(self, first: Tensor) -> None:
        """Set the first code ``[B]`` of each image."""
        self.codes[:, 0] = first
        self.known.fill_(1)

    def nodes(self) -> Nodes:
        """Lay out the next window of each image."""
        layout, ids, num_chain = self.layout, self.ids, self.num_chain
        root = layout.slot(self.known - 1)
        slots = root + self._index[: num_chain + 1]
        codes, eol, eof = layout.code(slots), layout.ends_row(slots), layout.ends_frame(slots)
        follows, forces = codes[:, 1:], (eol | eof)[:, 1:]
        drafts = self.codes.gather(1, codes[:, :-1])
        above = self.codes.gather(1, (codes[:, :-1] - layout.width).clamp(min=0))
        # A code that no node has predicted yet is drafted as the one above it, or as the root.
        drafts = drafts.where(drafts >= 0, above)
        drafts = drafts.where(drafts >= 0, drafts[:, :1]).clamp(min=0)
        chain = (drafts + ids.visual_start).masked_fill(eol[:, :-1], ids.eol)
        chain = chain.masked_fill(eof[:, :-1], ids.eof)
        # After the last code of all come EOL and EOF, for which a chain may be too short.
        fork = (layout.slot(self.known) - root - 1).clamp(max=num_chain - 1)
        siblings = self.siblings.clamp(min=0) + ids.visual_start
        depths = self._index[:num_chain].expand_as(chain), (fork + 1).expand_as(siblings)
        # A sibling predicts the code after its own, but at the end of a row.
        after = self.known + 1
        places = self._predicted(follows, forces), self._predicted(after, after % layout.width == 0)
        return Nodes(
            torch.cat((chain, siblings), 1),
            torch.cat(depths, 1),
            torch.cat((self._words, self._words.gather(1, fork) | self._bits), 1),
            torch.cat((places[0], places[1].expand_as(siblings)), 1),
            drafts,
            follows,
            forces,
            fork,
        )

    def walk(self, nodes: Nodes, picks: Tensor) -> Kept:
        """Take the final codes of ``picks``, and drafts for the next window.

        Args:
            nodes: what was fed.
            picks: ``[B, T, F]``, what is drawn at the places of the nodes, the draw itself first.
        """
        known, num_chain, unused = self.known, self.num_chain, self.codes.shape[1] - 1
        predicts, first = nodes.places >= 0, picks[..., 0]
        drawn = first[:, :num_chain]
        # Whether the slot after each one of the chain holds what is final; up to the last such one.
        right = nodes.forces | ((drawn == nodes.drafts.roll(-1, 1)) & predicts[:, :num_chain])
        last = right[:, :-1].long().cumprod(1).sum(1, keepdim=True)
        # A sibling is right only if the chain's draft is not: they differ.
        hits = (self.siblings == drawn.gather(1, nodes.fork)) & predicts[:, num_chain:]
        hits &= self.siblings >= 0
        hit, source = hits.any(1, keepdim=True), (hits * self._index[num_chain:-1]).sum(1)
        decided = predicts & torch.cat((self._index[:num_chain] <= last, hits), 1)
        self.codes.scatter_(1, nodes.follows.where(predicts[:, :num_chain], unused), drawn)
        bonus = first.gather(1, source[:, None])
        self.codes.scatter_(1, (known + 1).where(hit, unused), bonus)
        root = self.layout.slot(known - 1)
        reached = nodes.follows.gather(1, last) + ~nodes.forces.gather(1, last)
        known.copy_(torch.where(hit, known + 2, reached).minimum(self.layout.num_codes))
        counts = self.layout.slot(known - 1) - root
        self._branch(picks, root)
        return Kept(counts[:, 0], source, ((nodes.fork + 1) * hit)[:, 0], decided)

    def _predicted(self, follows: Tensor, forces: Tensor) -> Tensor:
        """The codes that nodes predict: -1 before EOL or EOF, and beyond the last code."""
        return follows.masked_fill(forces | (follows >= self.layout.num_codes), -1)

    def _branch(self, picks: Tensor, root: Tensor) -> None:
        """Take siblings of the next code from the node that predicted it, if there was one."""
        node = self.layout.slot(self.known) - 1 - root
        there = (node < self.num_chain) & (self.known < self.layout.num_codes)
        at = node.clamp(max=self.num_chain - 1)[..., None].expand(-1, -1, picks.shape[2] - 1)
        self.siblings.copy_(picks[..., 1:].gather(1, at)[:, 0].where(there, -1))


def _signed(word: int) -> int:
    """64 bits as an int64."""
    return (word + 2**63) % 2**64 - 2**63
