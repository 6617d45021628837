"""A decode step and a training step as CUDA graphs: exact, and capturable, shown on a CPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from emu3.cuda_graph import CapturedStep
from emu3.generate import Sampling, generate_captions, generate_images, text, visual
from emu3.generate.batch import GREEDY, Batch, Generation
from emu3.generate.common import new_cache
from emu3.text import ByteTokenizer
from emu3_kernels import use_backend
from emu3_kernels.testing.launches import recorded_launches
from tests.model.tiny import TINY, tiny_model
from tests.recorded_graph import RecordedOps, Refused, recorded_graphs

TEXT = ByteTokenizer(TINY.vocabulary)
CAPTIONS = ["a red seven", "an orange one"]
GRID = 3, 4
CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch):
    for module in (visual, text):
        monkeypatch.setattr(module, "uses_graph", lambda model, asked: bool(asked))
    with recorded_graphs(monkeypatch) as counts:
        yield counts


def images(model, how, **options):
    return generate_images(model, TEXT, CAPTIONS, GRID, how, 5, **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(guidance=1, top_k=None, temperature=0.7), Sampling(top_k=1)]
)
def test_replayed_steps_draw_the_same_images_token_for_token(graphs, how, backend):
    model = tiny_model()
    with use_backend(backend):
        plain = images(model, how)
        assert images(model, how, cuda_graph=True).equal(plain)
    # One graph for a code after a code, one for a code after the end of a row.
    assert graphs.captures == 2
    assert graphs.replays == GRID[0] * GRID[1] - 1 - 2


def test_replayed_steps_write_the_same_captions(graphs):
    model, random = tiny_model(), torch.Generator().manual_seed(2)
    codes = torch.randint(TINY.vocabulary.num_visual, (3, 2, 3), generator=random)
    plain = generate_captions(model, TEXT, codes, max_new_tokens=10)
    assert generate_captions(model, TEXT, codes, max_new_tokens=10, cuda_graph=True) == plain
    assert graphs.captures == 1


def test_a_replayed_step_never_runs_beyond_the_cache(graphs):
    """Python of the model, which checks the room, does not run in a replay."""
    batch = Batch(tiny_model(), TINY.vocabulary, 1, 5, graph=True)
    batch.join([Generation([[1]], 9, None, GREEDY)])
    for _ in range(4):
        batch.step()
    assert batch.cache.lengths.tolist() == [5]
    with pytest.raises(ValueError, match="6 positions exceed its capacity 5"):
        batch.step()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("item", lambda x: x.sum().item()),
        ("a branch", lambda x: x if x.sum() else 2 * x),
        ("nonzero", lambda x: x.nonzero()),
        ("a mask", lambda x: x[x > 0]),
    ],
)
def test_the_recorder_refuses_what_a_capture_refuses(graphs, name, read):
    step = CapturedStep(read, CPU)
    step(torch.ones(3))
    with pytest.raises(Refused):
        step(torch.ones(3))


def test_a_capture_follows_a_call_on_its_own_stream(monkeypatch):
    """What only a GPU can run, with every name of torch.cuda that it uses replaced."""
    did = []

    @contextmanager
    def inside(*names):
        did.append(("enter", *names))
        yield
        did.append(("leave", *names))

    def stream_of(name):
        waits = lambda other: did.append((name, "waits for", other.name))  # noqa: E731
        return SimpleNamespace(name=name, device=CPU, wait_stream=waits)

    class Graph:
        def replay(self):
            did.append("replays")

    main = stream_of("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream_of("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside("stream", stream.name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: inside("device"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda g, stream: inside("graph", stream.name))
    step = CapturedStep(lambda x: did.append("step") or x + 1, CPU)
    for value in range(3):
        step(torch.full((2,), float(value)))
    warm = [("enter", "stream", "side"), "step", ("leave", "stream", "side")]
    capture = [("enter", "graph", "side"), "step", ("leave", "graph", "side")]
    assert did == [
        *[("side", "waits for", "main"), *warm, ("main", "waits for", "side")],
        *[("enter", "device"), *capture, ("leave", "device"), "replays"],
        "replays",
    ]


def test_another_shape_is_refused_and_not_captured_anew(graphs):
    step = CapturedStep(lambda x: 2 * x, CPU)
    for value in range(4):
        assert step(torch.full((3,), float(value))).equal(torch.full((3,), 2.0 * value))
    with pytest.raises(ValueError, match=r"CapturedStep: inputs must stay \[\(\(3,\), torch.float"):
        step(torch.ones(4))


def test_a_graph_asked_for_where_there_is_none_is_refused():
    with pytest.raises(ValueError, match="without autocast, got one on cpu"):
        generate_images(tiny_model(), TEXT, CAPTIONS, GRID, cuda_graph=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"got torch\.autocast"),
    ):
        generate_images(tiny_model(), TEXT, CAPTIONS, GRID, cuda_graph=True)


@pytest.mark.parametrize("training", [False, True], ids=["decode step", "training"])
def test_the_triton_path_of_a_step_reads_nothing_from_the_gpu(training):
    model = tiny_model(dropout=0.1).train(training)
    cache = None if training else new_cache(model, 2, 9)
    tokens = torch.ones(2, 2, dtype=torch.int64)
    with use_backend("triton"), recorded_launches() as launches, torch.set_grad_enabled(training):
        model(tokens, cache)
        launches.clear()
        with RecordedOps():
            hidden = model(tokens, cache)
            if training:
                hidden.sum().backward()
    assert launches


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("top_k", [1, None])
def test_logits_that_are_not_finite_end_in_one_line(value, top_k):
    """The host asks once a row of codes."""
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[TINY.vocabulary.visual_start + 3] = value
    with pytest.raises(ValueError, match="generate: logits must be finite, got NaN or infinity"):
        images(model, Sampling(top_k=top_k, guidance=1))
    with torch.no_grad():
        model.head.weight[7] = torch.nan
    with pytest.raises(ValueError, match="generate: logits must be finite"):
        generate_captions(model, TEXT, torch.zeros(1, 2, 2, dtype=torch.int64), max_new_tokens=3)


def test_only_the_visual_rows_of_the_head_are_computed(monkeypatch):
    model, seen = tiny_model(), []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(model, "linear", lambda x, w: (seen.append(len(w)), linear(x, w))[1])
    images(model, Sampling())
    assert seen == [TINY.vocabulary.num_visual] * (GRID[0] * GRID[1])
