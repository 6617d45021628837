"""The two stages that train on digits: the miniature's vision tokenizer and its decoder."""

from itertools import combinations

import torch
from torch import Tensor

from emu3.config import ModelSettings
from emu3.demo.config import ClipRecipe, DigitRecipe
from emu3.demo.digits import COLORS, DIGITS, caption
from emu3.demo.moving import DIRECTIONS, WHICH_COLOR, WHICH_DIGIT, WHICH_DIRECTION
from emu3.demo.moving_stream import ASKED, MovingDocumentStream, MovingStream, question_example
from emu3.demo.stream import DocumentStream, ImageStream, training_digits
from emu3.model import Emu3
from emu3.prompt import Clip, generation_document
from emu3.text import ByteTokenizer
from emu3.train import objective
from emu3.train.stage import SingleLossStage, Stage
from emu3.train.start import begin
from emu3.vision import VisionTokenizer
from emu3.weights import load_vision, save_decoder, save_vision


def vision_stage(recipe: DigitRecipe) -> Stage:
    """The vision tokenizer, on images of digits, and on clips of them if the recipe has some."""
    digits = training_digits(recipe.data)
    size = recipe.vision.image_size
    stream = (
        MovingStream(digits, recipe)
        if isinstance(recipe, ClipRecipe)
        else ImageStream(digits, recipe.data, size, recipe.train.seed)
    )
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
    moving = isinstance(recipe, ClipRecipe)
    grid = tokenizer.settings.grid
    _check_positions(recipe.model, _longest_image_document(grid, text), "a caption", grid)
    if moving:
        _check_clips(recipe, tokenizer, text)
    documents = MovingDocumentStream if moving else DocumentStream
    stream = documents(training_digits(recipe.data), recipe, tokenizer, text)
    model = Emu3(recipe.model)
    seed_visual_rows(model, tokenizer.codebook)
    return SingleLossStage(recipe, model, stream, objective.next_token, save_decoder)


def _longest_image_document(grid: tuple[int, int], text: ByteTokenizer) -> int:
    captions = (
        caption(digit, color) for digit in range(len(DIGITS)) for color in range(len(COLORS))
    )
    codes = torch.zeros(grid, dtype=torch.int64)
    return max(len(generation_document(words, codes, text)) for words in captions)


def _check_clips(recipe: ClipRecipe, tokenizer: VisionTokenizer, text: ByteTokenizer) -> None:
    settings = tokenizer.settings
    if settings.temporal_factor != recipe.vision.temporal_factor:
        raise ValueError(
            f"train: {recipe.data.tokenizer} has a temporal_factor of {settings.temporal_factor}, "
            f"the recipe {recipe.vision.temporal_factor}"
        )
    shape = recipe.clips.frames // settings.temporal_factor, *settings.grid
    clip = Clip(torch.zeros(shape, dtype=torch.int64), recipe.clips.rate, settings.temporal_factor)
    answered = (
        (WHICH_DIRECTION, max(DIRECTIONS, key=len)),
        (WHICH_COLOR, max(COLORS, key=len)),
        (WHICH_DIGIT, max(DIGITS, key=len)),
    )
    longest = max(
        len(question_example(clip, *zip(*some, strict=True), text).ids)
        for some in combinations(answered, ASKED)
    )
    _check_positions(recipe.model, longest, "a question", shape)


def _check_positions(
    model: ModelSettings, longest: int, words: str, shape: tuple[int, ...]
) -> None:
    """Check that the longest document fits; its last token is never an input."""
    if longest - 1 > model.max_position_embeddings:
        raise ValueError(
            f"train: model.max_position_embeddings ({model.max_position_embeddings}) must be "
            f"{longest - 1} at least, for {words} and {' x '.join(map(str, shape))} codes"
        )


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
