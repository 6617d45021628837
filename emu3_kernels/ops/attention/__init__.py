"""What the attention ops share: what a query sees, what is dropped, and the kernels of a backend.

B batch, T queries, S keys, H query heads, G key heads, K head width. A backend's kernels are two
functions: ``forward(q, k, v, spans, scale, dropout, wide)`` gives out ``[B, T, H, K]`` and the lse
``[B, H, T]`` float32 of each query's scores; ``backward(dout, q, k, v, lse, delta, spans, scale,
dropout, wide)`` gives dq, dk and dv, where ``delta = sum(dout * out) - dlse`` ``[B, H, T]``
float32 and lse and delta may be those of more keys than are here. Results are in the dtype of q,
or unrounded float32 where ``wide``.
"""
