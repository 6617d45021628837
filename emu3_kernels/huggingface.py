"""The ops inside a Hugging Face Emu3: ``model = emu3_kernels.huggingface.apply(model)``.

B batch, T tokens, D model width, K ``head_dim``. Every function below ``apply`` is the forward pass
of one kind of module, with its signature in transformers, which only this file imports.
"""

import inspect
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3_kernels.modules.forward import (
    check_own_forward,
    class_forward,
    replace_forward,
    runs_alone,
)
from emu3_kernels.modules.slow_bfloat16 import speed_up_bfloat16
from emu3_kernels.ops.loss.api import linear_cross_entropy
from emu3_kernels.ops.norm.api import add_rms_norm, rms_norm
from emu3_kernels.ops.rope.api import rope
from emu3_kernels.ops.swiglu.api import swiglu
from emu3_kernels.ops.vq.api import LARGEST_DIM, nearest_code
from emu3_kernels.runtime.gemm import linear


def apply(model: nn.Module, *, skip_logits: bool | None = None) -> nn.Module:
    """Replace the parts of a Hugging Face Emu3 for which there is an op by that op.

    These are RMSNorm (after attention fused with the residual sum), SwiGLU, the rotation of queries
    and keys, the nearest code of the vision tokenizer, linear layers on a CPU that is slow in
    bfloat16 (:func:`emu3_kernels.modules.speed_up_bfloat16`), on a GPU the head, whose odd number
    of classes makes the GEMMs of PyTorch slow, and the loss: called with ``labels``
    **in training mode**, the model computes it by :func:`emu3_kernels.linear_cross_entropy` from
    the hidden states, and **the ``.logits`` that it returns are None**. In evaluation mode it
    returns loss and logits as transformers does, which metrics and ``Trainer.predict`` read. The
    fused loss is that of transformers, with ``num_items_in_batch``, ``shift_labels`` and
    ``ignore_index``, but 0 without a valid token, where transformers returns NaN. A call that the
    op does not cover runs as before: with ``logits_to_keep``, another ``loss_function``, or a head
    that is not a plain linear layer. So do an MLP with another activation than SiLU, a codebook of
    more than 32 dimensions, and parametrized parts.

    The instance alone is changed, in place: the classes of its parts become subclasses of the same
    name, and parameters, state dicts, signatures, caches and gradient checkpointing stay. Copies
    and replicas of ``nn.DataParallel`` are changed too, pickled models are not. A part with hooks,
    those of ``accelerate`` too, is called with them, and not fused with its neighbors; they may be
    there before or come after. Results differ from those before by rounding alone, and are mostly
    more accurate: cosines and sines stay float32 under bfloat16 weights, and each op rounds once.

    Args:
        model: any Emu3 model of ``transformers``: ``Emu3ForCausalLM``,
            ``Emu3ForConditionalGeneration``, ``Emu3Model``, ``Emu3TextModel`` or ``Emu3VQVAE``.
        skip_logits: whether a call with ``labels`` computes the loss alone; None is in training
            mode alone. An evaluation that reads no logits saves their memory by True. The same
            keyword of a call, which ``Trainer`` passes with ``use_liger_kernel`` and
            ``prediction_loss_only``, comes before it.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: the forward pass of a part was replaced before, by something else than a hook.
    """
    from transformers.models.emu3 import modeling_emu3 as hf

    known = (hf.Emu3PreTrainedModel, hf.Emu3VQVAE)
    if not isinstance(model, known):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"huggingface.apply: model must be an Emu3 of transformers, got {kind}")
    forwards: dict[type, Callable] = {
        hf.Emu3RMSNorm: _rms_norm,
        hf.Emu3MLP: _mlp,
        hf.Emu3RotaryEmbedding: _rotary_embedding,
        hf.Emu3Attention: _attention,
        hf.Emu3DecoderLayer: _decoder_layer,
        hf.Emu3VQVAEVectorQuantizer: _vector_quantizer,
    }
    for kind in (hf.Emu3ForCausalLM, hf.Emu3ForConditionalGeneration):
        forwards[kind] = _with_fused_loss(kind.forward, skip_logits)
    found = [
        (name, module, forward)
        for name, module in model.named_modules()
        for kind, forward in forwards.items()
        if isinstance(module, kind) and class_forward(module) is kind.forward and _fits(module)
    ]
    for name, module, _ in found:
        check_own_forward("huggingface.apply", name, module)
    heads = [module.lm_head for _, module, _ in found if hasattr(module, "lm_head")]
    found += [("", head, _head) for head in heads if runs_alone(head, nn.Linear.forward)]
    speed_up_bfloat16(model, nn.Linear)
    for _, module, forward in found:
        replace_forward(module, forward)
    return model


def _fits(module: nn.Module) -> bool:
    """Return whether the op computes the same as ``module``."""
    if hasattr(module, "act_fn"):
        return module.config.hidden_act in ("silu", "swish")
    if isinstance(getattr(module, "embedding", None), nn.Embedding):
        return module.embedding.embedding_dim <= LARGEST_DIM
    return True


def _rms_norm(self, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _head(self, input: Tensor) -> Tensor:
    return linear(input, self.weight, self.bias)


def _mlp(self, x: Tensor) -> Tensor:
    from transformers.activations import SiLUActivation

    gate, up, silu = self.gate_proj(x), self.up_proj(x), self.act_fn
    alone = runs_alone(silu, SiLUActivation.forward, nn.SiLU.forward)
    return self.down_proj(swiglu(gate, up) if alone else silu(gate) * up)


def _rotary_embedding(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[B or 1, T, K]`` in float32, not in the dtype of ``x``."""
    compute = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return class_forward(self)(self, compute, position_ids)


def _attention(
    self,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache=None,
    past_key_values=None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    from transformers.models.emu3 import modeling_emu3 as hf

    # Named past_key_values before transformers 5.24.
    cache = past_key_values if cache is None else cache

    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
    q, k = _rotated(q, k, *position_embeddings)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    v = self.v_proj(hidden_states).view(heads).transpose(1, 2)
    if cache is not None:  # a paged cache adds to kwargs, which attend reads
        k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
    attend = hf.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, hf.eager_attention_forward
    )
    dropout = self.attention_dropout if self.training else 0.0
    attended, scores = attend(
        self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
    )
    return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1).contiguous()), scores


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate by ``cos`` and ``sin [B or 1, T, K]``, whose two halves are the same.

    Their rows are the table of the op: row 0 on for sequences that share positions, else a range
    of rows for each sequence.
    """
    batch, num_tokens, head_dim = cos.shape
    compute = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = (x[..., : head_dim // 2].flatten(0, 1).to(compute) for x in (cos, sin))
    positions = None
    if batch > 1:
        positions = torch.arange(batch * num_tokens, device=q.device).view(batch, num_tokens)
    return rope(q, k, cos, sin, positions)


def _decoder_layer(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    from transformers.models.emu3 import modeling_emu3 as hf

    if args:
        names = [*inspect.signature(type(self).forward).parameters][2:]
        kwargs |= zip(names, args, strict=False)
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    branch = self.dropout(branch)
    norm = self.post_attention_layernorm
    if runs_alone(norm, hf.Emu3RMSNorm.forward):
        x, residual = add_rms_norm(branch, hidden_states, norm.weight, norm.variance_epsilon)
    else:
        residual = branch + hidden_states
        x = norm(residual)
    return residual + self.dropout(self.mlp(x))


def _vector_quantizer(self, hidden_state: Tensor) -> Tensor:
    """Return codes ``[B, t, h, w]`` of latents ``[B, t, D, h, w]``, without a copy of these."""
    return nearest_code(hidden_state.transpose(1, 2), self.embedding.weight)


@cache
def _with_fused_loss(original: Callable, skip_logits: bool | None) -> Callable:
    """Return ``original``, the forward pass of a model with a head, with the fused loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.utils import can_return_tuple

    names = tuple(inspect.signature(original).parameters)[1:]
    with_loss = can_return_tuple(_causal_lm)

    def forward(self, *args, **kwargs):
        kwargs |= zip(names, args, strict=False)
        keep, head = kwargs.get("logits_to_keep", 0), self.lm_head
        skip = kwargs.pop("skip_logits", None)
        skip = skip_logits if skip is None else skip
        if (
            (self.training if skip is None else skip)
            and kwargs.get("labels") is not None
            and self.loss_function is ForCausalLMLoss
            and (isinstance(keep, int) and keep == 0)
            and runs_alone(head, nn.Linear.forward)
            and head.bias is None
        ):
            return with_loss(self, **kwargs)
        return original(self, **kwargs)

    return forward


def _causal_lm(self, *, labels: Tensor, logits_to_keep: int = 0, **kwargs):
    from transformers.modeling_outputs import CausalLMOutputWithPast

    outputs = self.model(**kwargs)
    cache = "cache" if hasattr(outputs, "cache") else "past_key_values"
    return CausalLMOutputWithPast(
        loss=_loss(outputs.last_hidden_state, self.lm_head.weight, labels, **kwargs),
        **{cache: getattr(outputs, cache)},
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: object,
) -> Tensor:
    """``ForCausalLMLoss`` of transformers: a token predicts the label of the next one."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return linear_cross_entropy(
        hidden,
        head,
        shift_labels.reshape(hidden.shape[:-1]).to(hidden.device),
        normalizer=num_items_in_batch,
        ignore_index=ignore_index,
    )
