"""Published models at a hundredth of their width, with every part and Emu3's vocabulary."""

from emu3.config import VisionSettings

SMALL = VisionSettings(base_channels=32)
SMALL_8B = ["hidden_size=32", "num_layers=2", "num_heads=4", "num_kv_heads=2", "head_dim=8"]
SMALL_8B += ["intermediate_size=48", "max_position_embeddings=8192", "dropout=0.0", "init_std=0.1"]
"""Overrides of the preset 8b."""
