"""Floating-point operations of a training step."""

from emu3.config import ModelSettings


def step_flops(settings: ModelSettings, tokens: float, pairs: float) -> float:
    """Return the FLOPs of forward and backward: ``6 P tokens + 12 L H K pairs``.

    P counts the weights of GEMMs: all but embedding and norms. What is computed again in backward
    does not count.

    Args:
        tokens: of the step.
        pairs: of a token and one that it attends to, in all.
    """
    return 6 * num_gemm_weights(settings) * tokens + (
        12 * settings.num_layers * settings.num_heads * settings.head_dim * pairs
    )


def num_gemm_weights(s: ModelSettings) -> int:
    attention = 2 * (s.num_heads + s.num_kv_heads) * s.head_dim
    block = s.hidden_size * (attention + 3 * s.intermediate_size)
    return s.num_layers * block + s.vocabulary.size * s.hidden_size
