"""What the group norms share: checks, the memory layout of their kernels, the plain definition.

B images (or videos), C channels, G groups of neighbouring channels, S positions: pixels, of all
frames. A kernel sees channels-last memory: ``[B, S, C]``, or ``[B, T, H, W, C]`` where it has to
know where a pixel lies.
"""
