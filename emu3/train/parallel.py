"""A decoder over replicate x shard x context x tensor ranks, from outside the model.

FSDP2 shards weights over shard x context ranks along the hidden size, tensor parallelism the other
dimension, so that no dimension is cut twice. Tensor parallelism works on local tensors and hooks
(DTensor's cuts packed matrices wrong); residual stream, norms and dropout hold T/tensor tokens.

B rows of a data rank, T tokens of a row, C context ranks, P tensor ranks, D hidden size.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from emu3.config import ModelSettings
from emu3.model import Emu3, StepDropout
from emu3.train.exchange import gather_tokens, scatter_tokens, swap, ulysses
from emu3.train.layout import Batch, Layout, ParallelSettings
from emu3.train.lora import adapted, set_dropout
from emu3_kernels import (
    Documents,
    HeadShard,
    linear_cross_entropy,
    ring_attention,
    site_seeds,
)


class Cut(NamedTuple):
    """How a weight is sharded: the dims of tensor and of FSDP ranks, rows of its packed parts."""

    tensor: int | None
    fsdp: int | None
    """None for adapters, of which every FSDP rank has all."""
    parts: tuple[int, ...] = ()


def cuts(s: ModelSettings) -> dict[str, Cut]:
    """Return how every weight of the model is sharded."""
    keys = s.num_kv_heads * s.head_dim
    table = {"embedding.weight": Cut(1, 0), "head.weight": Cut(0, 1), "norm": Cut(None, 0)}
    for number in range(s.num_layers):
        of_block = {
            "attention_norm": Cut(None, 0),
            "attention.qkv.weight": Cut(0, 1, (s.num_heads * s.head_dim, keys, keys)),
            "attention.out.weight": Cut(1, 0),
            "mlp_norm": Cut(None, 0),
            "mlp.gate_up.weight": Cut(0, 1, (s.intermediate_size, s.intermediate_size)),
            "mlp.down.weight": Cut(1, 0),
        }
        table |= {f"blocks.{number}.{name}": cut for name, cut in of_block.items()}
    return table


def cuts_of(model: Emu3) -> dict[str, Cut]:
    """Return how every parameter of a model is sharded, adapters included.

    ``A`` is cut where its weight is cut along the input, ``B`` where it is along the output.
    """
    table, found = cuts(model.settings), {}
    for name, _ in model.named_parameters():
        weight, matrix = adapted(name)
        cut = table[weight]
        if matrix == "lora_A":
            cut = Cut(1 if cut.tensor == 1 else None, None)
        elif matrix == "lora_B":
            cut = Cut(0, None, cut.parts) if cut.tensor == 0 else Cut(None, None)
        found[name] = cut
    return found


def parallelize(model: Emu3, layout: Layout) -> None:
    """Shard a whole model, the same on every rank, in place; ``objective`` is then its forward.

    Weights stay in their dtype; with ``bfloat16`` they are gathered, and computed with, in
    bfloat16, and gradients are reduced in float32.
    """
    # Blocks return views; no op of the model is in place, of which FSDP warns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    s = layout.settings
    if s.tensor > 1:
        _tensor_parallel(model, layout)
    if s.context > 1:
        run = {"ring": ring_attention, "ulysses": ulysses}[s.context_style]
        for block in model.blocks:
            block.attention.attend = partial(run, group=layout.group("context"))
    table = cuts_of(model)
    dims = {parameter: table[name].fsdp for name, parameter in model.named_parameters()}
    mesh = layout.storage["replicate", "fsdp"] if s.replicate > 1 else layout.storage["fsdp"]
    options = {
        "mesh": mesh,
        "mp_policy": _precision(s),
        "offload_policy": _offload(layout),
        "shard_placement_fn": lambda parameter: Shard(dims[parameter]),
        "ignored_params": {parameter for parameter, dim in dims.items() if dim is None},
    }
    for block in model.blocks:
        _recompute(block, s.recompute)
        if s.compile:
            block.compile()  # with its hooks, before FSDP adds its own
        fully_shard(block, **options)
    fully_shard(model.embedding, **options)
    fully_shard(model, **options)  # norm and head, whose weights the loss reads
    register_fsdp_forward_method(model, "objective")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are summed: the loss is divided by the weight of all ranks. Gloo has no
            # multiplied sum, which any factor is by default.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class StepLoss(NamedTuple):
    """The loss of a step, and what it is made of, each of all ranks."""

    loss: Tensor
    """float32, divided by the weight of the step."""
    sums: Tensor
    """``[2]`` float64, of the losses of text and of visual targets, before their weights."""
    counts: Tensor
    """``[2]`` float64, text and visual targets of a weight above 0."""
    tokens: Tensor
    """float64, without padding."""
    pairs: Tensor
    """float64, of tokens and those that they attend to."""

    def metrics(self) -> dict[str, Tensor]:
        """Return the mean loss of text and of visual targets: NaN of none."""
        text, vision = (self.sums / self.counts).unbind()
        return {"text_loss": text, "vision_loss": vision}


def accumulate_gradients(
    model: Emu3,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    seeds: Tensor | None = None,
    z_loss: float = 0.0,
) -> StepLoss:
    """Add up the gradients of a step's micro-batches, and return the loss of all ranks.

    Row b of micro-batch m of data rank i is row ``(m * data_ranks + i) * B + b`` of the step, by
    which dropout counts. The loss is divided by the weight of the whole step. Gradients are reduced
    over shards in each micro-batch, so that no rank holds whole ones, and over replicas in the
    last.

    Args:
        model: that was passed to :func:`parallelize`.
        layout: of its ranks.
        batches: of this data rank, B rows each, the same on its context and tensor ranks; as many
            on every rank.
        seeds: :func:`step_seeds`; None only without dropout: ranks would draw others.
        z_loss: factor of the squared log-sum-exp.
    """
    check_seeds(model, seeds)
    given = {"normalizer": layout.total_weight(batches), "z_loss": z_loss}
    objective = partial(_objective, model, layout, **given)
    return _of_all_ranks(backward_all(model, layout, batches, objective, seeds))


def check_seeds(model: Emu3, seeds: Tensor | None) -> None:
    if seeds is None and model.training and model.settings.dropout > 0:
        raise ValueError("parallel: a model with dropout must be given seeds, got none")


def backward_all(
    model: Emu3,
    layout: Layout,
    batches: Sequence[tuple],
    objective: Callable[..., tuple[Tensor, Tensor]],
    seeds: Tensor | None = None,
) -> Tensor:
    """Add up the gradients of any objective, as :func:`accumulate_gradients` does.

    ``objective(batch, dropout=...)`` returns this rank's part of the loss and numbers of this rank;
    their sums over micro-batches and ranks are returned.
    """
    parts = []
    for number, batch in enumerate(batches):
        model.set_requires_all_reduce(number + 1 == len(batches))
        first = (number * layout.data_ranks + layout.data_rank) * len(batch.tokens)
        dropout = None if seeds is None else _dropout(model, layout, batch, seeds, first)
        loss, part = objective(batch, dropout=dropout)
        loss.backward()
        parts.append(part)
        if number == 0 and len(batches) > 1:
            _sum_in_float32(model)
    return layout.sum(torch.stack(parts).sum(0))


def _sum_in_float32(model: Emu3) -> None:
    """Let the gradients of the next micro-batches be added up in float32, also of other weights."""
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.dtype != torch.float32:
            parameter.grad_dtype = None  # any
            parameter.grad = parameter.grad.float()


@torch.no_grad()
def evaluate(model: Emu3, layout: Layout, batches: Sequence[Batch]) -> StepLoss:
    """Return the loss of all ranks without dropout, as of one step; the arguments are those of
    :func:`accumulate_gradients`."""
    normalizer = layout.total_weight(batches)
    return _of_all_ranks(
        forward_all(
            model, layout, batches, lambda batch: _objective(model, layout, batch, normalizer)
        )
    )


@torch.no_grad()
def forward_all(
    model: Emu3,
    layout: Layout,
    batches: Sequence[tuple],
    objective: Callable[[tuple], tuple[Tensor, Tensor]],
) -> Tensor:
    """Return the sums of :func:`backward_all` without dropout and gradients."""
    model.eval()
    parts = [objective(batch)[1] for batch in batches]
    model.reshard()  # norm and head, which wait for a backward pass
    model.train()
    return layout.sum(torch.stack(parts).sum(0))


def _objective(
    model: Emu3, layout: Layout, batch: Batch, normalizer: Tensor, **settings: object
) -> tuple[Tensor, Tensor]:
    """Return this rank's part of the loss, and that with sums and counts of both modalities."""
    tokens, targets, weights, positions = (layout.cut(x) for x in batch[:4])
    given = tokens, targets, weights, positions, documents_of(layout, batch.documents)
    loss, losses = model.objective(*given, normalizer, return_losses=True, **settings)
    valid, is_visual = weights != 0, targets >= model.settings.vocabulary.visual_start
    masks = [(valid & ~is_visual).double(), (valid & is_visual).double()]
    sums, counts = [(losses * mask).sum() for mask in masks], [mask.sum() for mask in masks]
    work = work_of(model, tokens, positions)
    return loss, torch.stack([loss.detach().double(), *sums, *counts, *work])


def work_of(model: Emu3, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Count the tokens without padding, and the pairs of one and a token that it attends to."""
    real = (tokens != model.settings.vocabulary.pad).double()
    return real.sum(), (real * (positions + 1)).sum()


def _of_all_ranks(total: Tensor) -> StepLoss:
    return StepLoss(total[0].float(), total[1:3], total[3:5], *total[5:].unbind())


def step_seeds(
    settings: ModelSettings, seed: int, step: int, device: torch.device, num_adapters: int = 0
) -> Tensor:
    """Return the seeds of :class:`StepDropout` for a step of a run: the same on every rank.

    Those of ``num_adapters`` with dropout follow.
    """
    # Seeds are unsigned, torch's integers signed.
    signed = seed - (seed >> 63 << 64)
    return site_seeds(signed, step, _num_sites(settings) + num_adapters, device)


def _num_sites(settings: ModelSettings) -> int:
    return 3 * settings.num_layers + 1


def _tensor_parallel(model: Emu3, layout: Layout) -> None:
    s, size, group = model.settings, layout.settings.tensor, layout.group("tensor")
    for name, cut in cuts_of(model).items():
        if cut.tensor is not None:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            whole = getattr(module, leaf)
            part = _part(whole.detach(), cut, layout.rank("tensor"), size)
            setattr(module, leaf, nn.Parameter(part, whole.requires_grad))
    heads = {"num_heads": s.num_heads // size, "num_kv_heads": s.num_kv_heads // size}
    for block in model.blocks:
        block.attention.settings = s.model_copy(update=heads)
        for module in (block.attention.qkv, block.mlp.gate_up):
            module.register_forward_pre_hook(
                lambda _, inputs: (gather_tokens(inputs[0], group), *inputs[1:])
            )
        for module in (block.attention.out, block.mlp.down):
            module.register_forward_hook(lambda _module, _inputs, y: scatter_tokens(y, group))
    model.embedding.register_forward_hook(lambda _module, _inputs, y: swap(y, 2, 1, group))
    model.linear_cross_entropy = partial(_vocabulary_parallel_loss, group)


def _vocabulary_parallel_loss(
    group: dist.ProcessGroup, hidden: Tensor, *args: Tensor, **settings: object
) -> Tensor:
    hidden = gather_tokens(hidden, group, whole_gradient=True)
    return linear_cross_entropy(hidden, *args, **settings, group=group)


def _part(weight: Tensor, cut: Cut, rank: int, size: int) -> Tensor:
    """Return what a tensor rank holds of a whole weight."""
    parts = weight.split(cut.parts, cut.tensor) if cut.parts else (weight,)
    return torch.cat([part.chunk(size, cut.tensor)[rank] for part in parts], cut.tensor)


def documents_of(layout: Layout, ids: Tensor) -> Documents | Tensor:
    """Return what the attention of the layout takes: a ring its shard, others those of all."""
    s = layout.settings
    return layout.cut(ids) if s.context > 1 and s.context_style == "ring" else Documents(ids)


def _dropout(
    model: Emu3, layout: Layout, batch: Batch, seeds: Tensor, first_sequence: int
) -> StepDropout:
    """Number what this rank holds of a batch as one process would; adapters get their seeds."""
    s, rank, device = layout.settings, layout.rank("tensor"), batch.tokens.device
    num_rows, num_tokens = batch.tokens.shape
    of_context = layout.cut(torch.arange(num_tokens, device=device)[None])
    first = first_sequence + torch.arange(num_rows, device=device)[:, None]
    num_heads, sites = model.settings.num_heads, _num_sites(model.settings)
    heads = HeadShard(num_heads, rank * num_heads // s.tensor, first_sequence)
    set_dropout(model, seeds[sites:], first * num_tokens + of_context)
    own = of_context.chunk(s.tensor, 1)[rank]
    return StepDropout(seeds[:sites], first * num_tokens + own, heads)


def _precision(s: ParallelSettings) -> MixedPrecisionPolicy:
    # Inputs are not cast: weights of tokens and the normalizer would be rounded to bfloat16.
    if s.dtype == "float32":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def _offload(layout: Layout) -> OffloadPolicy:
    if not layout.settings.offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=layout.groups.device_type == "cuda")


def _recompute(block: nn.Module, what: str) -> None:
    """Compute activations of a block again in backward: none, all but attention, or all.

    Random numbers are not restored: the seeds of dropout are arguments.
    """
    if what == "none":
        return
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "all_but_attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _attention_ops())
    block.forward = partial(checkpoint, block.forward, **options)


def _attention_ops() -> list:
    """List the ops of attention that torch knows; launches of Triton are computed again."""
    ops = torch.ops
    known = [
        ops.aten._scaled_dot_product_flash_attention.default,
        ops.aten._scaled_dot_product_cudnn_attention.default,
        ops.aten._flash_attention_forward.default,
    ]
    if hasattr(ops.emu3_kernels, "attention"):
        known.append(ops.emu3_kernels.attention.default)
    return known
