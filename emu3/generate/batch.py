"""Images, clips and texts that decode together in shared forwards.

Each joins after its prompt, is at a place of its own, and leaves at its end. Tokens that the
grammar forces are not sampled and cost no forward of their own: where a row of codes ends, EOL is
fed with the code before it, and where a frame ends, EOF too. Rows of the batch that are elsewhere
feed a dead token then, which is dropped from the cache before anything attends to it.

``R`` rows of the cache: a guided image has two, its prompt's and the negative one's.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.cache import KeyValueCache
from emu3.config import Vocabulary
from emu3.cuda_graph import CapturedStep
from emu3.generate.common import NOT_FINITE, check_prompts, new_cache, pad_right, to_device_of
from emu3.generate.past import Past
from emu3.model import Emu3
from emu3_kernels import sample_guided

MOST_GRAPHS = 32
"""Compositions of a batch whose CUDA graphs are kept, the last ones used."""
SPARE = 2
"""Slots of a row for dead tokens, in a batch whose rows end apart."""
_ENDLESS = 1 << 62
_TOKEN, _PLACES, _SEEDS = range(3)


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn: the settings of :func:`emu3_kernels.sample_guided`."""

    guidance: float = 3.0
    """Scale of classifier-free guidance; 1 turns it off."""
    top_k: int | None = 2048
    top_p: float | None = None
    temperature: float = 1.0
    negative: str = ""
    """The negative prompt: the caption of the unconditional branch."""

    @property
    def settings(self) -> dict[str, float | int | None]:
        """Keywords of :func:`emu3_kernels.sample_guided`."""
        return {name: value for name, value in vars(self).items() if name != "negative"}


USUAL = Sampling()
GREEDY = Sampling(guidance=1, top_k=1)


@dataclass(eq=False)
class Generation:
    """One image, clip or text in a batch."""

    prompts: Sequence[Sequence[int]]
    """Its prompt and, with guidance, the negative one."""
    length: int
    """Codes of all frames; of a text, its most tokens. At least 1."""
    grid: tuple[int, int] | None = None
    """Rows and columns of codes of a frame; None is a text."""
    how: Sampling = USUAL
    seed: int = 0
    """64 bits: the same is drawn alone and in any batch, up to near-ties of logits."""
    place: int = field(default=0, init=False)
    """Codes or tokens generated so far."""
    ids: list[int] = field(default_factory=list, init=False)
    """Of a text: what was generated, without EOS."""
    codes: Tensor | None = field(default=None, init=False)
    """Of an image or clip that has ended: ``[length]`` int64 on the model's device."""
    error: ValueError | None = field(default=None, init=False)
    """Why it ended early."""
    rows: list[int] = field(default_factory=list, init=False)
    """Of the cache, while it is in a batch."""

    @property
    def forced(self) -> int:
        """Tokens that the grammar forces after the last code: EOL, and EOF."""
        return sum(self.place % size == 0 for size in self.sizes)

    @property
    def sizes(self) -> tuple[int, int]:
        """Codes of a row and of a frame."""
        if self.grid is None:
            return _ENDLESS, _ENDLESS
        return self.grid[1], self.grid[0] * self.grid[1]

    @property
    def capacity(self) -> int:
        """Slots that a row of it needs: the last code is not fed."""
        fed = self.length - 1
        return max(map(len, self.prompts)) + fed + sum(fed // size for size in self.sizes)


class Batch:
    """Generations over one static cache; each step is one CUDA graph where asked.

    The host knows the lengths of all rows and waits for the device where a row of codes ends, to
    check the logits, and to read texts.

    Args:
        model: in eval mode.
        ids: its vocabulary.
        num_rows: R.
        capacity: slots of a row.
        graph: whether to replay steps as CUDA graphs.
        read_every: steps after which the tokens of texts are read.
        past: of a batch of one row, what its prompt may go on from.
    """

    def __init__(
        self,
        model: Emu3,
        ids: Vocabulary,
        num_rows: int,
        capacity: int,
        *,
        graph: bool = False,
        read_every: int = 1,
        past: Past | None = None,
    ) -> None:
        self.model, self.ids, self.graph, self.read_every = model, ids, graph, read_every
        self.past = past
        self.cache = new_cache(model, num_rows, capacity)
        device = self.cache.lengths.device
        self._state = torch.zeros(5, num_rows, dtype=torch.int64, device=device)
        self._largest = torch.zeros(num_rows, device=device)
        """The magnitude of each row's largest logit so far; NaN stays NaN."""
        self._written = torch.zeros(num_rows, capacity, dtype=torch.int64, device=device)
        self.generations: list[Generation] = []
        self._owners: list[Generation] = []
        self._lengths: list[int] = []
        """Of each row, as ``cache.lengths``."""
        self._plan: _Plan | None = None
        self._plans: OrderedDict[tuple, _Plan] = OrderedDict()
        self._unread = 0

    @property
    def free_rows(self) -> int:
        return self.cache.keys.shape[1] - len(self._owners)

    @torch.no_grad()
    def join(self, generations: Sequence[Generation]) -> list[Generation]:
        """Feed the prompts and generate the first codes; return what ended by that.

        Equal prompts, such as the negative ones of images of one grid, are fed once.
        """
        prompts = [tuple(ids) for one in generations for ids in one.prompts]
        check_prompts(self.model, prompts)
        start, stop = len(self._owners), len(self._owners) + len(prompts)
        hidden = self._feed_prompts(start, prompts)
        for one in generations:
            one.rows = [len(self._owners) + i for i in range(len(one.prompts))]
            self._owners += [one] * len(one.prompts)
        self._lengths += map(len, prompts)
        self.generations += generations
        rows = [[0, 0, signed(one.seed), *one.sizes] for one in self._owners[start:]]
        self._state[:, start:stop] = torch.tensor(rows, device=self._state.device).T
        self._largest[start:stop] = 0
        self._choose(_Plan(generations, self.cache), hidden, start)
        self._plan = None
        return self._after_step(generations)

    def _feed_prompts(self, start: int, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Fill the rows from ``start`` on; return the hidden states after the prompts."""
        distinct = list(dict.fromkeys(prompts))
        sources = [distinct.index(ids) for ids in prompts]
        part = self.cache.rows(start, start + len(distinct))
        part.longest, part.ragged = 0, False
        part.lengths.zero_()
        shared = 0 if self.past is None else self.past.fill(part, distinct[0])
        new = [ids[shared:] for ids in distinct]
        tokens, prompt_lengths = to_device_of(self.model, *pad_right(new, self.ids.pad))
        hidden = self.model(tokens, part, prompt_lengths=prompt_lengths)
        # From the last one on, as no source lies behind its copy.
        for row, source in reversed([*enumerate(sources)]):
            if row != source:
                self.cache.move_row(start + source, start + row, len(prompts[row]))
        index = torch.tensor(sources, device=hidden.device)
        return hidden[index, prompt_lengths[index] - 1]

    @torch.no_grad()
    def step(self) -> list[Generation]:
        """Generate the next code of each generation; return those that end, which leave."""
        plan = self._plan = self._plan or self._planned()
        num_new = 1 + max(one.forced for one in self.generations)
        plan.cache.longest = max(self._lengths)
        plan.cache.check_room(num_new)  # a replay runs no Python
        if num_new not in plan.steps:
            feed = partial(self._feed, plan, num_new)
            device = self._state.device
            plan.steps[num_new] = CapturedStep(feed, device) if self.graph else feed
        plan.steps[num_new]()
        for row, owner in enumerate(self._owners):
            self._lengths[row] += 1 + owner.forced
        return self._after_step(self.generations)

    def run(
        self, generations: Sequence[Generation], watch: Callable[[], None] | None = None
    ) -> None:
        """Generate all of them to their ends, and call ``watch`` after each step.

        Raises:
            ValueError: logits that are not finite.
        """
        ended = self.join(generations)
        while not any(one.error for one in ended):
            if watch is not None:
                watch()
            if not self.generations:
                return
            ended = self.step()
        raise next(one.error for one in ended if one.error)

    def drawn(self, generation: Generation) -> Tensor:
        """``[place]`` codes of a generation so far."""
        if generation.codes is not None:
            return generation.codes
        return self._written[generation.rows[0], : generation.place]

    def leave(self, generation: Generation) -> None:
        """Take a generation out, at its end or before."""
        for row in sorted(generation.rows, reverse=True):
            last = len(self._owners) - 1
            if row != last:
                self._move(last, row)
            self._owners.pop()
            self._lengths.pop()
        generation.rows = []
        self.generations.remove(generation)
        self._plan = None

    def _move(self, source: int, target: int) -> None:
        owner = self._owners[source]
        self.cache.move_row(source, target, self._lengths[source])
        for tensor in (self._state, self._largest[None]):
            tensor[:, target] = tensor[:, source]
        self._written[target, : owner.place] = self._written[source, : owner.place]
        self._owners[target], self._lengths[target] = owner, self._lengths[source]
        owner.rows[owner.rows.index(source)] = target

    def _planned(self) -> "_Plan":
        """The plan of this composition, whose graphs are kept."""
        plan = _Plan(self.generations, self.cache)
        if not self.graph:
            return plan
        known = self._plans.setdefault(plan.key, plan)
        known.index.copy_(plan.index)
        self._plans.move_to_end(plan.key)
        if len(self._plans) > MOST_GRAPHS:
            self._plans.popitem(last=False)
        return known

    def _feed(self, plan: "_Plan", num_new: int) -> None:
        token, places, _, *sizes = self._state[:, : len(plan.index)]
        tokens = token[:, None]
        for one in (self.ids.eol, self.ids.eof)[: num_new - 1]:
            tokens = F.pad(tokens, (0, 1), value=one)
        hidden = self.model(tokens, plan.cache)
        if num_new == 1:
            last = hidden[:, 0]
        else:
            forced = sum((places % size == 0).int() for size in sizes)
            last = hidden[torch.arange(len(hidden), device=hidden.device), forced]
            plan.cache.lengths.add_(forced - (num_new - 1))  # without the dead tokens
        self._choose(plan, last, 0)

    def _choose(self, plan: "_Plan", hidden: Tensor, start: int) -> None:
        """Draw the next codes after ``hidden [n, D]``, whose first row is row ``start``."""
        ids, model = self.ids, self.model
        hidden = hidden.index_select(0, plan.index - start)
        visual, words = hidden.tensor_split([sum(plan.num_rows[: plan.num_visual])])
        logits: list[Tensor] = []
        if plan.num_visual:
            codes = model.logits(visual, slice(ids.visual_start, ids.size))
            logits += codes.split(plan.num_rows[: plan.num_visual])
        if len(words):
            parts = slice(ids.num_text), slice(ids.eos, ids.eos + 1)
            both = torch.cat([model.logits(words, rows) for rows in parts], dim=-1)
            logits += both.split(plan.num_rows[plan.num_visual :])
        for group, of, rows in zip(
            plan.groups, logits, plan.index.split(plan.num_rows), strict=True
        ):
            self._sample(group, of, rows)
        self._state[_PLACES].scatter_add_(0, plan.index, torch.ones_like(plan.index))

    def _sample(self, group: "_Group", logits: Tensor, rows: Tensor) -> None:
        """Draw one code from each row of ``logits``, or pair of rows, the negative ones last."""
        pair = logits.chunk(2) if group.guided else (logits, None)
        first = rows[: len(pair[0])]
        places, seeds = self._state[_PLACES][first], self._state[_SEEDS][first]
        code = sample_guided(*pair, seeds, places, **dict(group.settings))[:, 0]
        code = code.clamp(min=0)  # NaN gives -1, and is found at the end of the row of codes
        if group.is_text:
            code = fed = code.masked_fill(code == self.ids.num_text, self.ids.eos)
        else:
            fed = code + self.ids.visual_start
        self._written[first, places] = code
        self._state[_TOKEN].scatter_(0, rows, fed.repeat(1 + group.guided))
        largest = torch.maximum(self._largest[rows], logits.amax(-1).abs().float())
        self._largest.scatter_(0, rows, largest)

    def _after_step(self, stepped: Sequence[Generation]) -> list[Generation]:
        """Count the new codes; let those leave that have ended."""
        for one in stepped:
            one.place += 1
        ended = [one for one in self.generations if one.place == one.length]
        read = self._read_texts(bool(ended))
        if ended or read or self.generations[0].forced:
            ended += [one for one in read if one not in ended]
            finite = self._largest[: len(self._owners)].isfinite().tolist()
            for one in self.generations:
                if not all(finite[row] for row in one.rows):
                    one.error = ValueError(NOT_FINITE)
                    ended += [] if one in ended else [one]
        for one in ended:
            if one.grid:
                one.codes = self.drawn(one).clone()
            self.leave(one)
        return ended

    def _read_texts(self, now: bool) -> list[Generation]:
        """Read the new tokens of texts; return those that have met EOS."""
        texts = [one for one in self.generations if one.grid is None]
        self._unread += 1
        if not texts or (self._unread < self.read_every and not now):
            return []
        self._unread, ended = 0, []
        for one in texts:
            new = self.drawn(one)[len(one.ids) :].tolist()
            if self.ids.eos in new:
                ended.append(one)
                new = new[: new.index(self.ids.eos)]
            one.ids += new
        return ended


class _Group(NamedTuple):
    """Generations whose codes are drawn by one call."""

    is_text: bool
    guided: bool
    settings: tuple[tuple[str, float | int | None], ...]


class _Plan:
    """Which rows are sampled how; a CUDA graph may hold its tensors.

    ``index`` has the rows of the batch group by group, images and clips before texts, and in each
    group the negative ones last.
    """

    def __init__(self, generations: Sequence[Generation], cache: KeyValueCache) -> None:
        found: dict[_Group, list[Generation]] = {}
        for one in generations:
            guided = len(one.prompts) == 2
            settings = one.how.settings | ({} if guided else {"guidance": 1.0})
            group = _Group(one.grid is None, guided, tuple(settings.items()))
            found.setdefault(group, []).append(one)
        self.groups = sorted(found, key=repr)  # which begins with is_text
        self.num_visual = sum(not group.is_text for group in self.groups)
        rows = [
            [one.rows[side] for side in range(1 + group.guided) for one in found[group]]
            for group in self.groups
        ]
        self.num_rows = [len(of) for of in rows]
        self.key = tuple(zip(self.groups, self.num_rows, strict=True))
        self.index = torch.tensor([*chain(*rows)], device=cache.lengths.device)
        self.cache = cache.rows(0, len(self.index))
        self.steps: dict[int, Callable[[], None]] = {}


def signed(seed: int) -> int:
    """The 64 bits of ``seed`` as an int64."""
    return (seed + 2**63) % 2**64 - 2**63


def all_seeds(seeds: int | Sequence[int], count: int) -> list[int]:
    """One for each of ``count`` generations; an int is that of the first, and counts up."""
    found = [seeds + i for i in range(count)] if isinstance(seeds, int) else list(seeds)
    if len(found) != count:
        raise ValueError(f"generate: seeds must be one or {count}, got {len(found)}")
    return found
