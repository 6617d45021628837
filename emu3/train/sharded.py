"""The weights of a parallel decoder, and what belongs to them, as whole tensors that ranks share.

A view has the name and the shape of the official files, whatever the mesh: what is saved on one
mesh is loaded on another. q, k, v, gate and up are apart.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from emu3.data.order import key_of
from emu3.files import flush
from emu3.model import Emu3
from emu3.train.compact_adamw import MOMENTS, CompactAdamW
from emu3.train.layout import Layout
from emu3.train.lora import LoraSettings, adapted, merged, save_adapters
from emu3.train.parallel import Cut, cuts_of
from emu3.train.ranks import is_first, together
from emu3.weights import save_tensors
from emu3.weights.files import check_place, nothing_missing, read_headers, shards_of
from emu3_kernels.modules import RotaryEmbedding

_UPDATES = "updates"
"""Steps of AdamW: those that were skipped do not count."""
_NOTES = "notes.json"
_DRAFT, _REMOVED = ".draft", ".removed"
_OFFICIAL = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out.weight": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down.weight": ("mlp.down_proj",),
}


def sharded_views(
    model: Emu3,
    layout: Layout,
    of: Callable[[Tensor], Tensor | None] = lambda parameter: parameter,
) -> dict[str, DTensor]:
    """Return a view of every weight under its official name; writing to it writes to the model.

    Those of adapters end in ``lora_A.weight``, one for packed projections, and ``lora_B.weight``.

    Args:
        model: that was passed to ``parallelize``.
        layout: of its ranks.
        of: maps a parameter to what is viewed, of the same sharding: ``lambda p: p.grad``; or to
            this rank's part of it, also on the host. What it maps to None is passed over.
    """
    views, table = {}, cuts_of(model)
    for name, parameter in model.named_parameters():
        cut, viewed = table[name], of(parameter)
        if viewed is None:
            continue
        local = viewed.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        parts = [rows // layout.settings.tensor for rows in cut.parts]
        for i, part in enumerate(local.split(parts) if parts else (local,)):
            shape = list(part.shape)
            if cut.fsdp is not None:
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
        Replicate() if cut.fsdp is None else Shard(cut.fsdp),
        Replicate() if cut.tensor is None else Shard(cut.tensor),
    ]
    stride = torch.empty(shape, device="meta").stride()
    # A mesh of other devices would be given a copy.
    mesh = layout.host if part.is_cpu else layout.storage
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _official(name: str, nth: int) -> str:
    whole = {"embedding.weight": "embed_tokens", "norm": "norm"}
    if name == "head.weight":
        return "lm_head.weight"
    if name in whole:
        return f"model.{whole[name]}.weight"
    weight, matrix = adapted(name)
    _, number, rest = weight.split(".", 2)
    leaf = "weight" if matrix is None else f"{matrix}.weight"
    return f"model.layers.{number}.{_OFFICIAL[rest][nth]}.{leaf}"


class Saver:
    """Writes checkpoints of a run to ``folder/step-N`` in a thread, while training goes on.

    A checkpoint is whole if its folder has this name: it is written under another one, flushed and
    renamed. None is ever overwritten. Every rank must call, in the same order.

    Args:
        keep: checkpoints that are kept, the last ones.
    """

    def __init__(
        self, folder: Path, model: Emu3, optimizer: Optimizer, layout: Layout, *, keep: int = 2
    ) -> None:
        self.folder, self.keep = folder, keep
        self._state = lambda: _state(model, optimizer, layout)[0]
        # Of its own: the thread exchanges messages while training does.
        self._group = dist.new_group(backend="gloo")
        self._mesh = layout.host
        self._thread, self._pending = ThreadPoolExecutor(1), None

    def save(self, step: int, notes: Mapping[str, Any] | None = None) -> None:
        """Copy the state after ``step`` steps to the host, and start to write it.

        Args:
            notes: what else :func:`load_sharded` returns, as JSON.

        Raises:
            ValueError: one line, if this or the last checkpoint cannot be written.
        """
        self.wait()
        state = {name: self._copied(value) for name, value in self._state().items()}
        self._pending = self._thread.submit(self._write, state, step, dict(notes or {}))

    def wait(self) -> None:
        """Wait until the last checkpoint is whole."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def shutdown(self) -> None:
        """End the thread, after what it still writes."""
        self._thread.shutdown()

    def _copied(self, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value.to("cpu", copy=True)
        local = value.to_local().to("cpu", copy=True)
        options = {"run_check": False, "shape": value.shape, "stride": value.stride()}
        return DTensor.from_local(local, self._mesh, value.placements, **options)

    def _write(self, state: dict[str, Tensor], step: int, notes: dict[str, Any]) -> None:
        draft, group = self.folder / f"step-{step}{_DRAFT}", self._group
        steps = (
            lambda: shutil.rmtree(draft, ignore_errors=True) if is_first() else None,
            lambda: dcp.save(state, checkpoint_id=draft, process_group=group),
            lambda: self._finish(draft, step, notes) if is_first() else None,
        )
        try:
            for do in steps:
                together(do, group)
        except ValueError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise ValueError(f"train: cannot save step {step} to {self.folder}: {error}") from None

    def _finish(self, draft: Path, step: int, notes: dict[str, Any]) -> None:
        (draft / _NOTES).write_text(json.dumps({"step": step, **notes}))
        for path in (*draft.iterdir(), draft):
            flush(path)
        final = self.folder / f"step-{step}"
        _remove(final)
        draft.rename(final)
        flush(self.folder)
        for old in checkpoints(self.folder)[: -self.keep]:
            _remove(old)


def load_sharded(folder: Path, model: Emu3, optimizer: Optimizer, layout: Layout) -> dict[str, Any]:
    """Restore a checkpoint of any mesh, and return its notes, ``step`` among them.

    Every rank must call. Its index is read by ``pickle``: load no checkpoint of strangers.

    Args:
        folder: ``step-N`` of a run.

    Raises:
        ValueError: one line, if a file is missing or damaged.
    """
    state, copies = _state(model, optimizer, layout)
    notes = together(lambda: read_notes(folder))
    try:
        together(lambda: dcp.load(state, checkpoint_id=folder))
    except ValueError as error:
        raise ValueError(f"resume: {folder} is damaged: {error}") from None
    for copy in copies:
        optimizer.write(*copy)
    for of_parameter in optimizer.state.values():
        of_parameter["step"].copy_(state[_UPDATES])
    return notes


def read_notes(folder: Path) -> dict[str, Any]:
    """Return what was saved beside the tensors of a checkpoint."""
    try:
        return json.loads((folder / _NOTES).read_text())
    except (OSError, ValueError):
        raise ValueError(f"resume: {folder} is damaged: it has no {_NOTES} of ours") from None


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left."""
    for ending in (_DRAFT, _REMOVED):
        for left in folder.glob(f"step-*{ending}"):
            shutil.rmtree(left)


def _remove(checkpoint: Path) -> None:
    """Remove it, if it exists; it loses its name first, so that no part of it looks whole."""
    if checkpoint.exists():
        removed = checkpoint.with_suffix(_REMOVED)
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
        shutil.rmtree(removed)


def save_whole(path: Path, model: Emu3, layout: Layout, lora: LoraSettings | None = None) -> None:
    """Write the weights as one file of the official layout; every rank must call.

    Rank 0 holds the whole model on its host.

    Args:
        lora: of the adapters of ``model``, which are merged into the weights.

    Raises:
        ValueError: one line, if the file cannot be written.
    """
    whole = _gathered(sharded_views(model, layout))
    if lora is not None:
        whole = merged(whole, lora.alpha / lora.rank)
    metadata = {"decoder": model.settings.model_dump_json()}
    together(lambda: save_tensors(path, whole, metadata) if is_first() else None)


def save_adapter(folder: Path, model: Emu3, layout: Layout, lora: LoraSettings, base: str) -> None:
    """Write the adapters of ``model`` as a folder of PEFT; every rank must call.

    Args:
        base: what its config names as the base model.

    Raises:
        ValueError: one line, if a file cannot be written.
    """
    views = sharded_views(model, layout)
    found = _gathered({name: view for name, view in views.items() if ".lora_" in name})
    together(lambda: save_adapters(folder, found, lora, base) if is_first() else None)


def _gathered(views: Mapping[str, DTensor]) -> dict[str, Tensor]:
    """Return whole tensors on the host of the first rank, nothing on others."""
    whole = {}
    for name, view in views.items():
        tensor = view.full_tensor()
        if is_first():
            whole[name] = tensor.cpu()
    return whole


def load_whole(path: Path, model: Emu3, layout: Layout) -> None:
    """Fill the weights from a safetensors file, or a folder of shards, in the official layout.

    Every rank reads what it holds, rounded to the dtype of its weights; all must call.

    Raises:
        ValueError: one line, if a weight is missing or has another shape.
    """
    found, views = read_headers(path).tensors, sharded_views(model, layout)
    views = {name: view for name, view in views.items() if ".lora_" not in name}
    nothing_missing({name: view for name, view in views.items() if name not in found}, path)
    for name, view in views.items():
        check_place(view, found[name], name, path)
    with TemporaryDirectory() as folder:  # the reader takes every file of one
        for shard in shards_of(path):
            (Path(folder) / shard.name).symlink_to(shard.absolute())
        dcp.load(views, storage_reader=dcp.HuggingFaceStorageReader(folder))


def allocate(model: Emu3, layout: Layout) -> None:
    """Give a model on the meta device, cut already, its memory on the devices of ``layout``."""
    s, device = model.settings, layout.groups.device_type
    model.to_empty(device="cpu" if layout.settings.offload else device)
    tables = s.max_position_embeddings, s.head_dim
    model.rotate = RotaryEmbedding(*tables, theta=s.rope_theta, device=device)


@torch.no_grad()
def initialise(model: Emu3, layout: Layout, seed: int) -> None:
    """Draw the weights: those of a seed are the same on every mesh.

    A rank draws one whole tensor after the other, on its device, and keeps its part.
    """
    s = model.settings
    for name, view in sharded_views(model, layout).items():
        local = view.to_local()
        if ".lora_" in name:
            continue
        if view.ndim == 1:
            local.fill_(1)
            continue
        random = torch.Generator(local.device).manual_seed(key_of(seed, name))
        whole = torch.empty(view.shape, dtype=torch.float32, device=local.device)
        whole.normal_(std=s.init_std, generator=random)
        if name == "model.embed_tokens.weight":
            whole[s.vocabulary.pad] = 0
        placed = distribute_tensor(whole, view.device_mesh, view.placements, src_data_rank=None)
        local.copy_(placed.to_local())  # rounded to the dtype of the weights


@torch.no_grad()
def initialise_adapters(model: Emu3, layout: Layout, seed: int) -> None:
    """Draw the adapters as PEFT does, ``B`` 0: those of a seed are the same on every mesh."""
    for name, view in sharded_views(model, layout).items():
        local = view.to_local()
        if name.endswith(".lora_B.weight"):
            local.zero_()
        elif name.endswith(".lora_A.weight"):
            random = torch.Generator(local.device).manual_seed(key_of(seed, name))
            bound = view.shape[1] ** -0.5
            whole = torch.empty(view.shape, dtype=local.dtype, device=local.device)
            whole.uniform_(-bound, bound, generator=random)
            placed = distribute_tensor(whole, view.device_mesh, view.placements, src_data_rank=None)
            local.copy_(placed.to_local())


def checkpoints(folder: Path) -> list[Path]:
    """List the whole checkpoints of ``folder``, oldest first."""
    found = {
        int(path.name[5:]): path
        for path in folder.glob("step-*")
        if path.name[5:].isdecimal() and (path / ".metadata").is_file()
    }
    return [found[step] for step in sorted(found)]


def _state(
    model: Emu3, optimizer: Optimizer, layout: Layout
) -> tuple[dict[str, Tensor], list[tuple[Tensor, str, Tensor]]]:
    """View the weights, both moments of AdamW, which it makes in its first step, and its count.

    Frozen weights have no moments. Moments of a :class:`CompactAdamW` are copies, the arguments of
    its ``write``, float32 as those of AdamW: whatever an optimizer keeps, another one may continue.
    """
    copies: list[tuple[Tensor, str, Tensor]] = []
    if isinstance(optimizer, CompactAdamW):
        optimizer.prepare()
    else:
        _prepare(optimizer)

    def moment_of(parameter: Tensor, moment: str) -> Tensor | None:
        if not parameter.requires_grad:
            return None
        if not isinstance(optimizer, CompactAdamW):
            return optimizer.state[parameter][moment]
        copies.append((parameter, moment, optimizer.read(parameter, moment)))
        return copies[-1][2]

    views = {f"weight.{name}": view for name, view in sharded_views(model, layout).items()}
    for moment in MOMENTS:
        of_moment = sharded_views(model, layout, lambda p, m=moment: moment_of(p, m))
        views |= {f"{moment}.{name}": view for name, view in of_moment.items()}
    count = next(iter(optimizer.state.values()))["step"]
    return views | {_UPDATES: count.detach().to("cpu", copy=True)}, copies


def _prepare(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        counts_on_device = group["fused"] or group["capturable"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros(
                    (), device=parameter.device if counts_on_device else "cpu"
                )
                state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
