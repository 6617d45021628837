"""The order of the chunks on a GPU, whose GEMMs have extents that are multiples of 64.

cuBLAS reads 16 bytes at a time only where every contiguous extent of a GEMM is a multiple of 8:
for V = 184,622 it reached 240 to 458 TFLOP/s of 811 (measured on an H200). So GEMMs take whole
multiples of 128 classes, and the fewer than 128 last ones with rows of zeros.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3_kernels.ops.loss.chunking import (
    CLASSES_IN_DHEAD,
    TOKENS_OF_DHIDDEN,
    aligned,
    gpu_chunking,
    gpu_memory,
    starts_in_dhead,
    whole,
)
from emu3_kernels.ops.loss.chunks import Run, Tokens
from emu3_kernels.runtime.gemm import mm_


class Chunk(NamedTuple):
    """Classes from ``first`` to ``end``, and where their logits are stored."""

    first: int
    end: int
    memory: Tensor
    """``[N, C]``, C a multiple of 64: more than the classes for the last ones alone."""
    kept: bool
    """Whether the logits are still there when gradients are computed."""

    @property
    def logits(self) -> Tensor:
        return self.memory[:, : self.end - self.first]


class GpuRun(Run):
    """Stores as many logits in dhead as fit, before it is computed, and the rest in a buffer."""

    def go(self) -> None:
        num_tokens, width = len(self.valid), self.hidden.shape[1]
        memory, wants_head = self.settings.memory, self.dhead is not None
        if memory is None:
            memory = gpu_memory(self.hidden, shared=self.settings.group != "", grows=wants_head)
        kind = (width, self.hidden.dtype, memory)
        plan = gpu_chunking(num_tokens, self.settings.largest, *kind, wants_head=wants_head)
        num_classes = self.head.shape[0]
        self.end = whole(num_classes)
        ragged = num_classes - self.end
        self.last_rows = F.pad(self.head[self.end :], (0, 0, 0, aligned(ragged) - ragged))
        if plan.sums_dhead or not wants_head:
            self.by_tokens(plan.tokens, sums_dhead=plan.sums_dhead)
        elif num_tokens:
            self.by_classes(plan.classes)

    def gemms(self, chunk: Chunk) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns of a chunk, and the rows of the head of the same aligned extent."""
        split = max(0, min(chunk.end, self.end) - chunk.first)
        if split:
            yield slice(0, split), self.head[chunk.first : chunk.first + split]
        if chunk.end > self.end:
            yield slice(split, None), self.last_rows

    def write_logits(self, chunk: Chunk, tokens: Tokens) -> None:
        for columns, head in self.gemms(chunk):
            mm_(chunk.memory[:, columns], tokens.hidden, head.t())

    def add_to_dhidden(self, dhidden: Tensor, chunk: Chunk, block: slice = slice(None)) -> None:
        for columns, head in self.gemms(chunk):
            mm_(dhidden, chunk.memory[block, columns], head, add=True)

    def by_tokens(self, size: int, *, sums_dhead: bool) -> None:
        """Take chunks of tokens, each with all classes: no GEMM runs twice."""
        num_tokens, num_classes = len(self.valid), self.head.shape[0]
        padded = self.end + len(self.last_rows)
        buffer = self.hidden.new_empty(min(size, num_tokens), padded)
        dhead = None
        if sums_dhead:
            dhead = self.head.new_zeros((padded, self.head.shape[1]), dtype=torch.float32)
        for first in range(0, num_tokens, size):
            tokens = Tokens(self, self.valid[first : first + size])
            chunk = Chunk(0, num_classes, buffer[: len(tokens.index)], kept=True)
            self.write_logits(chunk, tokens)
            tokens.add(chunk.logits, 0)
            tokens.write_losses()
            if dhead is None and self.dhidden is None:
                continue
            tokens.to_gradient_(chunk.logits, 0)
            if dhead is not None:
                mm_(dhead, chunk.memory.t(), tokens.hidden, add=True)
            if self.dhidden is not None:
                dhidden = self.new_sum(len(tokens.index)).zero_()
                self.add_to_dhidden(dhidden, chunk)
                tokens.write_dhidden(dhidden)
        if dhead is not None:
            self.dhead.copy_(dhead[:num_classes])

    def by_classes(self, classes: int) -> None:
        """Take chunks of classes, each with all tokens: once for the state, once for gradients.

        The second pass goes backwards: the dhead of a chunk is written over logits of later ones.
        """
        tokens = Tokens(self, self.valid)
        chunks = self.chunks(classes)
        for chunk in chunks:
            self.write_logits(chunk, tokens)
            tokens.add(chunk.logits, chunk.first)
        tokens.write_losses()
        blocks = self.blocks(chunks)
        sums = self.new_sum(blocks[0].stop)
        for block in blocks:
            dhidden = sums[: block.stop - block.start].zero_()
            for chunk in reversed(chunks):
                if block is blocks[0]:
                    if not chunk.kept:
                        self.write_logits(chunk, tokens)
                    tokens.to_gradient_(chunk.logits, chunk.first)
                if self.dhidden is not None:
                    self.add_to_dhidden(dhidden, chunk, block)
                if block is blocks[-1]:
                    self.write_dhead(chunk, tokens)
            if self.dhidden is not None:
                tokens.write_dhidden(dhidden, block)

    def write_dhead(self, chunk: Chunk, tokens: Tokens) -> None:
        for columns, head in self.gemms(chunk):
            dlogits, rows = chunk.memory[:, columns].t(), self.dhead[chunk.first : chunk.end]
            if len(rows) == len(head):
                mm_(rows, dlogits, tokens.hidden)
            else:
                rows.copy_(mm_(torch.empty_like(head), dlogits, tokens.hidden)[: len(rows)])

    def new_sum(self, num_tokens: int) -> Tensor:
        compute = torch.promote_types(self.hidden.dtype, torch.float32)
        return self.hidden.new_empty((num_tokens, self.hidden.shape[1]), dtype=compute)

    def blocks(self, chunks: list[Chunk]) -> list[slice]:
        """Split tokens for the float32 sum of dhidden: where all logits are kept, and no group."""
        num_tokens = len(self.valid)
        whole_sum = self.settings.group or not all(chunk.kept for chunk in chunks)
        size = num_tokens if whole_sum or self.dhidden is None else TOKENS_OF_DHIDDEN
        starts = range(0, num_tokens, size)
        return [slice(start, min(start + size, num_tokens)) for start in starts]

    def chunks(self, classes: int) -> list[Chunk]:
        """Split all classes, in their order; ``classes`` is the width of the buffer.

        The buffer takes all chunks before those in dhead, and keeps the last of them.
        """
        num_tokens, num_classes = len(self.valid), self.head.shape[0]
        in_dhead = self.chunks_in_dhead()
        end = in_dhead[0].first if in_dhead else self.end
        buffer = self.hidden.new_empty(num_tokens, min(classes, end))
        ends = range(end, 0, -classes)[::-1]
        found = []
        for stop in ends:
            first = max(0, stop - classes)
            found.append(Chunk(first, stop, buffer[:, : stop - first], kept=stop == end))
        found += in_dhead
        if num_classes > self.end:
            memory = self.hidden.new_empty(num_tokens, len(self.last_rows))
            found.append(Chunk(self.end, num_classes, memory, kept=True))
        return found

    def chunks_in_dhead(self) -> list[Chunk]:
        """Store logits of the last classes in dhead, each chunk below its own rows of dhead.

        Whoever computes the dheads of chunks from the last to the first overwrites no logits that
        are still needed.
        """
        memory, end, found = self.dhead.view(-1), self.end, []
        for start in starts_in_dhead(len(self.valid), *self.head.shape):
            first = end - CLASSES_IN_DHEAD
            stop = start + len(self.valid) * CLASSES_IN_DHEAD
            logits = memory[start:stop].view(-1, CLASSES_IN_DHEAD)
            found.append(Chunk(first, end, logits, kept=True))
            end = first
        return found[::-1]
