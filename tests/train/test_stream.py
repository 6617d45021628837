"""Packed rows from token stores: one stream for all ranks and workers, and what it learns."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3.data.store import write_shard
from emu3.data.stream import SourceSettings, StoreStream, StreamSettings
from emu3.prompt import parse_document
from emu3.settings import parse
from emu3.train import checkpoint, objective
from emu3.train.stage import SingleLossStage
from emu3.weights import save_decoder
from tests.model.tiny import TINY, tiny_model
from tests.train.recipes import tiny_recipe
from tests.train.stores import (
    IDS,
    MADE,
    TEXT,
    chat_document_of,
    mixed_documents,
    pair_document,
    text_document,
    write_store,
)

DOCUMENTS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, mixed_documents(DOCUMENTS), shards=3)
    return folder


def how(*folders: Path, **changes) -> StreamSettings:
    sources = tuple(SourceSettings(store=folder) for folder in folders)
    wanted = {"context": 95, "window": 20, "smallest_piece": 8, "batch_size": 4, **changes}
    return StreamSettings(sources=sources, **wanted)


def stream(settings: StreamSettings, seed: int = 0, **world) -> StoreStream:
    return StoreStream(settings, IDS, seed, **world)


def take(source: StoreStream, count: int) -> list[tuple[torch.Tensor, ...]]:
    return [source.next_batch() for _ in range(count)]


def equal(one, other) -> bool:
    return all(
        a.equal(b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def documents_of(batches) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of every document or piece of one, without padding."""
    found = []
    for tokens, weights, documents in batches:
        for ids, weight, numbers in zip(tokens, weights, documents, strict=True):
            for number in numbers.unique():
                mine = numbers == number
                if (ids[mine] != IDS.pad).any():
                    found.append((ids[mine].tolist(), weight[mine].tolist()))
    return found


def test_rows_are_padded_documents_one_after_the_other(folder):
    tokens, weights, documents = stream(how(folder)).next_batch()
    assert [t.shape for t in (tokens, weights, documents)] == [(4, 96)] * 3
    assert [t.dtype for t in (tokens, weights, documents)] == [
        torch.int64,
        torch.float32,
        torch.int32,
    ]
    assert (documents.diff() >= 0).all()
    firsts = torch.nn.functional.pad(documents.diff() > 0, (1, 0), value=True)
    assert (weights[firsts] == 0).all()
    assert (weights[tokens == IDS.pad] == 0).all()
    inside = ~firsts & (tokens != IDS.pad)
    visual = tokens >= IDS.visual_start
    assert (weights[inside & visual] == 0.5).all()
    assert (weights[inside & ~visual] == 1).all()


def test_any_number_of_ranks_sees_one_stream(folder):
    settings = how(folder)
    alone = take(stream(settings), 8)
    for ranks in (2, 4):
        parts = [take(stream(settings, rank=r, ranks=ranks), 8) for r in range(ranks)]
        for step, whole in enumerate(alone):
            for at, tensor in enumerate(whole):
                for rank in range(ranks):
                    assert parts[rank][step][at].equal(tensor[rank::ranks])


def test_workers_change_nothing_and_a_restored_stream_continues(folder):
    alone = take(stream(how(folder)), 9)
    read_ahead = stream(how(folder, workers=2))
    assert equal(take(read_ahead, 5), alone[:5])
    state = read_ahead.state()
    assert all(value.dtype == torch.int64 and value.ndim == 0 for value in state.values())
    for workers, ranks in ((0, 1), (2, 1), (0, 2)):
        again = stream(how(folder, workers=workers), ranks=ranks)
        again.restore(state)
        rest = take(again, 4)
        assert equal(rest, [tuple(t[::ranks] for t in batch) for batch in alone[5:]])


def test_a_worker_that_is_started_anew_makes_the_same_rows(folder):
    rows = stream(how(folder)).rows
    places = [(0, 0), (1, 1)]
    assert equal([pickle.loads(pickle.dumps(rows))[places]], [rows[places]])


def test_another_seed_is_another_stream(folder):
    assert not equal(take(stream(how(folder)), 1), take(stream(how(folder), seed=1), 1))


def test_an_epoch_has_every_document_once(folder):
    """Texts may come in pieces: the tokens of all are those of the store, three times."""
    settings = how(folder, describe=0.0, null_caption=0.0)
    rows = stream(settings).rows
    pieces = Counter()
    for window in range(9):  # of 20 documents: three epochs of 60
        found = rows.window(window)
        for row in found.rows:
            for piece in row:
                pieces[int(found.documents[piece.document])] += piece.length
    lengths = rows.stores[0].columns(np.arange(DOCUMENTS))[0]
    assert [pieces[n] for n in range(DOCUMENTS)] == (3 * lengths).tolist()


def test_captions_come_before_or_behind_or_not_at_all_by_the_shares_of_the_settings(tmp_path):
    write_store(tmp_path, [pair_document("a red seven", (3, 4), n) for n in range(100)])
    rest = {"describe": 0.3, "null_caption": 0.2, "context": 255, "batch_size": 40}
    found = documents_of(take(stream(how(tmp_path, **rest)), 5))
    assert len(found) > 1000
    forms = Counter()
    for ids, _ in found:
        parts = parse_document(ids, TEXT)
        forms[" ".join("text" if isinstance(part, str) else "image" for part in parts)] += 1
        assert all(part == "a red seven" for part in parts if isinstance(part, str))
    shares = {form: count / len(found) for form, count in forms.items()}
    expected = {"image text": 0.3, "text image": 0.7 * 0.8, "image": 0.7 * 0.2}
    assert shares.keys() == expected.keys()
    for form, share in expected.items():
        assert abs(shares[form] - share) < 4 * (share * (1 - share) / len(found)) ** 0.5


def test_without_eos_after_vision_a_document_ends_in_its_image(tmp_path):
    write_store(tmp_path, [pair_document("a red seven", (3, 4)), text_document(30)])
    settings = how(tmp_path, eos_after_vision=False, batch_size=8)
    ends = Counter(ids[-1] for ids, _ in documents_of(take(stream(settings), 4)))
    behind = [ids for ids, _ in documents_of(take(stream(settings), 4)) if ids[1] == IDS.boi]
    assert ends[IDS.eoi] > 0
    assert ends.keys() == {IDS.eoi, IDS.eos}
    assert any(ids[-1] == IDS.eos for ids in behind)  # an image and then its caption


def test_answers_alone_are_learned(tmp_path):
    """The image after its caption, the caption after its image, answers of a chat, any text."""
    chat = chat_document_of(40, [(5, 9), (30, 40)])
    image = pair_document("a red seven", (3, 4))
    write_store(tmp_path, [image, chat, text_document(20)])
    settings = how(tmp_path, learn="answer", null_caption=0.0, batch_size=16)
    learned = Counter()
    for ids, weights in documents_of(take(stream(settings), 2)):
        learned[len(ids), tuple(np.flatnonzero(weights).tolist())] += 1
    start = image.ids.index(IDS.img_token) + 1
    size = len(image.ids)
    assert learned.keys() == {
        (40, (*range(5, 9), *range(30, 40))),
        (20, tuple(range(1, 20))),
        (size, tuple(range(start, size))),
        (size, tuple(range(size - 1 - len("a red seven"), size))),
    }


def test_weights_of_vision_and_text_are_settings(folder):
    settings = how(folder, vision_weight=0.0, text_weight=2.0)
    tokens, weights, _ = stream(settings).next_batch()
    assert (weights[tokens >= IDS.visual_start] == 0).all()
    assert weights.unique().tolist() == [0, 2]


def test_two_stores_are_mixed_by_tokens(tmp_path):
    write_store(tmp_path / "a", [text_document(40)])
    write_store(tmp_path / "b", [pair_document("x", (4, 4), n) for n in range(30)])
    sources = (
        SourceSettings(store=tmp_path / "a", weight=3),
        SourceSettings(store=tmp_path / "b", weight=1),
    )
    settings = how(tmp_path, null_caption=0.0, window=200, batch_size=50)
    settings = settings.model_copy(update={"sources": sources})
    tokens = Counter()
    for ids, _ in documents_of(take(stream(settings), 4)):
        tokens["image" if IDS.boi in ids else "text"] += len(ids)
    assert abs(tokens["text"] / tokens.total() - 0.75) < 0.02


@pytest.mark.parametrize("cut_texts", [True, False])
def test_what_is_longer_than_a_row_is_cut_if_it_is_text_and_left_out_if_it_is_not(
    cut_texts, tmp_path
):
    write_store(tmp_path, [text_document(250), pair_document("x", (12, 12)), text_document(10)])
    source = stream(how(tmp_path, cut_texts=cut_texts))
    assert source.rows.left_out == 1
    found = documents_of(take(source, 6))
    assert IDS.boi not in {token for ids, _ in found for token in ids}
    assert max(len(ids) for ids, _ in found) == 96
    assert all(weights[0] == 0 for _, weights in found)


def test_a_store_that_changed_is_not_continued(tmp_path):
    write_store(tmp_path, mixed_documents(20))
    source = stream(how(tmp_path))
    source.next_batch()
    state = source.state()
    write_shard(tmp_path / "later", mixed_documents(3), MADE)
    with pytest.raises(ValueError, match="a store has changed since this run was saved"):
        stream(how(tmp_path)).restore(state)
    # Its shards back, the run continues.
    for path in tmp_path.glob("later*"):
        path.unlink()
    again = stream(how(tmp_path))
    again.restore(state)
    assert equal(take(again, 2), take(source, 2))


def test_streams_that_cannot_be_are_told_in_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size \(4\) must be a multiple of 3 ranks"):
        stream(how(folder), ranks=3)
    with pytest.raises(ValueError, match="must have the vocabulary of the model"):
        StoreStream(how(folder), IDS.model_copy(update={"num_visual": 9}), 0)
    write_store(tmp_path, [pair_document("x", (12, 12))])
    with pytest.raises(ValueError, match=r"no document of .* fits a row of 96 tokens"):
        stream(how(tmp_path))
    with pytest.raises(ValueError, match="no shard in"):
        stream(how(tmp_path / "none"))
    with pytest.raises(ValueError, match="smallest_piece"):
        how(folder, smallest_piece=49)


def test_an_unknown_setting_of_a_source_is_named():
    tree = {"sources": [{"store": "a"}, {"store": "b", "weigth": 2}]}
    with pytest.raises(ValueError, match=r"sources.1.weigth: unknown setting; sources has better"):
        parse(StreamSettings, tree)
    with pytest.raises(ValueError, match="sources must all have a weight, or none"):
        parse(StreamSettings, {"sources": [{"store": "a"}, {"store": "b", "weight": 2}]})


def float64_model() -> torch.nn.Module:
    """Rotary tables in float64 too: those of a model are rounded to float32."""
    model = tiny_model().double()
    width, positions = TINY.head_dim, torch.arange(TINY.max_position_embeddings).double()
    exponents = torch.arange(0, width, 2).double() / width
    angles = positions[:, None] * TINY.rope_theta**-exponents
    model.rotate.cos, model.rotate.sin = angles.cos(), angles.sin()
    return model


def test_the_loss_of_packed_rows_is_that_of_each_document_alone(folder):
    """In float64, to its rounding: no attention between documents, no shift of positions."""
    model = float64_model()
    batch = stream(how(folder)).next_batch()
    tokens, weights, documents = batch
    packed = model.loss(tokens, weights.double(), documents)
    total = weight = 0.0
    for ids, each in documents_of([batch]):
        if sum(each):
            each = torch.tensor([each], dtype=torch.float64)
            total += model.loss(torch.tensor([ids]), each) * each.sum()
            weight += each.sum()
    assert len(documents_of([batch])) > 8
    torch.testing.assert_close(packed, total / weight, rtol=1e-13, atol=0)
    crossing = model.loss(tokens, weights.double())
    assert abs(crossing / packed - 1) > 1e-4


def test_a_model_trains_from_a_store_and_a_restored_run_continues(folder, tmp_path):
    """With dropout: a stream that is restored draws no random number of the run."""
    recipe = tiny_recipe("decoder", tmp_path)

    def stage() -> SingleLossStage:
        torch.manual_seed(0)
        model = tiny_model(dropout=0.2).train()
        return SingleLossStage(
            recipe, model, stream(how(folder)), objective.next_token, save_decoder
        )

    whole = stage()
    losses = [float(whole.step(n, *whole.stream.next_batch())["loss"]) for n in range(6)]
    assert losses[-1] < losses[0]
    one = stage()
    for number in range(3):
        one.step(number, *one.stream.next_batch())
    checkpoint.save(tmp_path / "saved.safetensors", 3, recipe, one)
    other = stage()
    assert checkpoint.restore(tmp_path / "saved.safetensors", recipe, other) == 3
    rest = [float(other.step(n, *other.stream.next_batch())["loss"]) for n in range(3, 6)]
    assert rest == losses[3:]
