"""A CLIP of open_clip's layout in plain PyTorch, and the files of a tiny one of transformers."""

import json

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, LAYERS, PATCH, SIDE, LENGTH, EMBEDDING = 32, 2, 2, 8, 16, 16, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
CONFIG = {
    "projection_dim": EMBEDDING,
    "vision_config": {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "patch_size": PATCH,
        "image_size": SIDE,
        "hidden_act": "gelu",
        "projection_dim": EMBEDDING,
    },
    "text_config": {
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "hidden_act": "gelu",
        "projection_dim": EMBEDDING,
        "bos_token_id": len(WORDS) - 2,
        "eos_token_id": len(WORDS) - 1,
    },
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Transformer()
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBEDDING))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.transformer = Visual(), Transformer()
        self.token_embedding = nn.Embedding(len(WORDS), WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBEDDING))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        end = (tokens == len(WORDS) - 1).int().argmax(1)
        return x[torch.arange(len(x)), end] @ self.text_projection


def write_tokenizer(folder):
    """Of letters; words are not merged."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: number for number, word in enumerate(WORDS)}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


def write_clip(folder, seed=0):
    """A random CLIP in a folder of transformers; return the model."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(**CONFIG)).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def ids_of(words):
    """The ids of words as CLIP's tokenizer makes them."""
    spelled = []
    for word in words.split():
        spelled += [*word[:-1], f"{word[-1]}</w>"]
    return torch.tensor(
        [[WORDS.index(piece) for piece in ["<|startoftext|>", *spelled, "<|endoftext|>"]]]
    )
