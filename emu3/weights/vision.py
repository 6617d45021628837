"""The vision tokenizer's weights, in and out.

``state_dict()`` has the official names. Hugging Face renames them, and has matrices where the
official attention has 1x1 convolutions; in a whole model all names have a prefix.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from emu3.config import VisionSettings
from emu3.settings import SettingsError, parse
from emu3.vision import VisionTokenizer
from emu3.vision.quantizer import RUNNING_MEANS
from emu3.weights.files import (
    FLOATS,
    Headers,
    Stored,
    read_headers,
    save_tensors,
    without_memory,
    write,
)
from emu3_kernels.modules import speed_up_bfloat16

_TO_HUGGING_FACE = (
    (r"\.mid\.attn_1\.norm\.", ".mid.attn_norm."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"(attn\S*)\.([qkv])\.", r"\1.\2_proj."),
    (r"\.proj_out\.", ".out_proj."),
    (r"\.mid\.", ".middle_block."),
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
)
_TO_OFFICIAL = (
    (r"^(model\.)?vqmodel\.", ""),
    (r"\.down_block\.down\.", ".down."),
    (r"\.up_block\.up\.", ".up."),
    (r"\.middle_block\.", ".mid."),
    (r"\.out_proj\.", ".proj_out."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"\.attn_norms\.(\d+)\.", r".attn.\1.norm."),
    (r"\.mid\.attn_norm\.", ".mid.attn_1.norm."),
)
_PREFIX = re.compile(r"^(model\.)?vqmodel\.")
_PROJECTION = re.compile(r"\.attn\S*\.(q|k|v|proj_out)\.weight$")
_CODEBOOK = "quantize.embedding.weight"
_IGNORED = re.compile(r"num_batches_tracked$")
_NAMED = 3

Layout = Literal["official", "huggingface"]


def save_vision(path: Path, tokenizer: VisionTokenizer, layout: Layout = "official") -> None:
    """Write the vision tokenizer, its settings in the file's metadata.

    The running means that trained a codebook are left out; a run's checkpoint has them.
    """
    if layout not in ("official", "huggingface"):
        raise ValueError(f"weights: layout must be official or huggingface, got {layout!r}")
    tensors = huggingface_tensors if layout == "huggingface" else official_tensors
    settings = {"vision": tokenizer.settings.model_dump_json()}
    save_tensors(path, tensors(tokenizer), settings)


def official_tensors(tokenizer: VisionTokenizer) -> dict[str, Tensor]:
    """Its weights and running statistics under official names, contiguous."""
    state = tokenizer.state_dict().items()
    return {name: value.contiguous() for name, value in state if name not in RUNNING_MEANS}


def huggingface_tensors(tokenizer: VisionTokenizer) -> dict[str, Tensor]:
    """The same under Hugging Face's names, and attention as matrices."""
    return {
        _renamed(name, _TO_HUGGING_FACE): v.flatten(1) if _PROJECTION.search(name) else v
        for name, v in official_tensors(tokenizer).items()
    }


def load_vision(
    source: Path | str | Headers | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> VisionTokenizer:
    """Build a vision tokenizer from a file, a folder of shards or a state dict of any layout.

    Official and Hugging Face names are read, alone or inside a whole model, whose other parts are
    ignored. The shape comes from the metadata of our files, or else from the tensors, with Emu3's
    32 groups.

    Args:
        source: what to read, or its headers that were read.
        device: of the tokenizer.
        dtype: of the tokenizer; None keeps that of the codebook.

    Raises:
        ValueError: one line that names what is missing, unexpected, of another shape or not
            finite.
    """
    if isinstance(source, Mapping):
        where, settings, found = "the state dict", None, source
    else:
        headers = source if isinstance(source, Headers) else read_headers(Path(source))
        where, found = str(headers.path), headers.tensors
        settings = headers.settings("vision", VisionSettings)
    tensors = {_renamed(name, _TO_OFFICIAL): found[name] for name in _own(found)}
    codebook = tensors.get(_CODEBOOK, torch.empty(0, 0))
    if codebook.ndim != 2 or codebook.dtype not in FLOATS:
        raise ValueError(
            f"weights: {where} does not fit the vision tokenizer: {_CODEBOOK} must be floats "
            f"of 16 bits or more, [N, D], got {codebook.dtype} {tuple(codebook.shape)}"
        )
    settings = settings or _shape_of(tensors, where)
    with without_memory():
        tokenizer = VisionTokenizer(settings)
    tokenizer.to(dtype or codebook.dtype).to_empty(device=device)
    _fill(tokenizer, tensors, where)
    return speed_up_bfloat16(tokenizer.eval())


def holds_vision(names: Iterable[str]) -> bool:
    """Whether a whole model's tensors have a vision tokenizer's among them."""
    return any(_PREFIX.match(name) for name in names)


def _own(names: Iterable[str]) -> list[str]:
    """The names of the vision tokenizer's tensors: those with its prefix, or else all."""
    names = list(names)
    return [name for name in names if _PREFIX.match(name)] or names


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _shape_of(tensors: Mapping[str, Tensor | Stored], where: str) -> VisionSettings:
    """Infer the settings from the tensors."""
    stage = "encoder.down.{}.block.0.conv1.weight"
    first = "encoder.conv_in.weight"
    if lacking := [n for n in (first, _CODEBOOK, stage.format(0)) if n not in tensors]:
        raise ValueError(f"weights: {where} holds no vision tokenizer: missing {lacking[0]}")

    def counted(template: str) -> int:
        return sum(1 for _ in takewhile(lambda n: template.format(n) in tensors, count()))

    def size_of(name: str) -> int:
        return tensors[name].shape[0] if tensors[name].ndim else 0

    stages = range(counted(stage))
    base, widths = size_of(first), [size_of(stage.format(n)) for n in stages]
    num_codes, code_width = tensors[_CODEBOOK].shape
    shape = {
        "base_channels": base,
        "multipliers": tuple(width // max(1, base) for width in widths),
        "num_res_blocks": counted("encoder.down.0.block.{}.conv1.weight"),
        "attention_stages": tuple(
            n for n in stages if f"encoder.down.{n}.attn.0.q.weight" in tensors
        ),
        "temporal_factor": 1 << counted("encoder.time_conv.{}.conv.conv.weight"),
        "num_codes": num_codes,
        "code_width": code_width,
    }
    try:
        return parse(VisionSettings, shape)
    except SettingsError as error:
        raise ValueError(f"weights: {where} does not fit the vision tokenizer: {error}") from None


@torch.no_grad()
def _fill(tokenizer: VisionTokenizer, tensors: Mapping[str, Tensor | Stored], where: str) -> None:
    own = {
        # Attention is 1x1 convolutions here, and may be matrices there.
        name: view.flatten(1) if _is_matrix(name, tensors.get(name)) else view
        for name, view in tokenizer.state_dict().items()
    }
    unexpected = [name for name in tensors if name not in own]
    missing = [
        name
        for name in own
        if name not in tensors and name not in RUNNING_MEANS and not _IGNORED.search(name)
    ]
    misshapen = [
        f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}"
        for name, value in tensors.items()
        if name in own and own[name].shape != value.shape
    ]
    errors = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(errors.values()):
        found = "; ".join(f"{kind} {_listed(names)}" for kind, names in errors.items() if names)
        raise ValueError(f"weights: {where} does not fit the vision tokenizer: {found}")
    for name, view in own.items():
        if name in tensors:
            write(view, tensors[name], name, where)
        elif _IGNORED.search(name):
            view.zero_()
    if any(name not in tensors for name in RUNNING_MEANS):
        tokenizer.quantize.restart()


def _is_matrix(name: str, value: Tensor | Stored | None) -> bool:
    return value is not None and value.ndim == 2 and _PROJECTION.search(name) is not None


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
