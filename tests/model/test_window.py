"""Windows of path decoding without a model: the layout against the grammar, the walk by a table."""

from itertools import product

import pytest
import torch

from emu3.generate.window import Layout, Paths, Window
from emu3.prompt import forced_token
from tests.model.tiny import TINY

IDS = TINY.vocabulary
SHAPES = [(1, h, w) for h, w in product((1, 2, 4), (1, 2, 3, 5, 8))]
SHAPES += [(3, h, w) for h, w in product((1, 2), (1, 2, 4))]
SIZES = [(2, 1), (3, 1), (4, 2), (7, 4), (16, 4), (40, 8), (64, 1), (64, 8)]


def slots_of(shape):
    """Every slot of an image or clip: the code in it, or the id that the grammar forces."""
    frames, height, width = shape
    slots, code = [], 0
    for offset in range(1, frames * (height * (width + 1) + 1) + 1):
        forced = forced_token(offset, (height, width), IDS, frames)
        slots.append((code, None) if forced is None else (None, forced))
        code += forced is None
    return slots


def fits(shape, size, fork):
    return size - fork >= (1 if shape[0] == 1 else 2)


CALLS = [(shape, *size) for shape, size in product(SHAPES, SIZES) if fits(shape, *size)]


def paths_of(shapes, size, fork, most_codes=None):
    layout = Layout(shapes, torch.device("cpu"))
    most = int(layout.num_codes.max())
    return Paths(layout, most, Window(size, fork), IDS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slots_and_codes_follow_the_grammar(shape):
    slots = slots_of(shape)
    layout, index = Layout([shape], torch.device("cpu")), torch.arange(len(slots))[None]
    assert layout.ends_row(index)[0].tolist() == [forced == IDS.eol for _, forced in slots]
    assert layout.ends_frame(index)[0].tolist() == [forced == IDS.eof for _, forced in slots]
    at = [i for i, (code, _) in enumerate(slots) if code is not None]
    assert layout.slot(torch.arange(len(at))[None])[0].tolist() == at
    assert layout.code(index)[0].tolist() == [sum(a < i for a in at) for i in range(len(slots))]


@pytest.mark.parametrize(("shape", "size", "fork"), CALLS, ids=str)
def test_nodes_spell_the_slots_after_the_root_and_attend_to_their_ancestors(shape, size, fork):
    """One image for each number of final codes."""
    slots = slots_of(shape)
    at = {code: i for i, (code, _) in enumerate(slots) if code is not None}
    n, chain = len(at), size - fork + 1
    if n == 1:
        return
    paths = paths_of([shape] * (n - 1), size, fork)
    paths.known[:, 0] = torch.arange(1, n)
    paths.codes.copy_(torch.randint(IDS.num_visual, paths.codes.shape))
    paths.siblings.copy_(torch.randint(IDS.num_visual, paths.siblings.shape))
    nodes = paths.nodes()
    for row, known in enumerate(range(1, n)):
        tokens, depths, mask, places = (part[row].tolist() for part in nodes[:4])
        root = at[known - 1]
        forced = at[known] - root - 1
        assert nodes.fork[row] == forced
        for i in range(chain):
            code, id_ = slots[root + i] if root + i < len(slots) else (None, tokens[i])
            assert tokens[i] == (id_ or paths.codes[row, code] + IDS.visual_start)
            follower = slots[root + i + 1][0] if root + i + 1 < len(slots) else None
            assert places[i] == (-1 if follower is None else follower)
            assert (depths[i], mask[i] % 2**64) == (i, 2 ** (i + 1) - 1)
        bonus = known + 1 if at.get(known + 1) == at[known] + 1 else -1
        for i in range(chain, size):
            assert tokens[i] == paths.siblings[row, i - chain] + IDS.visual_start
            assert depths[i] == forced + 1
            assert mask[i] % 2**64 == 2 ** (forced + 1) - 1 | 1 << i
            assert places[i] == bonus


def table(seed, prefix, num):
    """The ``num`` most likely codes after a prefix of ids, which decide among few."""
    word = hash((seed, *prefix))
    first = word % 3
    return [first + i for i in range(num)]


class Rows:
    """A cache of ids and positions, as that of the model holds keys and values."""

    def __init__(self, batch):
        self.final = [[] for _ in range(batch)]

    def picks(self, paths, nodes, num):
        """What the table draws at each node, from what the node attends to."""
        picks = torch.full((*nodes.tokens.shape, num), -1)
        for row, final in enumerate(self.final):
            tokens, depths, mask, places = (part[row].tolist() for part in nodes[:4])
            for i, place in enumerate(places):
                if place < 0 or paths.known[row] == paths.layout.num_codes[row]:
                    continue
                seen = [j for j in range(len(tokens)) if mask[i] >> j & 1]
                assert [depths[j] for j in seen] == list(range(len(seen)))
                prefix = [*final, *(tokens[j] for j in seen)]
                picks[row, i] = torch.tensor(table(row, prefix, num))
        return picks

    def keep(self, nodes, kept):
        for row, final in enumerate(self.final):
            new = nodes.tokens[row].tolist()
            new[kept.target[row]] = new[kept.source[row]]
            final += new[: kept.counts[row]]


def plain(row, shape):
    ids, codes = [], []
    for _, forced in slots_of(shape):
        if forced is None:
            codes.append(table(row, ids, 1)[0])
        ids.append(forced or codes[-1] + IDS.visual_start)
    return codes, ids


@pytest.mark.parametrize(("size", "fork"), SIZES)
def test_a_table_in_place_of_the_model_gives_the_codes_of_plain_decoding(size, fork):
    """Images and clips of all shapes in one batch, each at its own pace."""
    shapes = [shape for shape in SHAPES if fits(shape, size, fork)]
    paths, rows = paths_of(shapes, size, fork), Rows(len(shapes))
    expected = [plain(row, shape) for row, shape in enumerate(shapes)]
    paths.begin(torch.tensor([codes[0] for codes, _ in expected]))
    num_forwards, ended = 0, paths.layout.num_codes
    while (paths.known < ended).any():
        before, nodes = paths.known.clone(), paths.nodes()
        kept = paths.walk(nodes, rows.picks(paths, nodes, fork))
        rows.keep(nodes, kept)
        assert ((paths.known > before) | (before == ended)).all()
        for row, (codes, ids) in enumerate(expected):
            known = int(paths.known[row])
            assert paths.codes[row, :known].tolist() == codes[:known]
            at = int(paths.layout.slot(paths.known - 1)[row])
            assert rows.final[row] == ids[:at]
        decided = torch.where(kept.decided, nodes.places, -1)
        for row in range(len(shapes)):
            final = sorted(code for code in decided[row].tolist() if code >= 0)
            assert final == list(range(int(before[row]), int(paths.known[row])))
        num_forwards += 1
    assert num_forwards < max(len(codes) for codes, _ in expected) - 1


@pytest.mark.parametrize(
    ("window", "frames", "line"),
    [
        (Window(65), 1, "a window must be 1 or 2 to 64 tokens, got 65"),
        (Window(0), 1, "a window must be 1 or 2 to 64 tokens, got 0"),
        (Window(2), 3, "a window must be 1 or 3 to 64 tokens, got 2"),
        (Window(8, 8), 1, "a window of 8 tokens must have a fork of 1 to 7 drafts, got 8"),
        (Window(8, 0), 1, "a window of 8 tokens must have a fork of 1 to 7 drafts, got 0"),
        (Window(8, 7), 2, "a window of 8 tokens must have a fork of 1 to 6 drafts, got 7"),
        (Window(1, 2), 1, "a window of 1 tokens must have a fork of 1 to 1 drafts, got 2"),
    ],
)
def test_windows_that_do_not_fit_are_refused(window, frames, line):
    with pytest.raises(ValueError, match=line):
        window.check(frames)
