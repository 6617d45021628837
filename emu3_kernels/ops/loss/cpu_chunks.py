"""The order of the chunks on a CPU: of tokens, or of classes, in one buffer of logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from emu3_kernels.ops.loss.chunking import DHEAD_CLASSES, aligned, chunking, default_memory
from emu3_kernels.ops.loss.chunks import Run, Tokens
from emu3_kernels.ops.loss.split_sum import SplitSum
from emu3_kernels.runtime.gemm import mm_


class CpuRun(Run):
    """Computes all classes of some tokens at a time, or some classes of all tokens."""

    def go(self) -> None:
        num_tokens, width = len(self.valid), self.hidden.shape[1]
        memory, wants_head = self.settings.memory, self.dhead is not None
        if memory is None:
            memory = default_memory(self.hidden)
        kind = (width, self.hidden.dtype, memory)
        self.chunking = chunking(num_tokens, self.settings.largest, *kind, wants_head=wants_head)
        classes = min(self.chunking.classes, self.head.shape[0])
        self.buffer = self.hidden.new_empty(min(self.chunking.tokens, num_tokens), aligned(classes))
        if self.chunking.classes < self.settings.largest:
            self.by_classes()
        else:
            self.by_tokens()

    def logits(self, tokens: Tokens, head: Tensor) -> Tensor:
        out = self.buffer[: len(tokens.index), : head.shape[0]]
        return mm_(out, tokens.hidden, head.t())

    def by_tokens(self) -> None:
        """Take chunks of tokens, each with all classes: no GEMM runs twice."""
        size = self.chunking.tokens
        split_sum = SplitSum(self.dhead, DHEAD_CLASSES) if self.chunking.sums_dhead else None
        for first in range(0, len(self.valid), size):
            last = first + size >= len(self.valid)
            tokens = Tokens(self, self.valid[first : first + size])
            logits = self.logits(tokens, self.head)
            tokens.add(logits, 0)
            tokens.write_losses()
            if self.dhead is None and self.dhidden is None:
                continue
            tokens.to_gradient_(logits, 0)
            for rows, dlogits in dhead_parts(logits) if self.dhead is not None else ():
                if split_sum:
                    split_sum.add_(rows, dlogits.t(), tokens.hidden, first=first == 0, last=last)
                else:
                    mm_(self.dhead[rows], dlogits.t(), tokens.hidden, add=first > 0)
            if self.dhidden is not None:
                tokens.write_dhidden(mm_(torch.empty_like(tokens.hidden), logits, self.head))

    def by_classes(self) -> None:
        """Take chunks of classes, each with all tokens: once for the state, once for gradients.

        The second pass begins with the logits that the first ended with, which are a whole chunk:
        the GEMM of all others runs again.
        """
        tokens, classes = Tokens(self, self.valid), self.head.shape[0]
        ends = range(classes, 0, -self.chunking.classes)[::-1]
        chunks = [(max(0, end - self.chunking.classes), end) for end in ends]
        for first, end in chunks:
            logits = self.logits(tokens, self.head[first:end])
            tokens.add(logits, first)
        tokens.write_losses()
        dhidden = torch.zeros_like(tokens.hidden, dtype=torch.float32)
        for first, end in reversed(chunks):
            head = self.head[first:end]
            if end != classes:
                logits = self.logits(tokens, head)
            tokens.to_gradient_(logits, first)
            for rows, dlogits in dhead_parts(logits, first):
                mm_(self.dhead[rows], dlogits.t(), tokens.hidden)
            if self.dhidden is not None:
                mm_(dhidden, logits, head, add=True)
        if self.dhidden is not None:
            tokens.write_dhidden(dhidden)


def dhead_parts(dlogits: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Split gradients of logits by classes: the rows of dhead, and the columns of one GEMM."""
    for start in range(0, dlogits.shape[1], DHEAD_CLASSES):
        part = dlogits[:, start : start + DHEAD_CLASSES]
        yield slice(first + start, first + start + part.shape[1]), part
