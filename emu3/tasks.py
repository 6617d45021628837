"""What ``train.stage`` in a recipe can be: the recipe's settings, and what builds the stage.

The stages ``pretrain`` and ``dpo`` have a loop of their own, for many processes.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from emu3 import config
from emu3.config import Recipe
from emu3.demo.config import ClipRecipe, DigitRecipe
from emu3.demo.stages import decoder_stage, vision_stage
from emu3.train import loop
from emu3.train.preference_recipe import PreferenceRecipe
from emu3.train.stage import Stage
from emu3.train.store_recipe import StoreRecipe
from emu3.train.tokenizer import tokenizer_stage


class Task(NamedTuple):
    recipe: type[Recipe]
    build: Callable[[Any], Stage]


TASKS: Mapping[str, Task] = {
    "vision": Task(DigitRecipe, vision_stage),
    "decoder": Task(DigitRecipe, decoder_stage),
    "tokenizer": Task(Recipe, tokenizer_stage),
}

PARALLEL: Mapping[str, type[StoreRecipe]] = {"pretrain": StoreRecipe, "dpo": PreferenceRecipe}


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe as ``emu3.config.load_recipe`` does, with the settings of its stage."""
    tree = config.recipe_tree(name, overrides)
    train = tree.get("train")
    stage = train.get("stage") if isinstance(train, dict) else None
    if isinstance(stage, str) and stage in PARALLEL:
        return config.parse(PARALLEL[stage], tree)
    kind = TASKS[stage].recipe if isinstance(stage, str) and stage in TASKS else DigitRecipe
    if kind is DigitRecipe and "clips" in tree:
        kind = ClipRecipe
    return config.parse(kind, tree)


def train(recipe: Recipe, folder: Path, *, resume: bool = False) -> Path:
    """Run ``recipe`` in ``folder``; return the file of the trained weights."""
    if isinstance(recipe, StoreRecipe):
        # Imported here: FSDP is slow to import and no other stage needs it.
        from emu3.train.pretrain_loop import pretrain

        return pretrain(recipe, folder, resume=resume)
    stage, processes = recipe.train.stage, int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ValueError(
            f"train: the stage {stage} runs on one process, got {processes} of torchrun"
        )
    return loop.train(recipe, folder, TASKS[stage].build, resume=resume)
