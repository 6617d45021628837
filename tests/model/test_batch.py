"""Generations that decode together, against each alone in a loop without a cache."""

from math import prod

import pytest
import torch

from emu3.generate import Batch, Generation, Sampling, generate_images, generate_text
from emu3.prompt import forced_token, generation_prompt
from emu3.text import ByteTokenizer
from emu3_kernels import sample_guided
from tests.model.tiny import TINY, tiny_model
from tests.recorded_graph import recorded_graphs

TEXT = ByteTokenizer(TINY.vocabulary)
IDS = TINY.vocabulary
GRIDS = [(3, 4), (2, 7), (5, 1), (1, 2)]
CAPTIONS = ["a red seven", "an orange one", "", "x"]
GREEDY = Sampling(guidance=1, top_k=1)


@torch.no_grad()
def drawn_alone(model, caption, grid, how, seed, frames=1):
    """The definition: no cache, no batch, the whole head, the grammar of the documents."""
    rows = [generation_prompt(words, grid, TEXT) for words in (caption, how.negative)]
    settings = {"top_k": how.top_k, "top_p": how.top_p, "temperature": how.temperature}
    codes = []
    for offset in range(1, frames * (grid[0] * (grid[1] + 1) + 1)):
        token = forced_token(offset, grid, IDS, frames)
        if token is None:
            cond, uncond = (model.head(model(torch.tensor([ids])))[:, -1] for ids in rows)
            places = torch.tensor([len(codes)])
            pair = cond[:, IDS.visual_start :], uncond[:, IDS.visual_start :]
            key = torch.tensor([(seed + 2**63) % 2**64 - 2**63])
            code = sample_guided(*pair, key, places, guidance=how.guidance, **settings)
            codes.append(int(code))
            token = codes[-1] + IDS.visual_start
        for ids in rows:
            ids.append(token)
    return torch.tensor(codes)


@torch.no_grad()
def written_alone(model, prompt, length):
    ids = list(prompt)
    allowed = [*range(IDS.num_text), IDS.eos]
    while len(ids) < len(prompt) + length:
        logits = model.head(model(torch.tensor([ids])))[0, -1]
        ids.append(allowed[int(logits[allowed].argmax())])
        if ids[-1] == IDS.eos:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def image(caption, grid, how, seed, frames=1):
    words = [caption, *[how.negative] * (how.guidance != 1)]
    prompts = [generation_prompt(one, grid, TEXT) for one in words]
    return Generation(prompts, frames * prod(grid), grid, how, seed)


@pytest.mark.parametrize("how", [GREEDY, Sampling(), Sampling(2.0, 9, 0.9, 0.7, "no")])
def test_images_of_mixed_ratios_equal_those_drawn_alone_without_a_cache(how):
    model, seeds = tiny_model(), [5, 2**64 - 1, 7, 8]
    together = generate_images(model, TEXT, CAPTIONS, GRIDS, how, seeds)
    for words, grid, seed, codes in zip(CAPTIONS, GRIDS, seeds, together, strict=True):
        assert codes.shape == grid
        assert codes.flatten().equal(drawn_alone(model, words, grid, how, seed))


def test_a_grid_for_each_caption_is_asked_for():
    with pytest.raises(ValueError, match="generate: grids must be one or 2, got 1"):
        generate_images(tiny_model(), TEXT, ["a", "b"], [(2, 2)])


def crowd(model):
    """Images, clips and texts of settings of their own, and what each is alone."""
    made = [image(CAPTIONS[i], GRIDS[i], Sampling(top_k=5 + i % 2), i) for i in range(4)]
    made += [image("up", (2, 3), GREEDY, 0), image("down", (2, 2), Sampling(), 9, frames=3)]
    wanted = [drawn_alone(model, CAPTIONS[i], GRIDS[i], made[i].how, i) for i in range(4)]
    wanted += [drawn_alone(model, "up", (2, 3), GREEDY, 0)]
    wanted += [drawn_alone(model, "down", (2, 2), Sampling(), 9, frames=3)]
    for words, length in (("ab", 9), ("once upon", 5)):
        prompt = [IDS.bos, *TEXT.encode(words)]
        made.append(Generation([prompt], length, None, GREEDY))
        wanted.append(torch.tensor(written_alone(model, prompt, length)))
    return made, wanted


def results(made):
    return [torch.tensor(one.ids) if one.grid is None else one.codes for one in made]


@pytest.mark.parametrize("stagger", [0, 1, 2, 5])
def test_generations_that_come_and_go_equal_each_alone(stagger):
    """One joins every few steps, while others are within rows, at their ends, or gone."""
    model = tiny_model()
    made, wanted = crowd(model)
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(stagger)).tolist()
    batch = Batch(model, IDS, 14, 60)
    waiting, steps = [made[i] for i in order], 0
    while waiting or batch.generations:
        while waiting and (stagger == 0 or steps % stagger == 0 or not batch.generations):
            batch.join([waiting.pop(0)])
            if stagger:
                break
        if batch.generations:
            batch.step()
        steps += 1
    assert batch.free_rows == 14
    for one, got, expected in zip(made, results(made), wanted, strict=True):
        assert got.equal(expected), one


def test_one_that_leaves_early_changes_no_other():
    model = tiny_model()
    made, wanted = crowd(model)
    batch = Batch(model, IDS, 14, 60)
    batch.join(made)
    for cancelled in (0, 5, 6):
        batch.step()
        batch.leave(made[cancelled])
    while batch.generations:
        batch.step()
    for index in (1, 2, 3, 4, 7):
        assert results(made)[index].equal(wanted[index])


def test_replayed_steps_of_changing_batches_draw_the_same(monkeypatch):
    """A composition that comes again replays its graph, on other rows."""
    model = tiny_model()
    seen = []
    for graph in (False, True):
        batch = Batch(model, IDS, 8, 60, graph=graph)
        made = [image(CAPTIONS[i % 4], GRIDS[i % 3], Sampling(), i) for i in range(9)]
        waiting = list(made)
        with recorded_graphs(monkeypatch) as counts:
            while waiting or batch.generations:
                while waiting and batch.free_rows >= 2:
                    batch.join([waiting.pop()])
                batch.step()
        seen.append([one.codes for one in made])
    assert all(one.equal(other) for one, other in zip(*seen, strict=True))
    # Batches of 8, 6, 4 and 2 rows, with and without the end of a row.
    assert counts.captures <= 8
    assert counts.replays > 20


def test_a_row_fills_its_cache_to_the_last_slot():
    """No slot is needed beyond, where all rows end together."""
    model, one = tiny_model(), image("seven", (3, 4), GREEDY, 0)
    batch = Batch(model, IDS, 1, one.capacity)
    batch.run([one])
    assert one.codes.equal(drawn_alone(model, "seven", (3, 4), GREEDY, 0))
    with pytest.raises(ValueError, match=f"{one.capacity} positions exceed its capacity"):
        Batch(model, IDS, 1, one.capacity - 1).run([image("seven", (3, 4), GREEDY, 0)])


def test_logits_that_are_not_finite_end_their_generation_alone():
    """An infinite row of the head for one code, which one prompt alone makes NaN of."""
    model = tiny_model()
    with torch.no_grad():
        model.embedding.weight[ord("q")] = torch.nan
    good, bad = image("seven", (3, 4), GREEDY, 0), image("q", (3, 4), GREEDY, 0)
    batch, ended = Batch(model, IDS, 2, 60), []
    batch.join([bad, good])
    while batch.generations:
        ended += batch.step()
    assert ended[0] is bad
    assert str(bad.error).startswith("generate: logits must be finite")
    assert bad.place == 4  # the end of its first row of codes
    assert good.error is None
    assert good.codes.equal(drawn_alone(model, "seven", (3, 4), GREEDY, 0))


def test_texts_are_sampled_by_their_seeds():
    model, how = tiny_model(), Sampling(guidance=1, top_k=None, temperature=2.0)
    prompt = [[IDS.bos, *TEXT.encode("once")]]
    first, again, other = (
        generate_text(model, TEXT, prompt, 12, how=how, seeds=seed)[0] for seed in (1, 1, 2)
    )
    assert first == again != other
    both = generate_text(model, TEXT, prompt * 2, 12, how=how, seeds=[2, 1])
    assert both == [other, first]


def test_equal_prompts_are_fed_once(monkeypatch):
    """The negative ones of a grid, and those of several images of one caption."""
    model, seen = tiny_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda x, *a, **k: (seen.append(len(x)), forward(x, *a, **k))[1]
    )
    captions, grids = ["b", "a", "a", "b", "a"], [(2, 3), (2, 3), (3, 2), (2, 3), (2, 3)]
    together = generate_images(model, TEXT, captions, grids, Sampling(), seeds=0)
    assert seen[0] == 5  # "b", the negative of its grid, "a", and both of the other grid
    assert set(seen[1:]) == {10}
    for seed, (words, grid, codes) in enumerate(zip(captions, grids, together, strict=True)):
        assert codes.flatten().equal(drawn_alone(model, words, grid, Sampling(), seed))


def test_a_batch_of_many_ratios_takes_as_many_forwards_as_its_longest(monkeypatch):
    model, seen = tiny_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda x, *a, **k: (seen.append(x.shape[1]), forward(x, *a, **k))[1]
    )
    generate_images(model, TEXT, CAPTIONS, GRIDS, GREEDY)
    assert len(seen) == max(map(prod, GRIDS))
    assert set(seen[1:]) == {1, 2}
