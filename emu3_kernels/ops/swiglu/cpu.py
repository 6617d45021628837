"""swiglu on the CPU: csrc/cpu/swiglu/swiglu.cpp. See api.py for the arguments."""

import torch
from torch import Tensor

from emu3_kernels.runtime import library
from emu3_kernels.runtime.dispatch import Backend


def forward(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.emu3_kernels.swiglu_forward(gate, up)


def backward(dout: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.emu3_kernels.swiglu_backward(dout, gate, up)


BACKENDS = dict.fromkeys(
    ("swiglu", "swiglu_packed"), Backend(library.why_not_cpu, forward, backward)
)

if not library.MISSING:

    @torch.library.register_fake("emu3_kernels::swiglu_forward")
    def _(gate: Tensor, up: Tensor) -> Tensor:
        return gate.new_empty(gate.shape)

    @torch.library.register_fake("emu3_kernels::swiglu_backward")
    def _(dout: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return gate.new_empty(gate.shape[0], 2 * gate.shape[1])
