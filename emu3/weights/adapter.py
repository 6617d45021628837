"""LoRA adapters of PEFT, merged into the decoder's weights as these are read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu3.weights.files import Stored, read_headers, read_tensors
from emu3.weights.hub import read_config

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)\b")
_WHOLE = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)|\.modules_to_save(\.default)?(?=\.)")
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "megatron_config"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "arrow_config"),
    *("alora_invocation_tokens", "velora_config", "monteclora_config", "kasa_config"),
)
"""Settings that change more than ``W + scale * B @ A``; off unless they are set."""
_INITIAL = (True, False, "gaussian", "eva", "orthogonal", None)
"""Of ``init_lora_weights``: the others change the base weights too."""


@dataclass(frozen=True)
class _Merged(Stored):
    """A stored weight plus ``scale * up @ down``, added in float32 and rounded once."""

    up: Tensor
    down: Tensor
    scale: float

    def changed(self, values: Tensor, piece: slice) -> Tensor:
        up, down = self.up[piece].float(), self.down.float()
        return torch.addmm(values.float(), up, down, alpha=self.scale)


@dataclass(frozen=True)
class Adapter:
    """A folder of PEFT; ``config`` is its ``adapter_config.json``."""

    folder: Path
    config: Mapping[str, Any]

    def base_of(self, asked: Path | str | None) -> Path:
        """The folder of the model that it changes: ``asked``, or the one that it names.

        Raises:
            ValueError: one line, if there is no such folder.
        """
        named = asked if asked is not None else self.config.get("base_model_name_or_path") or ""
        if named and Path(named).exists():
            return Path(named)
        raise ValueError(
            f"load: {self.folder} is an adapter of {str(named)!r}, which does not exist: "
            "name its base (--base)"
        )

    def merged(
        self, found: Mapping[str, Stored], official: Callable[[str], str]
    ) -> dict[str, Stored]:
        """The weights ``found`` under official names, with those that the adapter changes.

        Raises:
            ValueError: one line, if the adapter has a weight without a place or of another shape.
        """
        result, pairs = dict(found), {}
        for key, stored in read_headers(self.folder / _WEIGHTS).tensors.items():
            if match := _KEY.match(key):
                pairs.setdefault(match[1], {})[match[2]] = key
                continue
            name = official(_WHOLE.sub("", key))
            if name not in result or result[name].shape != stored.shape:
                self._refuse(f"{key} {stored.shape} has no place in the base")
            result[name] = stored
        tensors = read_tensors(self.folder / _WEIGHTS)[0] if pairs else {}
        for module, keys in pairs.items():
            name = official(f"{module}.weight")
            result[name] = self._pair(result.get(name), module, keys, tensors)
        return result

    def _pair(
        self,
        base: Stored | None,
        module: str,
        keys: Mapping[str, str],
        tensors: Mapping[str, Tensor],
    ) -> Stored:
        parts = {kind: tensors[key] for kind, key in keys.items()}
        if parts.keys() == {"lora_A", "lora_B"}:
            up, down = parts["lora_B"], parts["lora_A"]
        elif parts.keys() == {"lora_embedding_A", "lora_embedding_B"}:
            up, down = parts["lora_embedding_A"].t(), parts["lora_embedding_B"].t()
        else:
            self._refuse(f"{module} must have both matrices, got {', '.join(parts)}")
        rank = self._of(module, "rank_pattern", "r")
        if base is None:
            self._refuse(f"{module} has no place in the base")
        shapes = tuple(up.shape), tuple(down.shape)
        if shapes != ((base.shape[0], rank), (rank, *base.shape[1:])):
            self._refuse(f"{module} of {base.shape} and rank {rank} has matrices of {shapes}")
        if not (up.isfinite().all() and down.isfinite().all()):
            self._refuse(f"{module} must be finite, got NaN or inf")
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        scale = alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)
        stored = {field.name: getattr(base, field.name) for field in fields(Stored)}
        return _Merged(**stored, up=up, down=down, scale=scale)

    def _of(self, module: str, pattern: str, default: str) -> float:
        """The setting of one module: PEFT's patterns are regular expressions of its last parts."""
        for key, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return self.config[default]

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"weights: {self.folder}: {reason}")


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter in ``folder``, None if there is no ``adapter_config.json``.

    Raises:
        ValueError: one line, if it is no LoRA, or one of a kind that cannot be merged.
    """
    file = folder / _CONFIG
    if not file.is_file():
        return None
    config = read_config(file)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"weights: {file}: peft_type must be 'LORA', got {kind!r}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"weights: {file}: {name} is not supported, got {config[name]!r}")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(f"weights: {file}: bias must be 'none', got {bias!r}")
    if (initial := config.get("init_lora_weights")) not in _INITIAL:
        raise ValueError(
            f"weights: {file}: init_lora_weights must leave the base as it is, got {initial!r}"
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise ValueError(f"weights: {file}: {name} must be a number, got {config.get(name)!r}")
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"weights: no file {folder / _WEIGHTS}")
    return Adapter(folder, config)
