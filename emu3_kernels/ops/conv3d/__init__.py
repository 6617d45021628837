"""What causal_conv3d and temporal_residual share: the plan of a convolution, its definition, and
the two functions of a backend.

B batch, C channels in, O channels out, T frames, H rows, W columns. ``forward(x, weight, bias,
scale, shift, residual, plan)`` gives y ``[B, O, T', H', W']`` in the dtype of x; ``backward(dy, x,
weight, bias, scale, shift, plan, wanted)`` gives dx, dweight, dbias, dscale and dshift, each in the
dtype of its tensor, None for one that is None or not wanted; the residual's gradient is dy. All
tensors come contiguous, and what may be None is bias, scale with shift, and residual.
temporal_residual calls the same two ``convolve`` and ``convolve_backward``; its own ``forward`` is
the whole block.
"""
