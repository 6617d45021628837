"""``emu3 train RECIPE --plan``: memory, steps and time of a training before it is started.

The model is on the meta device; no GPU and no process group is needed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from emu3.config import Recipe
from emu3.train.cards import CARDS, GB
from emu3.train.layout import ParallelSettings, check_fits
from emu3.train.memory import Memory
from emu3.train.predicted import Step
from emu3.train.store_recipe import StoreRecipe

_SUGGESTED = 5


@dataclass(frozen=True)
class Corpus:
    """What the stores of a recipe hold, as its first window is packed."""

    tokens: int
    fill: float
    """Share of a row that is not padding."""
    pairs: float
    """Of a token and one that it attends to, in a row."""

    @classmethod
    def of(cls, recipe: StoreRecipe) -> "Corpus | None":
        """Read the stores; None if one is not there."""
        rows = recipe.rows()
        if rows is None:
            return None
        packed = rows.window(0).rows
        lengths = [piece.length for row in packed for piece in row]
        return cls(
            tokens=rows.tokens,
            fill=sum(lengths) / (len(packed) * rows.room),
            pairs=sum(length * (length + 1) / 2 for length in lengths) / len(packed),
        )


@dataclass(frozen=True)
class Plan:
    """A recipe on GPUs of some memory."""

    recipe: StoreRecipe
    corpus: Corpus | None
    card: str
    gpu_memory: int
    """Bytes."""

    @cached_property
    def memory(self) -> Memory:
        recipe = self.recipe
        rows, context = recipe.train.micro_batch_size, recipe.data.context
        accumulates = recipe.num_micro_batches > 1
        given = recipe.model, recipe.parallel, rows, context, accumulates, self.gpu_memory
        extra = {"optim": recipe.optim, "lora": recipe.lora, "freeze": recipe.train.freeze}
        return Memory(*given, **extra)

    @cached_property
    def step(self) -> Step:
        context = self.recipe.data.context
        pairs = self.corpus.pairs if self.corpus else context * (context + 1) / 2
        return Step(self.memory, self.recipe.data.batch_size, pairs, CARDS[self.card])

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu_memory

    @property
    def steps_of_epoch(self) -> float | None:
        """Steps in which as many tokens are read as the stores hold."""
        if self.corpus is None:
            return None
        data = self.recipe.data
        return self.corpus.tokens / (self.corpus.fill * (data.context + 1) * data.batch_size)

    def changed(self, change: Mapping[str, Any]) -> "Plan | None":
        """Return the plan with other settings of ``parallel`` and ``micro_batch_size``.

        None if rows cannot be laid out so.
        """
        parallel = dict(change)
        train = {"micro_batch_size": parallel.pop("micro_batch_size", self.memory.rows)}
        parallel = self.recipe.parallel.model_dump() | parallel
        try:
            mesh = ParallelSettings(**parallel)
            check_fits(mesh, self.recipe.model, self.recipe.data.context)
        except ValueError:
            return None
        if self.recipe.data.batch_size % (mesh.replicate * mesh.shard * train["micro_batch_size"]):
            return None
        train = self.recipe.train.model_copy(update=train)
        recipe = self.recipe.model_copy(update={"parallel": mesh, "train": train})
        return replace(self, recipe=recipe)

    def check(self) -> None:
        """Raise unless the plan fits, in one line with the smallest change that would."""
        if self.fits:
            return
        moment, _ = self.memory.peak
        need, limit = self.memory.total / GB, self.gpu_memory / GB
        remedy = next(self._remedies(), "no other setting of as many GPUs is enough: take more")
        raise ValueError(
            f"plan: a rank needs {need:.1f} GB ({moment}), {need - limit:.1f} more than the "
            f"{limit:g} of a GPU; {remedy}"
        )

    def _remedies(self) -> Iterator[str]:
        """Say which settings fit, fewest changes first."""
        found = []
        for change in _changes(self.recipe):
            plan = self.changed(change)
            if plan is not None and plan.fits:
                found.append((len(change), plan.step.seconds, change, plan))
        for _, _, change, plan in sorted(found, key=lambda entry: entry[:2]):
            words = " ".join(f"{_table(name)}.{name}={value}" for name, value in change.items())
            yield f"{words} needs {plan.memory.total / GB:.1f}"

    def suggestions(self) -> "list[Plan]":
        """List the meshes of as many GPUs that fit, the fastest first."""
        meshes, plans = _meshes(self.recipe.parallel.num_ranks), []
        for sizes, recompute in product(meshes, ("none", "all")):
            plan = self.changed(sizes | {"recompute": recompute})
            if plan is not None and plan.fits:
                plans.append(plan)
        return sorted(plans, key=lambda plan: plan.step.seconds)[:_SUGGESTED]


def run_plan(
    recipe: Recipe, *, gpus: int | None, card: str, memory: float | None, suggest: bool
) -> None:
    """Print the plan of a recipe, and with ``suggest`` the fastest meshes that fit.

    Raises:
        ValueError: one line, if the recipe reads no stores, or its plan does not fit the memory.
    """
    if not isinstance(recipe, StoreRecipe):
        raise ValueError(
            "plan: train.stage must be pretrain or dpo, whose memory is known, got "
            f"{recipe.train.stage}"
        )
    plan, console = plan_of(recipe, gpus=gpus, card=card, memory=memory), Console()
    show(plan, console)
    if suggest:
        show_suggestions(plan.suggestions(), console)
    plan.check()


def plan_of(recipe: StoreRecipe, *, gpus: int | None, card: str, memory: float | None) -> Plan:
    """Plan a recipe on its own mesh, or with as many replicas of it as ``gpus`` hold.

    Args:
        card: a key of ``CARDS``.
        memory: GB of a GPU, 10^9 bytes; None is that of the card.

    Raises:
        ValueError: one line, if the card is not known or rows cannot be laid out so.
    """
    if card not in CARDS:
        raise ValueError(f"plan: --card must be one of {', '.join(CARDS)}, got {card!r}")
    gpu_memory = CARDS[card].capacity if memory is None else int(memory * GB)
    plan = Plan(recipe, Corpus.of(recipe), card, gpu_memory)
    parallel = recipe.parallel
    if gpus is not None and gpus != parallel.num_ranks:
        replica = parallel.num_ranks // parallel.replicate
        if gpus % replica:
            raise ValueError(
                f"plan: --gpus must be a multiple of the {replica} ranks of shard x context x "
                f"tensor, got {gpus}"
            )
        parallel = parallel.model_copy(update={"replicate": gpus // replica})
    at_once = parallel.replicate * parallel.shard * recipe.train.micro_batch_size
    if recipe.data.batch_size % at_once:
        raise ValueError(
            f"plan: data.batch_size must be a multiple of {at_once}, the rows that "
            f"{parallel.num_ranks} GPUs take at once, got {recipe.data.batch_size}"
        )
    check_fits(parallel, recipe.model, recipe.data.context)
    return replace(plan, recipe=recipe.model_copy(update={"parallel": parallel}))


def show(plan: Plan, console: Console) -> None:
    """Print what a rank holds at its peak, and what a step takes."""
    moment, parts = plan.memory.peak
    table = Table("GB of a rank", f"at its peak: {moment}", title=_mesh(plan.recipe))
    for name, num_bytes in parts.items():
        table.add_row(name, f"{num_bytes / GB:.2f}")
    table.add_section()
    table.add_row("in all, PREDICTED", f"{plan.memory.total / GB:.2f} of {plan.gpu_memory / GB:g}")
    for name, of_moment in plan.memory.moments.items():
        if name != moment:
            table.add_row(f"  at another moment: {name}", f"{sum(of_moment.values()) / GB:.2f}")
    console.print(table)
    table = Table("a step", "")
    for name, value in _facts(plan):
        table.add_row(name, value)
    console.print(table)


def show_suggestions(plans: list[Plan], console: Console) -> None:
    table = Table("mesh", "recompute", "GB", "s a step", "MFU", title="Meshes that fit, PREDICTED")
    for plan in plans:
        parallel, step = plan.recipe.parallel, plan.step
        numbers = f"{plan.memory.total / GB:.1f}", f"{step.seconds:.2f}", f"{step.mfu:.0%}"
        table.add_row(_mesh(plan.recipe), parallel.recompute, *numbers)
    console.print(table)


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, step, corpus = plan.recipe, plan.step, plan.corpus
    tokens, steps = recipe.data.batch_size * recipe.data.context, recipe.train.steps
    yield "tokens", f"{tokens:,}, {step.num_micro_batches} micro-batches of a data rank"
    yield "steps", f"{steps:,}; {tokens * steps / 1e9:,.1f} billion tokens"
    if corpus is None:
        yield "steps an epoch", "unknown: a store of data.sources is not there"
        yield "documents", "unknown: counted as one a row, of which attention takes most"
    else:
        yield "steps an epoch", f"{plan.steps_of_epoch:,.1f} of {corpus.tokens:,} tokens"
        yield "documents", f"rows are {corpus.fill:.1%} full; {corpus.pairs:,.0f} pairs attend"
    yield "FLOPs, COUNTED", f"{step.model_flops:.3g} of forward and backward"
    for name, (num_bytes, size, _) in (step.weight_bytes | step.token_bytes).items():
        if num_bytes:
            yield f"{name}, COUNTED", f"{num_bytes / GB:.1f} GB a rank among {size} ranks"
    if on_host := plan.memory.on_host:
        yield "on the host", f"{on_host / GB:.1f} GB a rank; its update and PCIe are not timed here"
    yield "seconds, PREDICTED", f"{step.seconds:.2f} on {plan.card}; {step.compute:.2f} of compute"
    yield "MFU, PREDICTED", f"{step.mfu:.0%}"
    yield "days, PREDICTED", f"{step.seconds * steps / 86400:,.1f} of {steps:,} steps"


def _mesh(recipe: StoreRecipe) -> str:
    p = recipe.parallel
    style = f" ({p.context_style})" if p.context > 1 else ""
    return (
        f"replicate {p.replicate} x shard {p.shard} x context {p.context}{style} x "
        f"tensor {p.tensor}"
    )


def _meshes(num_ranks: int) -> Iterator[dict[str, int]]:
    names = "replicate", "shard", "context", "tensor"
    divisors = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    for shard, context, tensor in product(divisors, repeat=3):
        if num_ranks % (shard * context * tensor) == 0:
            sizes = num_ranks // (shard * context * tensor), shard, context, tensor
            yield dict(zip(names, sizes, strict=True))


def _changes(recipe: StoreRecipe) -> Iterator[dict[str, Any]]:
    """Yield what may be changed for less memory on as many GPUs."""
    p, rows = recipe.parallel, recipe.train.micro_batch_size
    single: list[dict[str, Any]] = [{}]
    if rows > 1:
        single.append({"micro_batch_size": 1})
    if p.dtype == "float32":
        single.append({"dtype": "bfloat16"})
    for sizes in _meshes(p.num_ranks):
        if moved := {k: v for k, v in sizes.items() if v != getattr(p, k)}:
            single.append(moved)
    for change in single:
        if change:
            yield change
        if p.recompute != "all":
            yield change | {"recompute": "all"}


def _table(name: str) -> str:
    return "train" if name == "micro_batch_size" else "parallel"
