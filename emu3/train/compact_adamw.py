"""AdamW that keeps less: moments of 8 bits, and weights of bfloat16 that are rounded at random.

Torchao's own optimizer compiles its step for every shape, draws from the random numbers of the run
and cannot skip a step on the device; its 8-bit tensors are used here.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

MOMENTS = "exp_avg", "exp_avg_sq"
SLICE = 1 << 20
"""Numbers that are updated at a time: no more of them exist in float32."""
_BLOCK, _LEAST = 256, 4096
"""Numbers that share a scale; numbers of a weight whose moments are worth 8 bits."""


class CompactAdamW(Optimizer):
    """AdamW on this rank's part of every weight, in float32, a slice after the other.

    Moments of 8 bits have 256 values and a float32 scale for 256 numbers ("8-bit Optimizers via
    Block-wise Quantization", Dettmers et al., arXiv 2110.02861); those of a part whose size is no
    multiple of 256, or below 4,096, stay float32. Weights of bfloat16 are rounded up with the
    probability that keeps their mean.

    Args:
        groups: of parameters, with ``weight_decay`` each.
        quantized: whether moments have 8 bits.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        quantized: bool,
    ) -> None:
        if quantized:
            _states_of_8_bits()
        self.quantized = quantized
        self.found_inf: Tensor | None = None
        """1 skips the next step, on the device; None and 0 do not."""
        self.seed = 0
        """Of the rounding of the next step; ranks that hold the same weights need the same."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        random: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    device = parameter.device
                    if device not in random:
                        random[device] = torch.Generator(device).manual_seed(self.seed)
                    self._update(parameter, group, random[device])

    @torch.no_grad()
    def prepare(self) -> None:
        """Make every state that is not there yet: of zeros."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    part = _local(parameter)
                    state["step"] = torch.zeros((), device=part.device)
                    signs = {"exp_avg": True, "exp_avg_sq": False}
                    state |= {name: self._zeros(part, sign) for name, sign in signs.items()}

    @torch.no_grad()
    def read(self, parameter: Tensor, moment: str) -> Tensor:
        """Return a moment of this rank's part of a weight in float32, on the host."""
        found = self.state[parameter][moment]
        whole = torch.empty(_local(parameter).shape)
        for part, values in zip(_slices(whole), _parts(found), strict=True):
            part.copy_(_to_float(values))
        return whole

    @torch.no_grad()
    def write(self, parameter: Tensor, moment: str, values: Tensor) -> None:
        """Set a moment to what :meth:`read` returned: the state is then the same, bit for bit."""
        for part, given in zip(_parts(self.state[parameter][moment]), _slices(values), strict=True):
            part.copy_(given.to(part.device))

    def _zeros(self, part: Tensor, signed: bool) -> Tensor:
        if not self.quantized or not has_8_bits(part.numel()):
            return torch.zeros(part.numel(), device=part.device)
        zeros = _states_of_8_bits().zeros((part.numel(),), signed, _BLOCK, part.device)
        if (
            signed
        ):  # else what is largest, but negative, would shrink whenever it is read and written
            zeros.qmap[0] = -1
        return zeros

    def _update(self, parameter: Tensor, group: Mapping[str, Any], random: torch.Generator) -> None:
        if not self.state[parameter]:
            self.prepare()
        state = self.state[parameter]
        skips = None if self.found_inf is None else self.found_inf.to(parameter.device).bool()
        state["step"] += 1 if skips is None else ~skips
        weights, gradients = (_slices(_local(x)) for x in (parameter, parameter.grad))
        moments = (_parts(state[moment]) for moment in MOMENTS)
        for kept, gradient in zip(zip(weights, *moments, strict=True), gradients, strict=True):
            before = [_to_float(part) for part in kept]
            after = _updated(*before, gradient.float(), state["step"], group)
            for part, old, new in zip(kept, before, after, strict=True):
                new = new if skips is None else torch.where(skips, old, new)
                rounds = part is kept[0] and part.dtype == torch.bfloat16
                part.copy_(round_at_random(new, random) if rounds else new)


def _updated(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    step: Tensor,
    group: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight and its moments after AdamW's step number ``step``."""
    beta1, beta2 = group["betas"]
    step = step.clamp(min=1)  # a first step that is skipped divides by no 0
    rate, root = group["lr"] / (1 - beta1**step), (1 - beta2**step).sqrt()
    mean = mean.lerp(gradient, 1 - beta1)
    square = square.lerp(gradient.square(), 1 - beta2)
    change = mean.mul(rate).div_(square.sqrt().div_(root).add_(group["eps"]))
    return weight * (1 - group["lr"] * group["weight_decay"]) - change, mean, square


def round_at_random(x: Tensor, random: torch.Generator) -> Tensor:
    """Round float32 to one of both neighbours in bfloat16, so that the mean is ``x``."""
    # bfloat16 is the upper half of float32: a carry out of the lower one takes the next number.
    noise = torch.randint(1 << 16, x.shape, generator=random, device=x.device, dtype=torch.int32)
    return (x.view(torch.int32) + noise).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()


def has_8_bits(numel: int) -> bool:
    """Whether the moments of a part of so many numbers are stored in 8 bits."""
    return numel >= _LEAST and numel % _BLOCK == 0


def bytes_of_moments(numel: int, *, quantized: bool) -> int:
    """Count the bytes of both moments of a part of so many numbers."""
    if quantized and has_8_bits(numel):
        return 2 * (numel + 4 * numel // _BLOCK)
    return 8 * numel


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x.detach()


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    """Split what is stored contiguously into views of at most ``SLICE`` numbers."""
    return x.view(-1).split(SLICE)


def _parts(moment: Tensor) -> Iterator[Tensor]:
    """The same of a moment, of 8 bits or float32."""
    if not hasattr(moment, "codes"):
        yield from _slices(moment)
        return
    scales = moment.scale.split(SLICE // _BLOCK)
    for codes, scale in zip(_slices(moment.codes), scales, strict=True):
        yield type(moment)(codes, scale, moment.qmap, moment.signed, dtype=torch.float32)


def _to_float(part: Tensor) -> Tensor:
    return part.dequantize() if hasattr(part, "codes") else part.float()


def _states_of_8_bits() -> type:
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ValueError(
            f"train: optim.optimizer=adamw8bit needs torchao (pip install torchao): {error}"
        ) from None
    return OptimState8bit
