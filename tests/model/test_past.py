"""A conversation that goes on is fed from where it differs, and answered alike."""

from contextlib import contextmanager

import pytest
import torch

from emu3.generate import Past, generate_text
from emu3.templates import Turn, chat_prompt
from emu3.text import ByteTokenizer
from tests.model.tiny import TINY, tiny_model

TEXT = ByteTokenizer(TINY.vocabulary)
IMAGE = torch.arange(16).view(4, 4)


@contextmanager
def fed(model):
    """The tokens of each forward."""
    counts = []
    handle = model.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    yield counts
    handle.remove()


def ask(model, turns, past=None, **options):
    prompt = chat_prompt(turns, TEXT, system="")
    (answer,) = generate_text(model, TEXT, [prompt], 5, past=past, **options)
    return prompt, answer


@pytest.mark.parametrize("more", ["", "b" * 65], ids=["decoded", "a chunk of a prompt"])
def test_the_next_question_feeds_what_is_new(more):
    model, past, turns = tiny_model(max_position_embeddings=256), Past(), []
    prompt, sequence = [], []
    for words in ("a", "b" + more, "c"):
        said = [*([] if turns else [IMAGE]), words]
        before = len(prompt)
        with fed(model) as counts:
            prompt, answer = ask(model, [*turns, Turn(said)], past)
        assert answer == ask(model, [*turns, Turn(said)])[1]
        same = next(n for n, ids in enumerate(prompt) if [ids] != sequence[n : n + 1])
        assert same >= before
        assert counts[0] == len(prompt) - same
        sequence = [*prompt, *TEXT.encode(answer)[:-1]]
        turns.append(Turn(said, answer))


def test_another_conversation_or_the_same_prompt_is_answered_as_without_a_past():
    model, past = tiny_model(), Past()
    for words in ("abcdef", "abcdef", "abxy", "ab", "q"):
        assert ask(model, [Turn([words])], past) == ask(model, [Turn([words])])


def test_an_answer_that_was_stopped_is_a_past_as_far_as_told():
    model, past, told = tiny_model(), Past(), []

    def stop(_, piece):
        told.append(piece)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(model, [Turn([IMAGE, "a"])], past, on_text=stop)
    turns = [Turn([IMAGE, "a"], "".join(told)), Turn(["b"])]
    assert ask(model, turns, past) == ask(model, turns)


def test_a_prompt_that_was_stopped_is_no_past():
    model, past, turns = tiny_model(), Past(), [Turn([IMAGE, "a"])]

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        ask(model, turns, past)
    handle.remove()
    assert ask(model, turns, past) == ask(model, turns)


def test_a_past_goes_with_one_prompt():
    prompts = [chat_prompt([Turn([words])], TEXT) for words in "ab"]
    with pytest.raises(ValueError, match="generate: a past must go with one prompt, got 2"):
        generate_text(tiny_model(), TEXT, prompts, past=Past())
