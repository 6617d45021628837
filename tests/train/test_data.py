"""Digits, captions, batches and the stream that brings them."""

import pytest
import torch

from emu3.config import BYTE_VOCABULARY
from emu3.data.documents import Example, collate
from emu3.demo.config import DigitSettings
from emu3.demo.digits import (
    BACKGROUND,
    COLORS,
    PALETTE,
    at_rest,
    caption,
    load_split,
    read_caption,
    render,
)
from emu3.demo.stream import DocumentStream, ImageStream, training_digits
from emu3.prompt import image_ids, parse_document
from emu3.text import ByteTokenizer
from emu3.weights import load_vision
from tests.train.recipes import tiny_recipe


def test_validation_digits_are_no_training_digits_and_together_they_are_all():
    train_set, validation_set = load_split(0.25)
    both = torch.cat((train_set.scans, validation_set.scans)).flatten(1)
    assert len(both) == 1797
    assert (
        not (train_set.scans.flatten(1)[:, None] == validation_set.scans.flatten(1)).all(-1).any()
    )
    share = validation_set.labels.bincount() / both.new_tensor(
        [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    )
    assert (share - 0.25).abs().max() < 0.003


def test_every_stage_learns_from_the_same_part():
    train_set, _ = load_split(0.25)
    assert training_digits(DigitSettings(validation=0.25)).scans.equal(train_set.scans)


def test_captions_read_back():
    for digit in range(10):
        for color in range(len(COLORS)):
            assert read_caption(caption(digit, color)) == (digit, color)
    assert caption(1, COLORS.index("orange")) == "an orange one"
    assert read_caption("a pink seven") == (7, None)
    assert read_caption("") == (None, None)


def test_paint_and_background_have_the_colours_of_the_palette():
    full, empty = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    for color, paint in enumerate(PALETTE.values()):
        middle = render(full, [color], at_rest(1), 32)[0, :, 16, 16]
        torch.testing.assert_close((middle + 1) * 127.5, torch.tensor(paint, dtype=torch.float32))
    ground = torch.tensor(BACKGROUND, dtype=torch.float32).view(1, 3, 1, 1)
    torch.testing.assert_close(
        (render(empty, [0], at_rest(1), 32) + 1) * 127.5, ground.expand(1, 3, 32, 32)
    )


def test_a_batch_weighs_text_one_vision_half_and_padding_nothing():
    ids = BYTE_VOCABULARY
    visual = ids.visual_start
    tokens, weights = collate(
        [Example([ids.bos, 65, visual, ids.eol, ids.eos]), Example([ids.bos, visual, 66], start=2)],
        ids,
        0.5,
    )
    assert tokens[1].tolist() == [ids.bos, visual, 66, ids.pad, ids.pad]
    assert weights.tolist() == [[0, 1, 0.5, 1, 1], [0, 0, 1, 0, 0]]


def test_skipped_parts_of_a_document_are_not_learned():
    ids = BYTE_VOCABULARY
    document = [ids.bos, 65, 66, 67, 68, ids.eos]
    _, weights = collate([Example(document, 2, [range(3, 5)]), Example(document)], ids, 0.5)
    assert weights.tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1]]


def test_documents_come_in_both_directions_and_are_learned_from_what_comes_second(tmp_path):
    recipe = tiny_recipe("decoder", tmp_path)
    recipe = recipe.model_copy(update={"data": DigitSettings(batch_size=64, null_caption=0.2)})
    tokenizer = load_vision(tmp_path / "tokenizer.safetensors")
    ids, text = recipe.model.vocabulary, ByteTokenizer(recipe.model.vocabulary)
    digits = training_digits(recipe.data)
    tokens, weights = DocumentStream(digits, recipe, tokenizer, text).next_batch()
    images, labels, colors = DocumentStream(digits, recipe, tokenizer, text).sample()
    names = [caption(int(d), int(c)) for d, c in zip(labels, colors, strict=True)]
    kinds = set()
    for row, weight, codes, name in zip(
        tokens, weights, tokenizer.encode(images), names, strict=True
    ):
        parts, train_set = parse_document(row.tolist(), text), row[weight > 0].tolist()
        kinds.add(tuple("image" if isinstance(part, torch.Tensor) else "text" for part in parts))
        assert all(part == name if isinstance(part, str) else part.equal(codes) for part in parts)
        if parts[-1] == name:
            assert train_set == [*text.encode(name), ids.eos]
        else:
            assert train_set == [*image_ids(codes, text)[5:], ids.eos]  # all but boi "4*4" img
    assert kinds == {("text", "image"), ("image", "text"), ("image",)}


@pytest.mark.parametrize("batches", [0, 1, 300])
def test_a_restored_stream_goes_on_where_it_stood(batches):
    """300 batches of 6 pass the end of an epoch of 1,347 digits."""
    settings = DigitSettings(batch_size=6)
    digits = training_digits(settings)
    stream = ImageStream(digits, settings, 8, seed=4)
    for _ in range(batches):
        stream.sample()
    other = ImageStream(digits, settings, 8, seed=5)
    other.restore(stream.state())
    for one, two in zip(stream.sample(), other.sample(), strict=True):
        assert one.equal(two)


def test_an_epoch_shows_every_digit_once():
    settings = DigitSettings(batch_size=449)  # 3 batches are the 1,347 digits
    digits = training_digits(settings)
    stream = ImageStream(digits, settings, 8, seed=0)
    labels = torch.cat([stream.sample()[1] for _ in range(3)])
    assert labels.bincount().equal(digits.labels.bincount())
