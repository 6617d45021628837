"""The ops inside a Hugging Face Emu3: ``model = emu3_kernels.huggingface.apply(model)``.

B batch, T tokens, D model width, K ``head_dim``. Every function below ``apply`` is the forward pass
of one kind of module, with its signature in transformers, which only this file imports.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3_kernels.modules.slow_bfloat16 import (
    check_own_forward,
    replace_forward,
    speed_up_bfloat16,
)
from emu3_kernels.ops.loss.api import linear_cross_entropy
from emu3_kernels.ops.norm.api import add_rms_norm, rms_norm
from emu3_kernels.ops.rope.api import rope
from emu3_kernels.ops.swiglu.api import swiglu
from emu3_kernels.ops.vq.api import LARGEST_DIM, nearest_code


def apply(model: nn.Module) -> nn.Module:
    """Replace the parts of a Hugging Face Emu3 for which there is an op by that op.

    These are RMSNorm (after attention fused with the residual sum), SwiGLU, the rotation of queries
    and keys, the nearest code of the vision tokenizer, linear layers on a CPU that is slow in
    bfloat16 (:func:`emu3_kernels.modules.speed_up_bfloat16`), and the loss: called with
    ``labels``, the model computes it by :func:`emu3_kernels.linear_cross_entropy` from the hidden
    states, and **the ``.logits`` that it returns are None**; call it without labels for logits. The
    loss is that of transformers, with ``num_items_in_batch``, ``shift_labels`` and
    ``ignore_index``, but 0 without a valid token, where transformers returns NaN. A call that the
    op does not cover runs as before: with ``logits_to_keep``, another ``loss_function``, or a head
    that is not a plain linear layer. So do an MLP with another activation than SiLU and a codebook
    of more than 32 dimensions.

    The instance alone is changed, in place: no class is, nor parameters, state dicts, signatures,
    caches, hooks or gradient checkpointing. Copies are changed too, pickled ones are not. Results
    differ from those before by rounding alone, and are mostly more accurate: cosines and sines stay
    float32 under bfloat16 weights, and each op rounds once.

    Args:
        model: any Emu3 model of ``transformers``: ``Emu3ForCausalLM``,
            ``Emu3ForConditionalGeneration``, ``Emu3Model``, ``Emu3TextModel`` or ``Emu3VQVAE``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: the forward pass of a part was replaced before, by something else.
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
        hf.Emu3ForCausalLM: _with_fused_loss(hf.Emu3ForCausalLM.forward),
        hf.Emu3ForConditionalGeneration: _with_fused_loss(hf.Emu3ForConditionalGeneration.forward),
    }
    found = [
        (name, module, forward)
        for name, module in model.named_modules()
        for kind, forward in forwards.items()
        if isinstance(module, kind) and type(module).forward is kind.forward and _fits(module)
    ]
    for name, module, _ in found:
        check_own_forward("huggingface.apply", name, module)
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


def _mlp(self, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(self.act_fn(gate) * up if _is_hooked(self.act_fn) else swiglu(gate, up))


def _rotary_embedding(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[B or 1, T, K]`` in float32, not in the dtype of ``x``."""
    compute = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return type(self).forward(self, compute, position_ids)


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
    if args:
        names = [*inspect.signature(type(self).forward).parameters][2:]
        kwargs |= zip(names, args, strict=False)
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    branch = self.dropout(branch)
    norm = self.post_attention_layernorm
    if _is_hooked(norm):
        residual = branch + hidden_states
        x = norm(residual)
    else:
        x, residual = add_rms_norm(branch, hidden_states, norm.weight, norm.variance_epsilon)
    return residual + self.dropout(self.mlp(x))


def _vector_quantizer(self, hidden_state: Tensor) -> Tensor:
    """Return codes ``[B, t, h, w]`` of latents ``[B, t, D, h, w]``, without a copy of these."""
    return nearest_code(hidden_state.transpose(1, 2), self.embedding.weight)


def _with_fused_loss(original: Callable) -> Callable:
    """Return ``original``, the forward pass of a model with a head, with the fused loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.utils import can_return_tuple

    names = tuple(inspect.signature(original).parameters)[1:]
    with_loss = can_return_tuple(_causal_lm)

    def forward(self, *args, **kwargs):
        kwargs |= zip(names, args, strict=False)
        keep, head = kwargs.get("logits_to_keep", 0), self.lm_head
        if (
            kwargs.get("labels") is not None
            and self.loss_function is ForCausalLMLoss
            and (isinstance(keep, int) and keep == 0)
            and _is_plain(head)
            and head.bias is None
        ):
            return with_loss(self, **kwargs)
        return original(self, **kwargs)

    return forward


def _is_plain(head: nn.Module) -> bool:
    """Return whether ``head`` is a linear layer alone, without hooks or patches of others."""
    forward = vars(head).get("forward")
    own = forward is None or hasattr(forward, "of_emu3_kernels")
    return own and type(head).forward is nn.Linear.forward and not _is_hooked(head)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a call of ``module`` runs hooks beside its forward pass."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, name) for name in hooks)


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
