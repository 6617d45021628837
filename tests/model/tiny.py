"""The smallest models that still have every part: grouped heads, two layers, all specials."""

import torch

from emu3.config import BYTE_VOCABULARY, ModelSettings, VisionSettings
from emu3.model import Emu3

TINY = ModelSettings(
    vocabulary=BYTE_VOCABULARY,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=80,
    max_position_embeddings=128,
    dropout=0.0,
    init_std=0.3,
)
TINY_VISION = VisionSettings(
    image_size=16,
    base_channels=16,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_stages=(1,),
    groups=8,
    num_codes=512,
    code_width=4,
    ema_decay=0.97,
)


def tiny_model(seed: int = 0, **changes) -> Emu3:
    torch.manual_seed(seed)
    return Emu3(TINY.model_copy(update=changes)).eval()
