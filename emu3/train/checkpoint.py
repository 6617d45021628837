"""The whole state of a run in one file: weights, optimizers, data order, random numbers, step."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from emu3.config import Recipe
from emu3.settings import parse
from emu3.train.stage import Stage
from emu3.weights import fill, read_tensors, save_tensors
from emu3.weights.files import copy, is_finite, nothing_missing, renamed

FILE = "checkpoint.safetensors"
"""Name of a run's checkpoint in its folder."""


def save(path: Path, step: int, recipe: Recipe, stage: Stage) -> None:
    """Write the state after ``step`` steps to ``path``.

    Raises:
        ValueError: one line, if a weight or a moment is not finite; ``path`` is then unchanged.
    """
    tensors = {}
    for part, module in stage.modules.items():
        tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    for part, optimizer in stage.optimizers.items():
        for number, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{part}.{number}.{name}": value for name, value in moments.items()}
    tensors |= {f"stream.{name}": value for name, value in stage.stream.state().items()}
    tensors["random"] = torch.get_rng_state()
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    _check_finite(tensors, f"train: step {step - 1}")
    save_tensors(path, tensors, {"step": str(step), "recipe": recipe.model_dump_json()})


def restore(path: Path, recipe: Recipe, stage: Stage) -> int:
    """Restore the state in ``path``; return the number of its steps.

    Raises:
        ValueError: one line, if ``path`` belongs to another recipe, is incomplete or is not finite.
    """
    tensors, metadata = read_tensors(path)
    tensors = {name.replace(".members", ".cluster_size"): v for name, v in tensors.items()}
    if what := _difference(metadata, recipe):
        raise ValueError(f"resume: {path} belongs to another recipe: {what}")
    needed = "random", *(f"stream.{name}" for name in stage.stream.state())
    missing = [name for name in needed if name not in tensors]
    if not metadata.get("step", "").isdecimal():
        missing.append("the number of its step")
    if missing:
        raise ValueError(f"resume: {path} is incomplete: it lacks {', '.join(missing)}")
    _check_finite(tensors, f"resume: {path}")
    for part, module in stage.modules.items():
        fill(module, _under(tensors, f"{part}."), path)
    for part, optimizer in stage.optimizers.items():
        state = _optimizer_state(optimizer, _under(tensors, f"{part}."), part, path)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    stage.stream.restore(_under(tensors, "stream."))
    torch.set_rng_state(tensors["random"])
    return int(metadata["step"])


def _optimizer_state(
    optimizer: Optimizer, found: dict[str, Tensor], part: str, path: Path
) -> dict[int, dict[str, Tensor]]:
    """AdamW's state of each parameter that has had a gradient.

    A fused optimizer assumes that parameter and moments share a memory layout, and checks nothing.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {name.partition(".")[0] for name in found}
    state = {
        number: {
            "step": torch.empty(()),
            "exp_avg": torch.empty_like(parameter),
            "exp_avg_sq": torch.empty_like(parameter),
        }
        for number, parameter in enumerate(parameters)
        if str(number) in numbers
    }
    missing = {f"{n}.{kind}": view for n, kinds in state.items() for kind, view in kinds.items()}
    for name, value in found.items():
        copy(missing.pop(name, None), value, f"{part}.{name}", path)
    nothing_missing({f"{part}.{name}": view for name, view in missing.items()}, path)
    return state


def _check_finite(tensors: dict[str, Tensor], where: str) -> None:
    for name, value in tensors.items():
        if not is_finite(value):
            raise ValueError(f"{where}: {name} must be finite")


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _difference(metadata: dict[str, str], recipe: Recipe) -> str | None:
    if "recipe" not in metadata:
        return "it holds no recipe"
    tables = json.loads(metadata["recipe"]).items()
    known = {k: renamed(tree, k) for k, tree in tables if k in type(recipe).model_fields}
    return difference(parse(type(recipe), known), recipe)


def difference(saved: Recipe, recipe: Recipe, may_change: Collection[str] = ()) -> str | None:
    """Name the first setting that differs, but for those in ``may_change``, or None.

    Args:
        may_change: tables, and settings as ``table.key``.
    """
    for table in type(recipe).model_fields:
        was, now = getattr(saved, table), getattr(recipe, table)
        if was is None or now is None:  # a table that a recipe need not have
            if was != now and table not in may_change:
                return f"{table} was {was or 'not there'}, is {now or 'not there'}"
            continue
        for key in type(now).model_fields:
            may = {table, f"{table}.{key}"} & set(may_change)
            if not may and getattr(was, key) != getattr(now, key):
                return f"{table}.{key} was {getattr(was, key)}, is {getattr(now, key)}"
    return None
