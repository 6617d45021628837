"""A thin Emu3: composes the ops of ``emu3_kernels`` and owns no kernel."""
