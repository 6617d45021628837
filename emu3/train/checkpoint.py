"""The whole state of a run in one file: weights, optimizers, data order, random numbers, step."""

from pathlib import Path

import torch
from torch import Tensor

from emu3.config import Recipe
from emu3.train.stage import Stage
from emu3.weights import fill, read_tensors, save_tensors


def save(path: Path, step: int, recipe: Recipe, stage: Stage) -> None:
    """Replace ``path`` by the state after ``step`` steps."""
    tensors = {}
    for part, module in stage.modules.items():
        tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    for part, optimizer in stage.optimizers.items():
        for number, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{part}.{number}.{name}": value for name, value in moments.items()}
    tensors |= {f"stream.{name}": value for name, value in stage.stream.state().items()}
    tensors["random"] = torch.get_rng_state()
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_tensors(path, tensors, {"step": str(step), "recipe": recipe.model_dump_json()})


def restore(path: Path, recipe: Recipe, stage: Stage) -> int:
    """Take up the state in ``path``; return the number of steps it has seen.

    Raises:
        ValueError: one line, if ``path`` belongs to another recipe.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("recipe") != recipe.model_dump_json():
        what = _difference(metadata, recipe)
        raise ValueError(f"resume: {path} belongs to another recipe: {what}")
    for part, module in stage.modules.items():
        fill(module, _under(tensors, f"{part}."), path)
    for part, optimizer in stage.optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, f"{part}.").items():
            number, _, kind = name.partition(".")
            moments.setdefault(int(number), {})[kind] = _laid_out_as(parameters[int(number)], value)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    stage.stream.restore(_under(tensors, "stream."))
    torch.set_rng_state(tensors["random"])
    return int(metadata["step"])


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A fused optimizer takes parameter and moments for alike in memory, and checks nothing."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _difference(metadata: dict[str, str], recipe: Recipe) -> str:
    if "recipe" not in metadata:
        return "it holds no recipe"
    saved = Recipe.model_validate_json(metadata["recipe"])
    for table in Recipe.model_fields:
        was, now = getattr(saved, table), getattr(recipe, table)
        for key in type(now).model_fields:
            if getattr(was, key) != getattr(now, key):
                return f"{table}.{key} was {getattr(was, key)}, is {getattr(now, key)}"
    return "it cannot be told apart"
