"""``emu3 prefer``: images of prompts, votes on them, and pairs of codes to train on."""
