"""Messages that are in flight while this rank computes."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from emu3_kernels.ops.attention.ring.agreement import waiting


class Posted:
    """Messages in flight to ``reader`` and from ``owner``; empty tensors cost none."""

    def __init__(
        self,
        sent: Iterable[Tensor],
        reader: int,
        received: Iterable[Tensor],
        owner: int,
        group: dist.ProcessGroup,
    ):
        self.sent, self.received, self.group = list(sent), list(received), group
        self.purpose = f"for rank {owner}, and for rank {reader} to take what it sends,"
        on = {"group": group}
        batch = [dist.P2POp(dist.isend, x, group_peer=reader, **on) for x in self.sent if x.numel()]
        batch += [
            dist.P2POp(dist.irecv, x, group_peer=owner, **on) for x in self.received if x.numel()
        ]
        with waiting(self.purpose, group):
            self.works = dist.batch_isend_irecv(batch) if batch else []

    def wait(self) -> list[Tensor]:
        """Return the received tensors and release the sent ones."""
        with waiting(self.purpose, self.group):
            for work in self.works:
                work.wait()
        received, self.received, self.sent = self.received, [], []
        return received
