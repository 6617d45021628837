"""What the makers of GPUs state, for plans and for the share of the peak that a run reaches."""

from dataclasses import dataclass

import torch

GB = 10**9


@dataclass(frozen=True)
class Card:
    """A GPU, from its data sheet."""

    name: str
    """Part of the name that CUDA gives the device."""
    flops: float
    """Dense bfloat16 FLOP/s with float32 sums."""
    capacity: int
    """Bytes of memory."""
    bandwidth: float
    """Bytes/s of memory."""
    link: float
    """Bytes/s to other GPUs of the machine, one way: NVLink, or PCIe without it."""


CARDS = {
    "a100": Card("A100", 312e12, 80 * GB, 2039e9, 300e9),
    "a800": Card("A800", 312e12, 80 * GB, 2039e9, 200e9),
    "h100": Card("H100", 989e12, 80 * GB, 3350e9, 450e9),
    "h100-pcie": Card("H100 PCIe", 756e12, 80 * GB, 2039e9, 300e9),
    "h800": Card("H800", 989e12, 80 * GB, 3350e9, 200e9),
    "h200": Card("H200", 989e12, 141 * GB, 4800e9, 450e9),
    "b200": Card("B200", 2250e12, 180 * GB, 8000e9, 900e9),
    "l40s": Card("L40S", 362e12, 48 * GB, 864e9, 32e9),
    "rtx4090": Card("RTX 4090", 165e12, 24 * GB, 1008e9, 32e9),
}


def card_of(name: str) -> Card | None:
    """Return the card of the device that CUDA calls ``name``; None if it is not known."""
    return max(
        (card for card in CARDS.values() if card.name in name),
        key=lambda card: len(card.name),
        default=None,
    )


def peak_flops(device: torch.device, dtype: str, *, tf32: bool) -> float | None:
    """Return the FLOP/s of a GPU's GEMMs in a dtype; None if they are not known."""
    card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card is None or (dtype == "float32" and not tf32):
        return None
    return card.flops / 2 if dtype == "float32" else card.flops
