"""The time of a training step, PREDICTED from its FLOPs and bytes and the rates of a card.

Rates of GEMMs, of the loss and of attention are MEASURED on one H200
(``benchmarks/results/h200.md``, commit f343b92); other cards are assumed to reach the same shares
of their peaks. Of networks nothing was measured: 0.8 of what their makers state is assumed.
"""

from dataclasses import dataclass
from functools import cached_property

from emu3.train.cards import Card
from emu3.train.flops import num_gemm_weights, step_flops
from emu3.train.memory import Memory

GPUS_OF_NODE = 8

GEMM, LOSS, FORWARD, BACKWARD = 811 / 989, 431 / 989, 370 / 989, 202 / 989
"""Share of the peak that GEMMs reach, the three of the loss, and attention to documents."""
COPY = 4251 / 4800
"""Share of the bandwidth that a copy reaches, and norms, SwiGLU and rotation are assumed to."""
LINK, NETWORK = 0.8, 50e9
"""Share of the stated rate that collectives are assumed to reach; bytes/s of a GPU's network."""


@dataclass(frozen=True)
class Step:
    """A step of ``batch_size`` rows on all ranks of a mesh."""

    memory: Memory
    batch_size: int
    pairs: float
    """Of a token and one that it attends to, in a row."""
    card: Card

    @property
    def num_ranks(self) -> int:
        return self.memory.parallel.num_ranks

    @property
    def num_micro_batches(self) -> int:
        p = self.memory.parallel
        return self.batch_size // (p.replicate * p.shard * self.memory.rows)

    @property
    def model_flops(self) -> float:
        """FLOPs of forward and backward of all ranks, without what is computed again."""
        tokens = self.batch_size * self.memory.tokens
        return step_flops(self.memory.settings, tokens, self.batch_size * self.pairs)

    @property
    def peak(self) -> float:
        """FLOP/s of a rank; of float32 those of TF32, half as many."""
        return self.card.flops * 2 / self.memory.element

    @property
    def seconds(self) -> float:
        """Weights travel while others are computed with; exchanges of tokens are waited for."""
        weights, tokens = (
            sum(self._seconds(*of) for of in sent.values())
            for sent in (self.weight_bytes, self.token_bytes)
        )
        return max(self.compute, weights) + tokens

    @property
    def mfu(self) -> float:
        """Share of the peak of all ranks, of :attr:`model_flops`."""
        return self.model_flops / (self.num_ranks * self.peak * self.seconds)

    @cached_property
    def compute(self) -> float:
        """Seconds of a rank without messages."""
        s, p = self.memory.settings, self.memory.parallel
        tokens = self.batch_size * self.memory.tokens / self.num_ranks
        again = p.recompute != "none"
        head = s.vocabulary.size * s.hidden_size
        products = (8 if again else 6) * (num_gemm_weights(s) - head) * tokens
        width = s.num_layers * s.num_heads * s.head_dim
        scores = 4 * width * self.pairs * self.batch_size / self.num_ranks
        attention = (2 if again else 1) * scores / FORWARD + 2.5 * scores / BACKWARD
        flops = products / GEMM + 6 * head * tokens / LOSS + attention
        # Of norms 18 D, of SwiGLU 8 F, of the rotation 4 (H + G) K; of AdamW 28 bytes a weight, and
        # 12 of clipping.
        numbers = 18 * s.hidden_size + 8 * s.intermediate_size
        numbers += 4 * (s.num_heads + s.num_kv_heads) * s.head_dim
        moved = self.memory.element * numbers * s.num_layers * tokens + 40 * self.memory.sizes.own
        return flops / self.peak + moved / (COPY * self.card.bandwidth)

    @cached_property
    def weight_bytes(self) -> dict[str, tuple[float, int, int]]:
        """Bytes that a rank receives in a step; size of the group and stride of its ranks."""
        p, size, e = self.memory.parallel, self.memory.sizes, self.memory.element
        sharded = p.shard * p.context
        times = self.num_micro_batches * (1 - 1 / sharded)
        blocks = size.num_blocks * size.gathered["block"]
        all_but_root = blocks + size.gathered["embedding"]
        root = size.gathered["root"]
        copies = 8 * size.own * (1 - 1 / p.replicate)
        return {
            "all-gather of weights": (e * (2 * all_but_root + root) * times, sharded, p.tensor),
            "reduce-scatter of gradients": (4 * (all_but_root + root) * times, sharded, p.tensor),
            "all-reduce of gradients": (copies, p.replicate, p.tensor * sharded),
        }

    @cached_property
    def token_bytes(self) -> dict[str, tuple[float, int, int]]:
        """The same of exchanges between ranks that share rows."""
        s, p, e = self.memory.settings, self.memory.parallel, self.memory.element
        n = self.memory.rank_tokens * self.num_micro_batches
        passes = 2 if p.recompute == "none" else 3
        keys = s.num_kv_heads * s.head_dim / p.tensor
        if p.context_style == "ulysses":
            heads = 2 * (s.num_heads + s.num_kv_heads) * s.head_dim / p.tensor
            context = passes * e * heads * s.num_layers * n * (1 - 1 / p.context)
        else:  # backward sends float32 gradients of keys and values too
            context = (passes * e + 4) * 2 * keys * s.num_layers * n * (p.context - 1)
        # Two gathers and two scatters of a block; of the loss hidden states and float32 gradients.
        of_token = (4 * passes * s.num_layers + 1) * e + 8
        tensor = of_token * s.hidden_size * n * (1 - 1 / p.tensor)
        return {
            "exchange of context": (context, p.context, p.tensor),
            "exchange of tensor": (tensor, p.tensor, 1),
        }

    def _seconds(self, num_bytes: float, size: int, stride: int) -> float:
        """Seconds of a group whose ranks are ``stride`` apart; every GPU has its own network."""
        rate = self.card.link
        if size * stride > GPUS_OF_NODE:
            rate = min(rate, NETWORK * max(1, GPUS_OF_NODE // stride))
        return num_bytes / (LINK * rate)
