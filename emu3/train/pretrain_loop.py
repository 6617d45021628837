"""The loop of a decoder's training from token stores: rows, step, log, evaluate, save."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from emu3.settings import parse
from emu3.train.checkpoint import difference
from emu3.train.journal import Journal, Trace
from emu3.train.lock import locked
from emu3.train.preference_recipe import PreferenceRecipe
from emu3.train.preferences import PreferenceTraining
from emu3.train.pretrain import Pretraining
from emu3.train.ranks import is_first, largest, process_group, restarts, together
from emu3.train.sharded import (
    Saver,
    checkpoints,
    load_sharded,
    read_notes,
    remove_drafts,
    save_adapter,
    save_whole,
)
from emu3.train.store_recipe import StoreRecipe

MAY_CHANGE = {
    "parallel",
    "evaluation",
    "guard",
    "train.micro_batch_size",
    "train.log_every",
    "train.save_every",
    "train.start",
    "train.device",
    "train.tf32",
    "train.keep",
    "train.profile",
    "data.workers",
    "lora.names",
}
"""Settings that a run which is resumed may have anew: it sees the same rows in the same order."""
_STOP, _FAILED = 1, 2


def pretrain(recipe: StoreRecipe, folder: Path, *, resume: bool = False) -> Path:
    """Run ``recipe`` in ``folder``, on this process or those of ``torchrun``.

    Every rank must call. After SIGTERM all save and exit with 0. Processes that ``torchrun`` starts
    anew continue from the last checkpoint; a first start in a folder that holds a run needs
    ``resume``.

    Returns:
        The file of the trained weights, in the official layout. Adapters are merged into it, and
        by themselves in ``adapter`` beside it.

    Raises:
        ValueError: one line, if the folder, the recipe, a store or a checkpoint does not fit, or if
            ``guard.limit`` steps in a row were skipped; the last checkpoint stays.
    """
    with process_group(recipe.train.device) as device, ExitStack() as stack:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = recipe.train.tf32
            torch.backends.cudnn.allow_tf32 = recipe.train.tf32
        together(lambda: stack.enter_context(locked(folder)) if is_first() else None)
        saved = together(lambda: _checkpoint_to_resume(recipe, folder, resume))
        if is_first():
            remove_drafts(folder)
        run = together(lambda: _training_of(recipe)(recipe, device))
        done = 0
        if saved is None:
            together(run.check)
            together(run.begin)
        else:
            notes = load_sharded(saved, run.model, run.optimizer, run.layout)
            together(lambda: run.restore(notes))
            done = notes["step"]
        if not _train(run, folder, done):
            raise SystemExit(0)
        weights = folder / f"{recipe.train.stage}.safetensors"
        if recipe.lora is not None:
            start = str(recipe.train.start or "")
            save_adapter(folder / "adapter", run.model, run.layout, recipe.lora, start)
        save_whole(weights, run.model, run.layout, recipe.lora)
        return weights


def _checkpoint_to_resume(recipe: StoreRecipe, folder: Path, resume: bool) -> Path | None:
    found = checkpoints(folder)
    if not found and resume and not restarts():
        raise ValueError(f"train: no run in {folder} to resume: it has no checkpoint step-N")
    if found and not resume and not restarts():
        raise ValueError(f"train: {folder} already holds a run; resume it, or name another folder")
    if not found:
        return None
    saved = parse(type(recipe), read_notes(found[-1]).get("recipe", {}))
    if what := difference(saved.without_paths(), recipe.without_paths(), MAY_CHANGE):
        raise ValueError(f"resume: {found[-1]} belongs to another recipe: {what}")
    return found[-1]


def _training_of(recipe: StoreRecipe) -> type[Pretraining]:
    return PreferenceTraining if isinstance(recipe, PreferenceRecipe) else Pretraining


def _notes(run: Pretraining) -> dict:
    recipe = run.recipe.model_dump(mode="json", exclude={"train": {"vision_weight"}})
    return {"recipe": recipe, **run.state()}


def _train(run: Pretraining, folder: Path, done: int) -> bool:
    """Run the steps from ``done`` on; return whether all are done, and no SIGTERM came."""
    settings = run.recipe.train
    with ExitStack() as stack:
        saver = Saver(folder, run.model, run.optimizer, run.layout, keep=settings.keep)
        stack.callback(saver.shutdown)
        journal = stack.enter_context(closing(Journal(run, folder, done)))
        trace = stack.enter_context(closing(Trace(settings.profile, folder)))
        terminated = stack.enter_context(_sigterm())
        for step in range(done, settings.steps):
            rows, stops = _next_rows(run, terminated)
            trace.start(step)
            journal.add(run.step(step, run.on_device(rows)))
            trace.stop(step)
            is_last = step + 1 == settings.steps
            evaluates = is_last or (step + 1) % run.recipe.evaluation.every == 0
            saves = is_last or stops or (step + 1) % settings.save_every == 0
            validation = run.evaluate() if evaluates and run.validation else {}
            journal.read(step, validation, at_once=saves or bool(validation))
            if saves:
                journal.flush()
                saver.save(step + 1, _notes(run))
            if stops and not is_last:
                saver.wait()
                journal.say(
                    f"train: SIGTERM: saved step {step + 1} in {folder}; resume it with --resume "
                    "(torchrun itself exits with 1)"
                )
                return False
        saver.wait()
    return True


def _next_rows(run: Pretraining, terminated: list[int]) -> tuple[tuple, bool]:
    """Return this rank's rows, and whether any rank got SIGTERM; fail on all ranks or none."""
    rows, failure = (), None
    try:
        rows = run.stream.next_batch()
    except (ValueError, OSError) as error:  # of a worker it has the traceback before the reason
        failure = ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))
    flag = largest(_FAILED if failure else _STOP if terminated else 0)
    if flag == _FAILED:
        raise failure or SystemExit(1)
    return rows, flag == _STOP


@contextmanager
def _sigterm() -> Iterator[list[int]]:
    """Yield a list that holds the signal once it came; a step is never broken off."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
