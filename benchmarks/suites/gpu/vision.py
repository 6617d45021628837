"""An image or a clip encoded, and decoded, beside Hugging Face's tokenizer: same weights."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.harness import apart, clock
from benchmarks.harness.clock import Call
from benchmarks.harness.entries import Entries
from benchmarks.harness.worker import first_line, gpu_is_lost
from benchmarks.suites import vision
from benchmarks.suites.gpu import rows
from benchmarks.suites.gpu.plan import Item
from benchmarks.suites.vision import OURS, THEIRS
from emu3.config import VisionSettings
from emu3.weights import load_vision

TINY = VisionSettings(base_channels=32, multipliers=(1, 1, 1, 1), num_res_blocks=1, num_codes=64)


def prepare(item: Item, device: str, skip: Mapping[str, str]) -> Iterator:
    """Encode and decode once; in float32 most codes must be those of Hugging Face."""
    with rows.process_state(device), torch.no_grad():
        yield "the models"
        codes, missing = {}, dict(skip)
        for name, build in builders(item, device).items():
            if name not in missing:
                yield rows.ENTRY + name
                codes[name] = build("encode")()
                build("decode")()
        if OURS in missing:
            raise RuntimeError(missing[OURS])
        if item.dtype == torch.float32 and THEIRS in codes:
            share = (codes[OURS] == codes[THEIRS]).double().mean().item()
            if share < vision.SAME_CODES:
                missing[THEIRS] = f"{share:.1%} of its codes are ours"
        yield {"default": OURS, "missing": missing}


def measure(item: Item, device: str, prepared: Mapping) -> Iterator:
    """Yield a row for each direction, then each with kernel and host time and its kernels."""
    with rows.process_state(device), torch.no_grad():
        yield "the models"
        built, timed = builders(item, device), []
        for direction in item.directions:
            found = Entries(clock=clock.of(device), missing=dict(prepared["missing"]))
            for name in [name for name in built if name not in found.missing]:
                yield rows.ENTRY + name
                try:
                    found.add(name, built[name](direction))
                except Exception as error:  # a peer that fails is a result too
                    if name == OURS or gpu_is_lost():
                        raise
                    found.drop(name, first_line(error))
            yield "the rounds"
            case = rows.case_of(item, OURS, direction, device)
            row = rows.timed_row(item, case, found, lambda case, taken: None)
            timed.append((row, found))
            yield row
        for row, found in timed:
            yield "the table of kernels"
            row["kernels"] = apart.kernels(found.calls[OURS], device)
            yield row
            yield from rows.add_kernel_and_host_time(row, found, device)
            yield row


def builders(item: Item, device: str) -> dict[str, Callable[[str], Call]]:
    """Return what builds the call of each entry in a direction; theirs takes images alone."""
    theirs = vision.hugging_face(TINY if item.dry else VisionSettings())
    ours = load_vision(theirs.state_dict()).to(device, item.dtype)
    theirs = theirs.to(device, item.dtype)
    image = vision.noise_image(item.size["height"]).to(device, item.dtype)
    if frames := item.size.get("frames"):
        clip = image[:, None].repeat(1, frames, 1, 1, 1)
        return {OURS: lambda way: _ours(ours, clip, way)}
    return {
        OURS: lambda way: _ours(ours, image, way),
        THEIRS: lambda way: _theirs(theirs, image, way),
    }


def _ours(tokenizer, pixels: Tensor, direction: str) -> Call:
    codes = tokenizer.encode(pixels)
    given = {"encode": pixels, "decode": codes}[direction]
    return lambda: getattr(tokenizer, direction)(given)


def _theirs(model, pixels: Tensor, direction: str) -> Call:
    sizes = torch.tensor([pixels.shape[2:]] * len(pixels))

    def encode() -> Tensor:
        return torch.stack(model.encode(pixels, image_sizes=sizes).image_tokens)

    codes = encode()
    return encode if direction == "encode" else lambda: model.decode(codes)
