"""The Emu3 decoder: one next-token transformer over text and visual tokens.

``B`` batch, ``T`` tokens, ``D`` hidden size, ``H`` query heads, ``K`` head dim, ``V`` vocabulary.
No biases; untied embeddings. Queries, keys and values share one projection, gate and up another;
the fused ops read the parts in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emu3.cache import KeyValueCache, Tree
from emu3.config import ModelSettings
from emu3_kernels import (
    Documents,
    HeadShard,
    add_rms_norm,
    attention,
    linear_cross_entropy,
    rms_norm,
    swiglu_packed,
)
from emu3_kernels.modules import QuantizedLinear, RotaryEmbedding
from emu3_kernels.runtime.gemm import linear


@dataclass(frozen=True)
class StepDropout:
    """What a training step drops, given instead of drawn: every mesh of ranks drops the same."""

    seeds: Tensor
    """``[3 num_layers + 1]`` int64, of the sites in order: before the norm of an attention (first
    the embedding), its probabilities, before the norm of an MLP; last before the final norm."""
    rows: Tensor | None = None
    """``[B, T]`` int64, the rows of the residual stream among those of all ranks; None is all."""
    heads: HeadShard | None = None


@dataclass(frozen=True)
class Context:
    """Shared by every layer of one call: the rotation, and the documents or the cache's slots."""

    rotate: RotaryEmbedding
    documents: Documents | Tensor | None = None
    cache: KeyValueCache | None = None
    slots: Tensor | None = None
    lengths: Tensor | None = None
    positions: Tensor | None = None
    mask: Tensor | None = None
    rows: Tensor | None = None
    heads: HeadShard | None = None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    attend = staticmethod(attention)
    """Context parallelism sets another."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.settings, self.layer = settings, layer
        all_heads = settings.num_heads + 2 * settings.num_kv_heads
        self.qkv = nn.Linear(settings.hidden_size, all_heads * settings.head_dim, bias=False)
        self.out = nn.Linear(
            settings.num_heads * settings.head_dim, settings.hidden_size, bias=False
        )

    def forward(self, x: Tensor, context: Context, seed: Tensor | None = None) -> Tensor:
        s = self.settings
        heads = self.qkv(x).unflatten(-1, (-1, s.head_dim))
        q, k, v = heads.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=2)
        if context.cache is None:
            q, k = context.rotate(q, k, context.positions)
            p = s.dropout if self.training else 0.0
            dropout = {"dropout_p": p, "seed": seed, "dropout_heads": context.heads}
            attended = self.attend(q, k, v, document_ids=context.documents, **dropout)
        else:
            cache = context.cache
            caches = cache.keys[self.layer], cache.values[self.layer]
            where = context.slots, context.positions
            q = context.rotate.append(q, k, v, *caches, *where, check_indices=False)
            attended = cache.attend(self.layer, q, context.lengths, context.mask)
        return self.out(attended.flatten(2))


class MLP(nn.Module):
    """``down(silu(gate) * up)``."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.gate_up = nn.Linear(settings.hidden_size, 2 * settings.intermediate_size, bias=False)
        self.down = nn.Linear(settings.intermediate_size, settings.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu_packed(self.gate_up(x)))


class Block(nn.Module):
    """Attention and MLP; every residual sum is fused with its dropout and the next norm."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.eps, self.dropout_p = settings.norm_eps, settings.dropout
        self.attention_norm = nn.Parameter(torch.ones(settings.hidden_size))
        self.attention = Attention(settings, layer)
        self.mlp_norm = nn.Parameter(torch.ones(settings.hidden_size))
        self.mlp = MLP(settings)

    def forward(
        self,
        branch: Tensor | None,
        residual: Tensor,
        context: Context,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the MLP's output, before dropout and the residual sum, and the residual.

        ``seeds [3]`` are those of its sites of dropout; None draws them.
        """
        p = self.dropout_p if self.training else 0.0
        seed, seed_attention, seed_mlp = (None, None, None) if seeds is None else seeds.unbind()
        rows = context.rows
        if branch is None:
            x = rms_norm(residual, self.attention_norm, self.eps)
        else:
            dropout = {"dropout_p": p, "seed": seed, "dropout_rows": rows}
            x, residual = add_rms_norm(branch, residual, self.attention_norm, self.eps, **dropout)
        branch = self.attention(x, context, seed_attention)
        dropout = {"dropout_p": p, "seed": seed_mlp, "dropout_rows": rows}
        x, residual = add_rms_norm(branch, residual, self.mlp_norm, self.eps, **dropout)
        return self.mlp(x), residual


class Emu3(nn.Module):
    """Decoder and head; ``forward`` returns hidden states, ``loss`` never allocates ``[T, V]``."""

    linear = staticmethod(linear)
    linear_cross_entropy = staticmethod(linear_cross_entropy)
    """Of :meth:`objective`; tensor parallelism sets another."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        vocabulary = settings.vocabulary
        self.embedding = nn.Embedding(
            vocabulary.size, settings.hidden_size, padding_idx=vocabulary.pad
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings, layer) for layer in range(settings.num_layers))
        self.norm = nn.Parameter(torch.ones(settings.hidden_size))
        self.head = nn.Linear(settings.hidden_size, vocabulary.size, bias=False)
        self.rotate = RotaryEmbedding(
            settings.max_position_embeddings, settings.head_dim, theta=settings.rope_theta
        )
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.settings.init_std)
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight[module.padding_idx])

    def forward(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        *,
        prompt_lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        tree: Tree | None = None,
    ) -> Tensor:
        """Hidden states ``[B, T, D]`` of ``tokens [B, T]``, after the final norm.

        Args:
            tokens: ids.
            cache: keys and values of earlier tokens; the new ones are appended. No gradient.
            prompt_lengths: ``[B]``, tokens of each row before its padding on the right; only with
                a cache.
            document_ids: ``[B, T]`` int32, non-decreasing: the documents of packed rows; a token
                attends to its own document alone. Only without a cache.
            tree: how at most 64 drafts are related; only with a cache, behind whose lengths their
                keys and values are stored until :meth:`KeyValueCache.keep` appends some.
        """
        documents = None if document_ids is None else Documents(document_ids)
        context = Context(self.rotate, documents)
        if cache is not None:
            mask = None if tree is None else tree.mask
            context = Context(self.rotate, None, cache, *cache.place(tokens.shape[1], tree), mask)
        hidden = self._hidden(tokens, context)
        if cache is not None and tree is None:
            cache.advance(tokens.shape[1], prompt_lengths)
        return hidden

    def _hidden(self, tokens: Tensor, context: Context, seeds: Tensor | None = None) -> Tensor:
        branch, residual = None, self.embedding(tokens)
        if seeds is None:
            residual = self.dropout(residual)
        else:  # the first norm drops a branch, with a seed and rows that are given
            branch, residual = residual, residual.new_zeros(residual.shape[-1]).expand_as(residual)
        for number, block in enumerate(self.blocks):
            of_block = None if seeds is None else seeds[3 * number : 3 * number + 3]
            branch, residual = block(branch, residual, context, of_block)
        p = self.settings.dropout if self.training else 0.0
        seed = None if seeds is None else seeds[-1]
        dropout = {"dropout_p": p, "seed": seed, "dropout_rows": context.rows}
        hidden, _ = add_rms_norm(branch, residual, self.norm, self.settings.norm_eps, **dropout)
        return hidden

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        """Logits ``[..., R]`` of ``hidden [..., D]`` for the ``rows`` of the head alone."""
        if isinstance(self.head, QuantizedLinear):
            return self.head(hidden, rows)
        return self.linear(hidden, self.head.weight[rows])

    def loss(
        self,
        tokens: Tensor,
        weights: Tensor,
        document_ids: Tensor | None = None,
        *,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Mean next-token loss, each target weighted by its entry of ``weights [B, T]`` float32.

        ``keep`` is that of :func:`emu3_kernels.linear_cross_entropy` for the ``B (T-1)`` targets:
        with it, a call on a GPU can be captured in a CUDA graph.
        """
        documents = None if document_ids is None else document_ids[:, :-1]
        hidden = self(tokens[:, :-1], document_ids=documents)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head.weight,
            tokens[:, 1:].flatten(),
            weights=weights[:, 1:].flatten(),
            keep=keep,
        )

    def objective(
        self,
        tokens: Tensor,
        targets: Tensor,
        weights: Tensor,
        positions: Tensor | None = None,
        documents: Documents | Tensor | None = None,
        normalizer: Tensor | float | None = None,
        *,
        z_loss: float = 0.0,
        dropout: StepDropout | None = None,
        reduction: str = "mean",
        return_losses: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Sum the loss of given targets over packed rows, or the part of them that a rank holds.

        Args:
            tokens: ``[B, T]`` ids.
            targets: ``[B, T]`` ids of the next tokens.
            weights: ``[B, T]`` float32; 0 for the last token of a document.
            positions: ``[B, T]`` int64, of each token in its document; None counts along the row.
            documents: of the tokens, as :attr:`Attention.attend` takes them; None is one document.
            normalizer: what the sum is divided by: of a step, the weight of all ranks together.
                None is the sum of ``weights``.
            z_loss: factor of the squared log-sum-exp.
            dropout: what is dropped in training; None draws it.
            reduction: ``"none"`` returns the weighted loss of each target instead, ``[B, T]``,
                divided by a given normalizer alone.
            return_losses: also return the loss of each target before its weight, ``[B, T]``: 0 at
                weight 0, without a gradient.
        """
        rows, heads = (dropout.rows, dropout.heads) if dropout else (None, None)
        context = Context(self.rotate, documents, positions=positions, rows=rows, heads=heads)
        hidden = self._hidden(tokens, context, dropout.seeds if dropout else None)
        settings = {"weights": weights, "normalizer": normalizer, "z_loss": z_loss}
        if reduction != "mean":
            settings["reduction"] = reduction
        if return_losses:
            settings["return_losses"] = True
        return self.linear_cross_entropy(hidden, self.head.weight, targets, **settings)
