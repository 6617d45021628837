"""The two stages that train on digits: the miniature's vision tokenizer and its decoder."""

import torch
from torch import Tensor

from emu3.demo.config import DigitRecipe
from emu3.demo.stream import DocumentStream, ImageStream, training_digits
from emu3.model import Emu3
from emu3.text import ByteTokenizer
from emu3.train import objective
from emu3.train.stage import SingleLossStage, Stage
from emu3.train.start import begin
from emu3.weights import load_vision, save_decoder, save_vision


def vision_stage(recipe: DigitRecipe) -> Stage:
    """The vision tokenizer, on images of digits."""
    digits = training_digits(recipe.data)
    size = recipe.vision.image_size
    stream = ImageStream(digits, recipe.data, size, recipe.train.seed)
    tokenizer = begin(recipe)
    return SingleLossStage(recipe, tokenizer, stream, objective.reconstruction, save_vision)


def decoder_stage(recipe: DigitRecipe) -> Stage:
    """The decoder, on images of digits and their captions, in both directions."""
    if recipe.data.tokenizer is None:
        raise ValueError("train: data.tokenizer must name a trained vision tokenizer")
    tokenizer = load_vision(recipe.data.tokenizer)
    if tokenizer.settings.num_codes != recipe.model.vocabulary.num_visual:
        raise ValueError(
            f"train: {recipe.data.tokenizer} has {tokenizer.settings.num_codes} codes, the "
            f"model's vocabulary {recipe.model.vocabulary.num_visual}"
        )
    text = ByteTokenizer(recipe.model.vocabulary)
    stream = DocumentStream(training_digits(recipe.data), recipe, tokenizer, text)
    model = Emu3(recipe.model)
    seed_visual_rows(model, tokenizer.codebook)
    return SingleLossStage(recipe, model, stream, objective.next_token, save_decoder)


@torch.no_grad()
def seed_visual_rows(model: Emu3, codebook: Tensor) -> None:
    """Set the visual embeddings to one random projection of their code vectors ``[N, D]``.

    Similar codes then have similar embeddings, and training one
    improves its neighbours; a miniature has too little data for every code alone. The rows have
    unit variance, so that the projection survives the first steps.
    """
    ids = model.settings.vocabulary
    centred = codebook - codebook.mean(0)
    projection = torch.randn(codebook.shape[1], model.settings.hidden_size)
    rows = (centred / centred.std(0)) @ projection / codebook.shape[1] ** 0.5
    model.embedding.weight[ids.visual_start : ids.size] = rows
