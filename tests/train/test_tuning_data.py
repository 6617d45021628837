"""What fine-tuning learns of a store, letter by letter, and which documents it reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3.data.compose import chat_document
from emu3.data.media import write_image
from emu3.data.store import Store
from emu3.data.stream import SourceSettings, StoreStream, StreamSettings
from emu3.model import Emu3
from emu3.prompt import understanding_document
from emu3.settings import SettingsError, parse
from emu3.tasks import load_recipe
from emu3.templates import Turn
from emu3.tools.score import score_store
from emu3.train.metrics import read_metrics
from emu3.train.pretrain_loop import pretrain as train
from emu3.train.store_recipe import StoreRecipe
from emu3.weights import load_decoder, load_vision, save_decoder
from tests.ranks import Ranks
from tests.train.preparing import jsonl, picture, prepare, run, save_tokenizer
from tests.train.stores import IDS, TEXT, pair_document, text_document, write_store

MINI = ["model.num_layers=1", "model.hidden_size=32", "model.head_dim=8", "train.steps=2"]
SAID = "<image> What is it?", "a cat", "And <image> that?", "a dog", "Sure?", "yes"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("weights") / "vision.safetensors")


@pytest.fixture(scope="module")
def chats(tmp_path_factory, weights) -> Path:
    """A store of one LLaVA-form conversation of three turns and two images."""
    folder = tmp_path_factory.mktemp("chats")
    for seed in range(2):
        write_image(folder / f"{seed}.png", picture(seed))
    turns = [{"from": "gpt" if n % 2 else "human", "value": words} for n, words in enumerate(SAID)]
    lines = jsonl(folder / "a.jsonl", [{"images": ["0.png", "1.png"], "conversations": turns}])
    done = prepare([lines], folder / "store", weights)
    assert done.exit_code == 0, done.output
    return folder / "store"


def released(recipe: str, *words: str) -> StreamSettings:
    """The data of a recipe that ships, in small rows."""
    data = load_recipe(recipe, words).data
    return data.model_copy(update={"context": 511, "batch_size": 4, "window": 4, "workers": 0})


def of(settings: StreamSettings, folder: Path) -> StreamSettings:
    return settings.model_copy(update={"sources": (SourceSettings(store=folder),)})


def learned(settings: StreamSettings) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of the first document of some rows."""
    found = []
    tokens, weights, documents = StoreStream(settings, IDS, 0).next_batch()
    for ids, weight, numbers in zip(tokens, weights, documents, strict=True):
        found.append((ids[numbers == 0].tolist(), weight[numbers == 0].tolist()))
    return found


def spelled(ids: list[int], weights: list[float]) -> list[str]:
    """The runs of learned tokens: letters, and names of special ones."""
    counts = "num_text", "visual_start", "num_visual"
    names = {value: f"<{name}>" for name, value in IDS if name not in counts}
    runs, before = [], 0.0
    for token, weight in zip(ids, weights, strict=True):
        if weight:
            is_text = token < IDS.num_text
            word = TEXT.decode([token]) if is_text else names.get(token, "*")
            runs[-1:] = [runs[-1] + word] if before else [*runs[-1:], word]
        before = weight
    return runs


@pytest.mark.parametrize("recipe", ["understand2", "understand2-mini"])
def test_of_a_conversation_the_answers_alone_are_learned(chats, recipe):
    """Several turns and images; EOS belongs to the last answer."""
    for ids, weights in learned(of(released(recipe), chats)):
        assert sum(token == IDS.boi for token in ids) == 2
        assert spelled(ids, weights) == [" a cat", " a dog", " yes<eos>"]
        assert {weight for weight in weights if weight} == {1.0}


@pytest.mark.parametrize("recipe", ["understand1", "understand1-mini"])
def test_of_an_image_its_caption_alone_is_learned_and_of_a_text_all(tmp_path, recipe):
    image, words = pair_document("a red seven", (3, 4)), text_document(20)
    write_store(tmp_path / "image", [image])
    write_store(tmp_path / "text", [words])
    for ids, weights in learned(of(released(recipe), tmp_path / "image")):
        codes = torch.tensor([token for token in ids if token >= IDS.visual_start]).view(3, 4)
        expected = understanding_document(codes - IDS.visual_start, "a red seven", TEXT)
        assert ids == expected
        assert spelled(ids, weights) == ["a red seven<eos>"]
    for ids, weights in learned(of(released(recipe), tmp_path / "text")):
        assert ids == list(words.ids)
        assert weights == [0.0, *[1.0] * 19]


@pytest.mark.parametrize("recipe", ["t2i-sft", "quality"])
def test_text_to_image_tuning_learns_the_codes_alone(tmp_path, recipe):
    """Not EOL, EOF, eoi and EOS, nor the caption: as the labels of the released fine-tuning."""
    write_store(tmp_path, [pair_document("a red seven", (3, 4))])
    data = of(released(recipe), tmp_path).model_copy(update={"null_caption": 0.0})
    for ids, weights in learned(data):
        assert TEXT.decode(ids[1:12]) == "a red seven"
        assert ids[-1] == (IDS.eoi if recipe == "t2i-sft" else IDS.eos)
        assert [weight > 0 for weight in weights] == [token >= IDS.visual_start for token in ids]
        assert spelled(ids, weights) == ["****"] * 3
        assert {weight for weight in weights if weight} == {1.0}


def test_emu3s_own_lists_of_codes_train_the_released_fine_tuning(tmp_path):
    """Files of ``.pth`` and their JSON, prepared and learned; a share without the caption."""
    folder = tmp_path / "codes"
    folder.mkdir()
    for number in range(6):
        codes = np.random.default_rng(number).integers(0, 512, (4, 5))
        record = {"name": f"{number}", "images": codes, "texts": f"number {number}"}
        torch.save(record, folder / f"{number}.pth")
    names = [f"{number}.pth" for number in range(6)]
    (tmp_path / "train.json").write_text(json.dumps({"prefix": str(folder), "path_list": names}))
    assert prepare([tmp_path / "train.json"], tmp_path / "store", None).exit_code == 0
    words = [
        *(f"data.{word}" for word in ("context=255", "batch_size=2", "workers=0", "window=8")),
        f'data.sources=[{{store="{tmp_path / "store"}"}}]',
        *("parallel.shard=1", "parallel.dtype=float32", "preset=mini", *MINI),
        *("model.max_position_embeddings=256", "train.device=cpu"),
    ]
    recipe = load_recipe("t2i-sft", words)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"start": None})})
    train(recipe, tmp_path / "run")
    first, second = read_metrics(tmp_path / "run/metrics.jsonl")
    assert "text_loss" not in first
    assert first["loss"] == pytest.approx(first["vision_loss"], rel=1e-5)
    assert second["lr"] == pytest.approx(2 / 30 * 1e-5)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, chats) -> Path:
    """Stores that every recipe can learn of, and weights to start from."""
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "pairs", [pair_document("a red seven", (4, 5), n) for n in range(16)])
    write_store(folder / "texts", [text_document(40, n) for n in range(16)])
    np.save(folder / "scores.npy", np.arange(16.0))
    torch.manual_seed(0)
    save_decoder(folder / "start.safetensors", Emu3(small("t2i-sft", folder, chats).model))
    return folder


def small(recipe: str, stores: Path, chats: Path, *words: str) -> StoreRecipe:
    """A recipe that ships, of a small model, small rows and two steps."""
    better = f'scores="{stores / "scores.npy"}", better=0.5'
    pairs, texts, chat = (f'store="{path}"' for path in (stores / "pairs", stores / "texts", chats))
    sources = {
        "quality": f"{{{pairs}, {better}}}",
        "t2i-sft": f"{{{pairs}}}",
        "understand1": f"{{{pairs}, weight=0.5}}, {{{texts}, weight=0.5}}",
        "understand2": f"{{{chat}, weight=0.9}}, {{{texts}, weight=0.1}}",
    }[recipe]
    model = "hidden_size=32", "num_layers=1", "num_heads=4", "num_kv_heads=4", "head_dim=8"
    model += "max_position_embeddings=512", "dropout=0.1", "intermediate_size=48"
    data = "context=384", "batch_size=8", "window=32", "workers=0", f"sources=[{sources}]"
    how = "steps=2", "device=cpu", f"start={stores / 'start.safetensors'}"
    given = [
        "preset=mini",
        *(f"model.{word}" for word in model),
        *(f"data.{word}" for word in data),
        *(f"train.{word}" for word in how),
        "parallel.dtype=float32",
        *words,
    ]
    return load_recipe(recipe, given)


def on_rank(_group, *given: str) -> None:
    recipe, stores, chats, out, *words = given
    train(small(recipe, Path(stores), Path(chats), *words), Path(out))


RECIPES = "quality", "t2i-sft", "understand1", "understand2"


@pytest.mark.distributed
def test_four_processes_make_the_steps_of_one_with_every_recipe(tmp_path, stores, chats):
    """In their own meshes of shards, and with adapters where tokens are shared."""
    ranks = Ranks(4)
    try:
        for recipe in RECIPES:
            one = small(recipe, stores, chats, "parallel.shard=1")
            train(one, tmp_path / f"{recipe}-1")
            given = recipe, stores, chats, tmp_path / f"{recipe}-4", "parallel.shard=4"
            ranks.run(on_rank, *map(str, given))
            both = (read_metrics(tmp_path / f"{recipe}-{n}/metrics.jsonl") for n in (1, 4))
            for a, b in zip(*both, strict=True):
                assert a["loss"] > 0, recipe
                for name in a:
                    assert b[name] == pytest.approx(a[name], rel=1e-5), (recipe, name)
    finally:
        ranks.close()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_and_learns_what_it_states(tmp_path, stores, chats, recipe):
    """LLaVA's conversations too; a modality of weight 0 has no loss."""
    train(small(recipe, stores, chats, "parallel.shard=1"), tmp_path)
    for step in read_metrics(tmp_path / "metrics.jsonl"):
        only = "vision_loss" if recipe in ("quality", "t2i-sft") else "text_loss"
        assert {"text_loss", "vision_loss"} & step.keys() == {only}
        assert step["loss"] == pytest.approx(step[only], rel=1e-5)
    assert load_decoder(tmp_path / "pretrain.safetensors").settings.num_layers == 1


def test_the_learning_rate_of_quality_tuning_falls_linearly_to_0():
    from emu3.train.optim import learning_rate

    recipe = load_recipe("quality")
    steps, warmup = recipe.train.steps, recipe.optim.warmup_steps
    rates = [learning_rate(step, steps, recipe.optim) for step in (warmup, steps)]
    assert rates == [pytest.approx(1e-5), 0]
    middle = learning_rate((steps + warmup) // 2, steps, recipe.optim)
    assert middle == pytest.approx(recipe.optim.lr / 2)


SCORES = np.array([3, np.nan, 1, 7, 7, -2, np.inf, 5], np.float32)


def scored(tmp_path: Path, **changes) -> SourceSettings:
    if not (tmp_path / "store").exists():
        write_store(tmp_path / "store", [text_document(20 + n, n) for n in range(8)], 3)
        np.save(tmp_path / "scores.npy", SCORES)
    return SourceSettings(store=tmp_path / "store", scores=tmp_path / "scores.npy", **changes)


@pytest.mark.parametrize(
    ("better", "documents"), [(0.5, [3, 4, 6, 7]), (1.0, [0, 2, 3, 4, 5, 6, 7]), (0.01, [6])]
)
def test_the_documents_of_the_highest_scores_are_read(tmp_path, better, documents):
    """A tie goes to the first; what has no score is never read."""
    if better == 0.5:
        better = 4 / 7
    source = scored(tmp_path, better=better)
    settings = StreamSettings(sources=(source,), context=255, batch_size=8, window=16)
    stream = StoreStream(settings, IDS, 0)
    read = {int(number) for w in range(6) for number in stream.rows.window(w).documents}
    assert sorted(read) == documents
    assert stream.rows.tokens == sum(20 + number for number in documents)


def test_a_selection_belongs_to_a_run(tmp_path):
    settings = StreamSettings(sources=(scored(tmp_path),), context=255, batch_size=2)
    state = StoreStream(settings, IDS, 0).state()
    np.save(tmp_path / "scores.npy", np.where(SCORES > 6, np.nan, SCORES))
    with pytest.raises(ValueError, match="a store has changed since this run was saved"):
        StoreStream(settings, IDS, 0).restore(state)


def test_scores_that_do_not_fit_are_told_in_a_line(tmp_path):
    settings = StreamSettings(sources=(scored(tmp_path),), context=255)
    for saved, line in (
        (SCORES[:7], "must have a number for each of the 8 documents of"),
        (np.full(8, np.nan), "has no score but NaN"),
        (np.array(["a"] * 8), "must have a number for each"),
    ):
        np.save(tmp_path / "scores.npy", saved)
        with pytest.raises(ValueError, match=line) as error:
            StoreStream(settings, IDS, 0)
        assert "\n" not in str(error.value)
    (tmp_path / "scores.npy").write_bytes(b"no numbers")
    with pytest.raises(ValueError, match=r"scores.npy is no .npy file of scores"):
        StoreStream(settings, IDS, 0)
    with pytest.raises(SettingsError, match=r"better \(0.5\) needs scores"):
        parse(SourceSettings, {"store": "a", "better": 0.5})


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A voter of the tests."""
    assert len(images) == len(prompts)
    assert images.min() >= 0
    assert images.max() <= 1
    return images.mean((1, 2, 3))


def length(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_images_of_a_store_are_scored_as_they_are_decoded(tmp_path, weights):
    """One voter gives its scores, two the mean of the shares that they put below."""
    captions, sizes = ("a", "bbb", "cc", "dddd"), ((16, 16), (32, 16), (16, 16), (16, 16))
    for number, size in enumerate(sizes):
        write_image(tmp_path / f"{number}.png", picture(number, size))
    records = [{"image": f"{n}.png", "text": words} for n, words in enumerate(captions)]
    lines = jsonl(tmp_path / "a.jsonl", [*records, {"text": "words"}])
    assert prepare([lines], tmp_path / "store", weights).exit_code == 0
    store, vision = Store(tmp_path / "store"), load_vision(weights)
    found = score_store(store, vision, TEXT, [brightness], batch_size=2)
    assert np.isnan(found[4])
    for number in range(4):
        ids = store.shards[0].ids(number)
        codes = torch.from_numpy(ids[ids >= IDS.visual_start] - IDS.visual_start).long()
        image = vision.decode(codes.view(1, -1, 8)) / 2 + 0.5
        assert found[number] == pytest.approx(image.clamp(0, 1).mean().item(), rel=1e-5)
    both = score_store(store, vision, TEXT, [brightness, length])
    below = [np.argsort(np.argsort(values)) / 4 for values in (found[:4], [1, 3, 2, 4])]
    np.testing.assert_allclose(both[:4], np.mean(below, 0))
    other = save_tokenizer_of_another_seed(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has codes of another vision tokenizer"):
        score_store(store, other, TEXT, [length])
    out = tmp_path / "scores.npy"
    voter = "tests.train.test_tuning_data:brightness"
    words = ["--score", out, "--voter", voter, "--vision", weights]
    done = run("store", tmp_path / "store", *words)
    assert done.exit_code == 0, done.output
    assert "wrote 4 scores" in done.stdout
    np.testing.assert_allclose(np.load(out), found, rtol=1e-5)
    done = run("store", tmp_path / "store", "--score", tmp_path / "scores.txt", "--voter", voter)
    assert done.stderr == "emu3: store: --score must end in .npy, with a --voter and a --vision\n"


def save_tokenizer_of_another_seed(path: Path):
    from emu3.vision import VisionTokenizer
    from emu3.weights import save_vision
    from tests.model.tiny import TINY_VISION

    torch.manual_seed(5)
    save_vision(path, VisionTokenizer(TINY_VISION))
    return load_vision(path)


def test_documents_of_conversations_name_their_answers(chats):
    """As ``chat_document`` made them: nothing is lost in the store."""
    shard, at = Store(chats).find(0)
    *spoken, last = [shard.ids(at)[a:b].tolist() for a, b in shard.answers(at)]
    assert list(map(TEXT.decode, spoken)) == [" a cat", " a dog"]
    assert last == [*TEXT.encode(" yes"), IDS.eos]
    made = chat_document([Turn(["x"], "y")], TEXT)
    assert made.answers[-1][1] == len(made.ids)


@pytest.mark.parametrize("recipe", ["quality", "t2i-sft", "understand1", "understand2"])
@pytest.mark.parametrize("words", [(), ("lora.rank=16",)], ids=["full", "lora"])
def test_a_recipe_is_planned_at_8b(recipe, words):
    done = run("train", recipe, "--plan", "--memory", "80", *words)
    assert done.exit_code == 0, done.output
    one = "parallel.shard=1", "parallel.recompute=all"
    alone = run("train", recipe, "--plan", "--memory", "80", *words, *one)
    # One GPU holds float32 weights of 34 GB, but not their gradients and moments too.
    assert alone.exit_code == (0 if words else 1), alone.output
