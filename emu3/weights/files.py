"""Safetensors files: written atomically, read with errors of one line."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emu3.config import Settings, parse
from emu3.files import replacing

_MODEL = {
    "width": "hidden_size",
    "layers": "num_layers",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_width": "head_dim",
    "ff_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
_CHECKPOINT = "checkpoint.safetensors"
_PIECE = 32 << 20
"""Bytes of a file that are mapped at a time."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = tuple(_DTYPES.values())
"""What weights are read from."""
FORMER_NAMES = {
    "decoder": _MODEL,
    "model": _MODEL,
    "vision": {"revive_below": "dead_code_threshold"},
    "data": {"held_out": "validation"},
    "media": {"hold_out": "validation", "hold_out_tail": "validation_tail", "pictures": "images"},
}
"""By table, the names that settings had in older files, and their names now."""


def renamed(tree: Any, table: str) -> Any:
    """The settings of ``table`` under their present names."""
    names = FORMER_NAMES.get(table, {})
    return {names.get(k, k): v for k, v in tree.items()} if isinstance(tree, dict) else tree


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: one line, if the file cannot be written.
    """
    with replacing(path) as draft:
        draft.touch()
        mode = draft.stat().st_mode  # safetensors would leave the file to its owner alone
        try:
            save_file(dict(tensors), draft, metadata=dict(metadata))
            draft.chmod(mode)
        except SafetensorError as error:
            raise OSError(f"weights: cannot write {path}: {error}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata."""
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


class _Mapped:
    """A safetensors file that is opened anew after ``_PIECE`` bytes.

    What is mapped of it counts as memory of the process until it is closed, and to open it is to
    parse the names of all its tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: safe_open | None = None
        self._num_bytes = 0

    def opened(self, num_bytes: int) -> safe_open:
        """The file, of which ``num_bytes`` will be read."""
        self._num_bytes += num_bytes
        if self._file is None or self._num_bytes > _PIECE:
            self._file = None  # closed before it is opened again
            self._file, self._num_bytes = opened(self.path), num_bytes
        return self._file


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, not read yet."""

    file: _Mapped
    name: str
    """In the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """The file's own word for it, if it is none of ``FLOATS``."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def copy_to(self, view: Tensor) -> None:
        """Round to the dtype of ``view``, on its device."""
        if self.ndim == 0:
            view.copy_(self.file.opened(0).get_tensor(self.name))
            return
        row = max(1, view[:1].numel() * self.dtype.itemsize)
        num_rows = max(1, _PIECE // row)
        for start in range(0, self.shape[0], num_rows):
            piece = slice(start, min(start + num_rows, self.shape[0]))
            file = self.file.opened((piece.stop - start) * row)
            view[piece].copy_(self.changed(file.get_slice(self.name)[piece], piece))

    def changed(self, values: Tensor, piece: slice) -> Tensor:
        """What is copied for the rows ``piece``, whose stored values are given."""
        return values


@dataclass(frozen=True)
class Headers:
    """What the headers of a model's safetensors files contain; no tensor is read."""

    path: Path
    """A file or a folder."""
    first: Path
    """The first of its files."""
    metadata: Mapping[str, str]
    """Of the first file."""
    tensors: Mapping[str, Stored]
    """Of all files, by name."""

    def settings(self, part: str, kind: type[Settings]) -> Settings | None:
        """The settings of ``part`` in the metadata, None if there are none."""
        return _settings_in(self.metadata, self.first, part, kind)

    @property
    def parts(self) -> str:
        """The parts that a file of ours names in its metadata."""
        return ", ".join(self.metadata) or "?"


def read_headers(path: Path) -> Headers:
    """Open each file of ``path`` once.

    Raises:
        ValueError: one line, as :func:`shards_of`, or if a file is damaged.
    """
    tensors, metadata, files = {}, None, shards_of(path)
    for file in files:
        mapped = _Mapped(file)
        with opened(file) as shard:
            metadata = (shard.metadata() or {}) if metadata is None else metadata
            for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = shard.get_slice(name)
                dtype = part.get_dtype()
                shape = tuple(part.get_shape())
                tensors[name] = Stored(mapped, name, shape, _DTYPES.get(dtype, dtype))
    return Headers(path, files[0], metadata, tensors)


def opened(path: Path) -> safe_open:
    if path.is_dir():
        there = ", ".join(shard.name for shard in _visible(path, "*.safetensors")) or "none"
        raise ValueError(f"weights: {path} is a folder; name a file in it ({there})")
    if not path.is_file():
        raise ValueError(f"weights: no file {path}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is not a safetensors file: {error}") from None


def shards_of(path: Path) -> list[Path]:
    """The file itself, or of a folder the shards that its index names, or else all files.

    Raises:
        ValueError: one line, if the folder has no such file, lacks one that the index names, or is
            the folder of a training run.
    """
    if not path.is_dir():
        return [path]
    shards = _visible(path, "*.safetensors")
    if not shards:
        raise ValueError(f"weights: no .safetensors file in {path}")
    if path / _CHECKPOINT in shards:
        weights = [str(shard) for shard in shards if shard.name != _CHECKPOINT]
        raise ValueError(
            f"weights: {path} is the folder of a training run; its weights are "
            f"{', '.join(weights) or 'not written yet'}"
        )
    indexes = _visible(path, "*.safetensors.index.json")
    return sorted({shard for index in indexes for shard in _indexed(index)}) or shards


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Without drafts and what macOS puts beside each file (``._model.safetensors``)."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _indexed(index: Path) -> list[Path]:
    try:
        names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"weights: {index} is not an index of shards") from None
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise ValueError(f"weights: no file {index.parent / name}, which {index.name} names")
    return [index.parent / name for name in names]


def read_settings(path: Path, part: str, kind: type[Settings]) -> Settings | None:
    """The settings in the metadata of a file of ours, None if there are none."""
    with opened(path) as file:
        return _settings_in(file.metadata() or {}, path, part, kind)


def _settings_in(
    metadata: Mapping[str, str], path: Path, part: str, kind: type[Settings]
) -> Settings | None:
    if part not in metadata:
        return None
    try:
        return parse(kind, renamed(json.loads(metadata[part]), part))
    except ValueError as error:
        raise ValueError(f"weights: {path}: metadata {part}: {error}") from None


class _WithoutValues(TorchFunctionMode):
    """Draws and fills nothing: on ``meta`` there is nothing to fill, and it takes milliseconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


_FILLS = {
    *(nn.init.constant_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_),
    *(Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_),
}


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside the block, modules are made on ``meta``."""
    with torch.device("meta"), _WithoutValues():
        yield


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``tensors`` into the parameters and buffers of ``module``; the names must agree."""
    missing = dict(module.state_dict())
    for name, value in tensors.items():
        copy(missing.pop(name, None), value, name, path)
    nothing_missing(missing, path)


def copy(view: Tensor | None, value: Tensor | Stored, name: str, path: Path) -> None:
    check_place(view, value, name, path)
    write(view, value, name, path)


def check_place(view: Tensor | None, value: Tensor | Stored, name: str, path: Path) -> None:
    """Raise unless ``value`` fits the ``view`` of its name."""
    if view is None:
        raise ValueError(f"weights: {path} is of another configuration: {name} has no place here")
    if view.shape != value.shape:
        raise ValueError(
            f"weights: {path} is of another configuration: {name} is {tuple(value.shape)}, "
            f"expected {tuple(view.shape)}"
        )


@torch.no_grad()
def write(view: Tensor, value: Tensor | Stored, name: str, where: Path | str) -> None:
    """Round ``value`` to the dtype of ``view``; a float must stay finite, and come from floats."""
    if isinstance(value, Stored):
        if isinstance(value.dtype, str) and view.is_floating_point():
            raise ValueError(
                f"weights: {where}: {name} must be floats of 16 bits or more, got {value.dtype}"
            )
        value.copy_to(view)
    else:
        view.copy_(value)
    check_finite(view, name, where)


def check_finite(view: Tensor, name: str, where: Path | str) -> None:
    """Refuse NaN and infinity, also those that rounding to the dtype of ``view`` made."""
    if not is_finite(view):
        raise ValueError(f"weights: {where}: {name} must be finite in {view.dtype}, got NaN or inf")


def is_finite(values: Tensor) -> bool:
    if not (values.is_floating_point() and values.numel()):
        return True
    # aminmax reads once and writes nothing: on a CPU thirty times as fast as isfinite().all().
    return bool(torch.stack(values.aminmax()).isfinite().all())


def nothing_missing(missing: Mapping[str, Tensor], path: Path) -> None:
    if missing:
        first, more = next(iter(missing)), len(missing) - 1
        raise ValueError(
            f"weights: {path} is of another configuration: it lacks {first}"
            + (f" and {more} more" if more else "")
        )
