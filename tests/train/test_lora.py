"""LoRA adapters and frozen weights as settings of a training from token stores."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emu3.config import EMU3_VOCABULARY, load_model
from emu3.data.store import Document, Kind, write_shard
from emu3.model import Emu3
from emu3.settings import SettingsError
from emu3.tasks import load_recipe
from emu3.text import QwenTokenizer
from emu3.train import lora, pretrain
from emu3.train.metrics import read_metrics
from emu3.train.pretrain_loop import pretrain as train
from emu3.weights import Pretrained, load_decoder, official_views, save, save_decoder
from emu3.weights import processor as processor_files
from emu3.weights.adapter import read_adapter
from emu3.weights.hub import decoder_config
from emu3_kernels.testing.budget import assert_as_accurate
from tests.model.published import SMALL, SMALL_8B
from tests.model.vision_parts import random_tokenizer
from tests.ranks import Ranks
from tests.train.pretraining import tiny, write_data
from tests.train.stores import MADE

peft = pytest.importorskip("peft")

LORA = ["lora.rank=4", "lora.alpha=8", "train.steps=4", "optim.lr=1e-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stores, and weights to start from."""
    folder = tmp_path_factory.mktemp("lora")
    write_data(folder)
    torch.manual_seed(0)
    save_decoder(folder / "start.safetensors", Emu3(tiny(folder).model))
    return folder


def from_start(folder: Path, *words: str):
    return tiny(folder, f"train.start={folder / 'start.safetensors'}", *words)


@pytest.fixture(scope="module")
def tuned(folder):
    """An unbroken run of four steps, with dropout before the adapters."""
    train(from_start(folder, *LORA, "lora.dropout=0.1"), folder / "tuned")
    return folder / "tuned"


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def test_adapters_alone_are_trained_and_merged_into_the_weights(folder, tuned):
    """In float32: W + alpha / rank * B A of the adapters that are written beside them."""
    start, after = (
        weights_of(p) for p in (folder / "start.safetensors", tuned / "pretrain.safetensors")
    )
    adapters = weights_of(tuned / "adapter/adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in adapters.values())
    changed = {name for name, value in after.items() if not value.equal(start[name])}
    assert changed == {name for name in start if "_proj" in name}
    for name in changed:
        module = name.replace("model.layers", "model.text_model.layers").removesuffix(".weight")
        down, up = (adapters[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert up.abs().max() > 0
        torch.testing.assert_close(after[name], start[name] + 2 * up @ down)
    losses = [step["loss"] for step in read_metrics(tuned / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_packed_projections_share_what_they_read(tuned):
    adapters = weights_of(tuned / "adapter/adapter_model.safetensors")
    layer = "base_model.model.model.text_model.layers.0"
    for parts in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
        first, *others = (adapters[f"{layer}.{part}_proj.lora_A.weight"] for part in parts)
        assert all(other.equal(first) for other in others)


class Killed(Exception):
    """Ends a run where a kill would."""


def test_a_run_with_adapters_continues_as_if_it_never_was_killed(
    folder, tuned, tmp_path, monkeypatch
):
    """Also without the weights that it started from."""
    step = pretrain.Pretraining.step

    def killed(self, now, batches):
        if now == 3:
            raise Killed
        return step(self, now, batches)

    monkeypatch.setattr(pretrain.Pretraining, "step", killed)
    with pytest.raises(Killed):
        train(from_start(folder, *LORA, "lora.dropout=0.1"), tmp_path)
    monkeypatch.undo()
    train(tiny(folder, *LORA, "lora.dropout=0.1"), tmp_path, resume=True)
    for name in ("metrics.jsonl", "pretrain.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tuned / name).read_bytes(), name


def test_activations_that_are_computed_again_drop_the_same(folder, tuned, tmp_path):
    train(from_start(folder, *LORA, "lora.dropout=0.1", "parallel.recompute=all"), tmp_path)
    same_curve(tmp_path, tuned)


def test_dropout_is_of_the_adapters_input(folder, tuned, tmp_path):
    """Other losses than without; the first one is the same, as B is 0."""
    train(from_start(folder, *LORA), tmp_path)
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (tmp_path, tuned))
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert found[-1]["loss"] != pytest.approx(expected[-1]["loss"], rel=1e-5)


def test_frozen_weights_stay_as_they_are(folder, tmp_path):
    words = ['train.freeze=["embedding.*", "*.mlp.*", "norm"]', "train.steps=2"]
    train(from_start(folder, *words), tmp_path)
    start, after = (
        weights_of(p) for p in (folder / "start.safetensors", tmp_path / "pretrain.safetensors")
    )
    same = {name for name, value in after.items() if value.equal(start[name])}
    frozen = "embed_tokens", "mlp", "model.norm"
    assert same == {name for name in start if any(part in name for part in frozen)}


def same_curve(found: Path, expected: Path) -> None:
    pairs = zip(*(read_metrics(run / "metrics.jsonl") for run in (found, expected)), strict=True)
    for a, b in pairs:
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=2e-5), name


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def on_rank(_group, folder: str, out: str, words: list[str]) -> None:
    train(from_start(Path(folder), *words), Path(out))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "words",
    [
        ["lora.dropout=0.1", "parallel.shard=4"],
        ["lora.dropout=0.1", "parallel.context=2", "parallel.replicate=2"],
        ["parallel.shard=2", "parallel.tensor=2", "train.micro_batch_size=2"],
        ["parallel.tensor=4"],
    ],
    ids=" ".join,
)
def test_four_processes_train_the_adapters_of_one(ranks, folder, tuned, tmp_path, words):
    """Losses, norms, and the weights at the end."""
    alone = tuned
    if "lora.dropout=0.1" not in words:
        alone = tmp_path / "alone"
        train(from_start(folder, *LORA), alone)
    ranks.run(on_rank, str(folder), str(tmp_path / "many"), [*LORA, *words])
    same_curve(tmp_path / "many", alone)
    for name in ("pretrain.safetensors", "adapter/adapter_model.safetensors"):
        found, expected = (weights_of(run / name) for run in (tmp_path / "many", alone))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.distributed
def test_four_processes_leave_frozen_weights_alone(ranks, folder, tmp_path):
    words = ['train.freeze=["embedding.*", "blocks.*", "norm"]', "train.steps=3"]
    train(from_start(folder, *words), tmp_path / "alone")
    mesh = ["parallel.shard=2", "parallel.tensor=2"]
    ranks.run(on_rank, str(folder), str(tmp_path / "many"), [*words, *mesh])
    same_curve(tmp_path / "many", tmp_path / "alone")
    found = weights_of(tmp_path / "many/pretrain.safetensors")
    start = weights_of(folder / "start.safetensors")
    assert {name for name in start if not found[name].equal(start[name])} == {"lm_head.weight"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model with Emu3's vocabulary: its official file, Hugging Face's folder, and a store."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = Emu3(load_model("8b", SMALL_8B)).eval()
    save_decoder(folder / "start.safetensors", model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor_files, "save_processor", lambda folder, text: None)
        loaded = Pretrained(model, random_tokenizer(SMALL), QwenTokenizer())
        save(folder / "huggingface", loaded, "runtime")
    ids = EMU3_VOCABULARY
    words = np.random.default_rng(0).integers(0, ids.num_text, (8, 40))
    made = MADE.model_copy(update={"vocabulary": ids})
    documents = [Document([ids.bos, *row.tolist(), ids.eos], Kind.TEXT) for row in words]
    write_shard(folder / "store/shard", documents, made)
    return folder


@pytest.mark.e2e
@torch.no_grad()
def test_peft_loads_the_adapters_into_hugging_face_s_model(published, tmp_path):
    """Logits of PEFT's model, of our merge at load, and of the weights that the run wrote."""
    from transformers import Emu3ForConditionalGeneration

    recipe = load_recipe(
        "understand2",
        [
            *(f"model.{word}" for word in SMALL_8B),
            *(f"train.{word}" for word in ("steps=3", "device=cpu", "save_every=9")),
            f"train.start={published / 'start.safetensors'}",
            f'data.sources=[{{store="{published / "store"}"}}]',
            *(f"data.{word}" for word in ("context=64", "batch_size=2", "workers=0")),
            "data.smallest_piece=16",
            *(
                "parallel.shard=1",
                "parallel.dtype=float32",
                "optim.lr=0.05",
                "optim.warmup_steps=0",
            ),
            *("lora.rank=4", 'lora.targets=["qkv", "gate_up", "down"]'),
        ],
    )
    with torch.enable_grad():
        weights = train(recipe, tmp_path)
    tokens = torch.arange(1, 30).view(1, -1)
    ours = load_decoder(weights)
    logits = ours.logits(ours(tokens), slice(None))
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.base_of(None) == published / "start.safetensors"
    for base in (published / "start.safetensors", published / "huggingface"):
        at_load = load_decoder(base, adapter=adapter)
        torch.testing.assert_close(at_load.logits(at_load(tokens), slice(None)), logits)
    theirs = Emu3ForConditionalGeneration.from_pretrained(published / "huggingface").eval()
    plain = theirs(tokens).logits
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    low, exact = model(tokens).logits, model.double()(tokens).logits
    assert_as_accurate("logits", logits, low, exact)
    assert (plain - exact).abs().max() > 0.01 * exact.abs().max()
    found = {n for n, _ in model.named_parameters() if "lora_A" in n}
    assert len(found) == 2 * 6  # q, k, v, gate, up, down, and none of the vision tokenizer's


@torch.no_grad()
def test_official_names_are_those_of_the_decoder_s_own_class(folder, tmp_path):
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    with torch.enable_grad():
        weights = train(from_start(folder, *LORA, "lora.names=official"), tmp_path)
    start, ours = load_decoder(folder / "start.safetensors"), load_decoder(weights)
    sizes = decoder_config(start.settings)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    sizes |= {"vocab_size": start.settings.vocabulary.size, "rope_parameters": rope}
    theirs = Emu3ForCausalLM(Emu3TextConfig(**sizes)).eval()
    theirs.load_state_dict(official_views(start))
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    tokens = torch.arange(1, 30).view(1, -1)
    low, exact = model(tokens).logits, model.double()(tokens).logits
    assert_as_accurate("logits", ours.logits(ours(tokens), slice(None)), low, exact)
    plain = start.logits(start(tokens), slice(None))
    assert (plain - exact).abs().max() > 0.01 * exact.abs().max()


def refused(call) -> str:
    with pytest.raises((ValueError, SettingsError)) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_adapted_or_frozen_is_told_in_a_line(folder, tmp_path, monkeypatch):
    for words, line in (
        (['lora.targets=["qkv", "head"]'], "head cannot have an adapter: the loss reads its"),
        (['lora.targets=["q_proj"]'], "must be of qkv, out, gate_up, down, unlike 'q_proj'"),
        (["lora.rank=2", 'train.freeze=["norm"]'], "train.freeze must be empty with lora"),
        (
            ["lora.dropout=0.1", "parallel.tensor=2"],
            "lora.dropout must be 0 with parallel.tensor (2) above 1",
        ),
    ):
        assert line in refused(lambda words=words: tiny(folder, *words))
    assert refused(lambda: tiny(folder, "lora.rang=2")) == (
        "lora.rang: unknown setting; lora has alpha, dropout, names, rank, targets"
    )
    for words, line in (
        (["lora.rank=2"], "lora: train.start (--from) must name the weights it adapts"),
        (['train.freeze=["head"]'], "train: freeze must name weights, such as norm, embedding"),
        (['train.freeze=["*"]'], "train: freeze must leave some weights to train, got all"),
    ):
        recipe = tiny(folder, *words)
        found = refused(lambda recipe=recipe: train(recipe, tmp_path / "run"))
        assert found.startswith(line)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    found = refused(lambda: train(from_start(folder, *LORA), tmp_path / "run"))
    assert found == "lora: PEFT is not installed: pip install 'emu3-kernels[lora]'"


def test_a_decoder_with_adapters_is_not_saved_without_them(folder, tmp_path):
    with torch.device("meta"):
        model = Emu3(tiny(folder).model)
    lora.add_adapters(model, lora.LoraSettings())
    line = "weights: a decoder with adapters must be merged first"
    assert refused(lambda: save_decoder(tmp_path / "a.safetensors", model)) == line
    assert not list(tmp_path.iterdir())


def test_another_adapter_does_not_continue_a_run(folder, tuned, tmp_path):
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    words = [*LORA, "lora.dropout=0.1", "lora.rank=2", "lora.names=official"]
    found = refused(lambda: train(from_start(folder, *words), run, resume=True))
    assert found.endswith("belongs to another recipe: lora.rank was 4, is 2")
    words = ["train.steps=4", "optim.lr=1e-2"]
    found = refused(lambda: train(from_start(folder, *words), run, resume=True))
    assert "belongs to another recipe: lora was rank=4" in found
    assert found.endswith(", is not there")


def test_the_config_of_an_adapter_names_its_settings(folder, tuned):
    config = json.loads((tuned / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["base_model_name_or_path"] == str(folder / "start.safetensors")
    assert peft.LoraConfig.from_pretrained(tuned / "adapter").r == 4
