"""The weights of a parallel decoder, and what belongs to them, as whole tensors that ranks share.

A view has the name and the shape of the official files, whatever the mesh: what is saved on one
mesh is loaded on another. q, k, v, gate and up are apart.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from emu3.files import flush
from emu3.model import Emu3
from emu3.train.layout import Layout
from emu3.train.parallel import Cut, cuts
from emu3.weights import save_tensors
from emu3_kernels.modules import RotaryEmbedding

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, saved beside the weights."""
_OFFICIAL = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out.weight": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down.weight": ("mlp.down_proj",),
}


def sharded_views(
    model: Emu3, layout: Layout, of: Callable[[Tensor], Tensor] = lambda parameter: parameter
) -> dict[str, DTensor]:
    """Return a view of every weight under its official name; writing to it writes to the model.

    Args:
        model: that was passed to ``parallelize``.
        layout: of its ranks.
        of: maps a parameter to what is viewed, of the same sharding: ``lambda p: p.grad``.
    """
    views, table = {}, cuts(model.settings)
    for name, parameter in model.named_parameters():
        cut, local = table[name], of(parameter).detach().to_local()
        parts = [rows // layout.settings.tensor for rows in cut.parts]
        for i, part in enumerate(local.split(parts) if parts else (local,)):
            shape = list(part.shape)
            shape[cut.fsdp] = parameter.shape[cut.fsdp]
            if cut.tensor is not None:
                shape[cut.tensor] = _whole_size(model, layout, name, cut, i, shape[cut.tensor])
            views[_official(name, i)] = _view(part, layout, cut, shape)
    return views


def _whole_size(model: Emu3, layout: Layout, name: str, cut: Cut, nth: int, local_size: int) -> int:
    if name == "head.weight":  # of which the last ranks may have fewer rows
        return model.settings.vocabulary.size
    return cut.parts[nth] if cut.parts else local_size * layout.settings.tensor


def _view(part: Tensor, layout: Layout, cut: Cut, shape: list[int]) -> DTensor:
    placements = [
        Replicate(),
        Shard(cut.fsdp),
        Replicate() if cut.tensor is None else Shard(cut.tensor),
    ]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, layout.storage, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _official(name: str, nth: int) -> str:
    whole = {"embedding.weight": "embed_tokens", "norm": "norm"}
    if name == "head.weight":
        return "lm_head.weight"
    if name in whole:
        return f"model.{whole[name]}.weight"
    _, number, rest = name.split(".", 2)
    return f"model.layers.{number}.{_OFFICIAL[rest][nth]}.weight"


def save_sharded(
    folder: Path, model: Emu3, optimizer: Optimizer, layout: Layout, step: int, *, keep: int = 2
) -> None:
    """Write the state after ``step`` steps to ``folder/step-N``; every rank must call.

    A checkpoint is whole if its folder has this name: it is written under another one, flushed and
    renamed. An earlier one of the same step is replaced, and the oldest beyond ``keep`` removed.
    """
    draft = folder / f"step-{step}.draft"
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
    dist.barrier()
    dcp.save(_state(model, optimizer, layout) | {"step": torch.tensor(step)}, checkpoint_id=draft)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in (*draft.iterdir(), draft):
            flush(path)
        final = folder / f"step-{step}"
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        flush(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_sharded(folder: Path, model: Emu3, optimizer: Optimizer, layout: Layout) -> int:
    """Restore the last whole checkpoint of ``folder``, of any mesh; return the number of its steps.

    Every rank must call.

    Raises:
        ValueError: if ``folder`` holds no whole checkpoint.
    """
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"resume: {folder} must hold a checkpoint step-N, got none")
    state, step = _state(model, optimizer, layout), torch.tensor(0)
    dcp.load(state | {"step": step}, checkpoint_id=found[-1])
    for of_parameter in optimizer.state.values():
        of_parameter["step"].fill_(step.item())
    return int(step)


def save_whole(path: Path, model: Emu3, layout: Layout) -> None:
    """Write the weights as one file of the official layout; every rank must call.

    Rank 0 holds the whole model on its host.
    """
    whole = {}
    for name, view in sharded_views(model, layout).items():
        tensor = view.full_tensor()
        if dist.get_rank() == 0:
            whole[name] = tensor.cpu()
    if dist.get_rank() == 0:
        save_tensors(path, whole, {"decoder": model.settings.model_dump_json()})
    dist.barrier()


def load_whole(folder: Path, model: Emu3, layout: Layout) -> None:
    """Fill the weights from the safetensors of ``folder`` in the official layout.

    Every rank reads what it holds, rounded to the dtype of its weights; all must call. A model on
    the meta device is allocated first, on the devices of ``layout``.
    """
    if model.norm.is_meta:
        s, device = model.settings, layout.groups.device_type
        model.to_empty(device=device)
        tables = s.max_position_embeddings, s.head_dim
        model.rotate = RotaryEmbedding(*tables, theta=s.rope_theta, device=device)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(sharded_views(model, layout), storage_reader=reader)


def checkpoints(folder: Path) -> list[Path]:
    """List the whole checkpoints of ``folder``, oldest first."""
    found = {
        int(path.name[5:]): path
        for path in folder.glob("step-*")
        if path.name[5:].isdecimal() and (path / ".metadata").is_file()
    }
    return [found[step] for step in sorted(found)]


def _state(model: Emu3, optimizer: Optimizer, layout: Layout) -> dict[str, DTensor]:
    """View the weights and both moments of AdamW, which it makes in its first step."""
    for group in optimizer.param_groups:
        counts_on_device = group["fused"] or group["capturable"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros(
                    (), device=parameter.device if counts_on_device else "cpu"
                )
                state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
    views = {f"weight.{name}": view for name, view in sharded_views(model, layout).items()}
    for moment in MOMENTS:
        of_moment = sharded_views(model, layout, lambda p, m=moment: optimizer.state[p][m])
        views |= {f"{moment}.{name}": view for name, view in of_moment.items()}
    return views
