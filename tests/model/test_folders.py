"""Published folders in three layouts: loaded, saved, read by transformers, and their faults."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Emu3ForConditionalGeneration, Emu3Processor

from emu3.config import load_model
from emu3.model import Emu3
from emu3.prompt import content_ids, generation_prompt
from emu3.templates import grid_of
from emu3.text import ByteTokenizer, QwenTokenizer
from emu3.vision import VisionTokenizer, preprocess
from emu3.weights import (
    Pretrained,
    files,
    load,
    load_decoder,
    load_vision,
    save,
    save_decoder,
    save_vision,
)
from emu3.weights import folders as published
from emu3.weights import processor as processor_files
from emu3_kernels.testing.budget import assert_as_accurate
from tests import fresh
from tests.model.published import SMALL, SMALL_8B
from tests.model.test_weights import assert_same_state
from tests.model.tiny import TINY_VISION, tiny_model
from tests.model.vision_parts import random_tokenizer

LAYOUTS = ("official", "hub", "runtime")
PIXELS = 64 * 64


@pytest.fixture(scope="module")
def made():
    """Emu3's vocabulary and every part, at a hundredth of the width."""
    torch.manual_seed(0)
    model = Emu3(load_model("8b", SMALL_8B)).eval()
    return Pretrained(model, random_tokenizer(SMALL), QwenTokenizer())


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory):
    """In shards of about 8 MB; the processor is converted once, since it takes seconds."""
    root = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "_SHARD", 8 << 20)
        save(root / "official", made, "official")
        save(root / "hub", made, "hub")
        patch.setattr(processor_files, "save_processor", lambda folder, text: None)
        save(root / "runtime", made, "runtime")
    shutil.copy(root / "hub/tokenizer.json", root / "runtime")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_any_layout_comes_back_bit_for_bit(layout, folders, made):
    loaded = load(folders / layout)
    assert len(list((folders / layout).glob("model-*.safetensors"))) > 1
    assert loaded.model.settings == made.model.settings
    assert_same_state(made.model, loaded.model)
    assert_same_state(made.vision, loaded.vision)
    assert loaded.text.encode("Zwölf 12") == made.text.encode("Zwölf 12")
    assert not loaded.model.training


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_headers_of_a_model_are_read_once(layout, folders, monkeypatch):
    """In one of the layouts the decoder's files have the vision tokenizer's weights too."""
    found, init = [], files.Stored.__init__

    def noting(self, file, name, *rest):
        found.append((file.path, name))
        init(self, file, name, *rest)

    monkeypatch.setattr(files.Stored, "__init__", noting)
    load(folders / layout)
    assert found
    assert len(found) == len(set(found))


def test_weights_are_rounded_once_to_the_dtype_asked_for(folders, made):
    """The vision tokenizer keeps its own, so that codes stay what they are."""
    loaded = load(folders / "official", dtype=torch.bfloat16)
    assert loaded.model.head.weight.equal(made.model.head.weight.bfloat16())
    assert loaded.model.rotate.cos.dtype == torch.float32
    assert loaded.model.rotate.cos.equal(made.model.rotate.cos)
    assert_same_state(made.vision, loaded.vision)
    narrow = load_vision(folders / "hub", dtype=torch.bfloat16)
    assert narrow.decoder.conv_in.weight.dtype == torch.bfloat16


def test_files_may_be_read_by_others(folders):
    """safetensors leaves a file to its owner alone."""
    config, *shards = (folders / "hub/config.json", *(folders / "hub").glob("*.safetensors"))
    assert {path.stat().st_mode for path in shards} == {config.stat().st_mode}


@pytest.fixture(scope="module")
def theirs(folders):
    model, found = Emu3ForConditionalGeneration.from_pretrained(
        folders / "runtime", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(scope="module")
def processor(folders):
    made = Emu3Processor.from_pretrained(folders / "hub")
    made.image_processor.min_pixels = PIXELS
    return made


def photographs(count):
    chosen = torch.Generator().manual_seed(0)
    shapes = [(64, 64, 3), (56, 96, 3)]
    return [torch.randint(256, shapes[n], generator=chosen).byte().numpy() for n in range(count)]


@pytest.mark.parametrize("count", [*(pytest.param(n, marks=pytest.mark.e2e) for n in (0, 1)), 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_equal_hugging_face_s_with_text_and_images(count, dtype, made, theirs, processor):
    """Ours encode the images one by one; theirs get pixels and placeholders."""
    images = photographs(count)
    words = "USER: " + "<image>" * count + "What is this? ASSISTANT:"
    inputs = processor(text=[words], images=images or None, return_tensors="pt")
    if count == 2:  # padded images are encoded with their padding: one at a time is exact
        parts = [processor(text=["<image>"], images=[one], return_tensors="pt") for one in images]
    else:
        parts = [inputs] * count
    codes = [made.vision.encode(preprocess(one, min_pixels=PIXELS)[None])[0] for one in images]
    ids = made.text.vocabulary
    grammar = ["USER: ", *codes, "What is this? ASSISTANT:"]
    tokens = torch.tensor([[ids.bos, *content_ids(grammar, made.text)]])
    filled = inputs["input_ids"].clone()
    found = [theirs.model.get_image_tokens(p["pixel_values"], p["image_sizes"]) for p in parts]
    if found:
        filled[filled == theirs.model.vocabulary_mapping.image_token_id] = torch.cat(found).long()
    assert tokens.equal(filled)
    low_model = copy.deepcopy(theirs).to(dtype)
    low = low_model(filled).logits[0]
    exact = low_model.double()(filled).logits[0]
    model = copy.deepcopy(made.model).to(dtype)
    ours = model.logits(model(tokens)[0], slice(None))
    assert_as_accurate("logits", ours, low, exact)


def test_prompts_equal_their_processor_s(made, processor):
    for ratio, area in (("1:1", 720 * 720), ("16:9", 720 * 720), ("3:4", 512 * 512)):
        words = "a portrait of a young girl. masterpiece, film grained, best quality."
        settings = {"return_for_image_generation": True, "ratio": ratio, "image_area": area}
        expected = processor(text=[words], **settings)["input_ids"][0]
        assert generation_prompt(words, grid_of(ratio, area), made.text) == expected


@pytest.mark.e2e
def test_loading_takes_no_second_copy_of_the_model(folders):
    """The peak of a process, with pieces of 1 MiB for weights of 24 MB."""
    done = fresh.run(
        f"from {__name__} import growth; print(*growth({str(folders / 'official')!r}))"
    )
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    assert peak <= 1.1 * size + (4 << 20), f"{peak / size:.2f} times the model"


def growth(folder):
    """Bytes of a decoder in bfloat16, and by how many loading it raises the peak of the process."""
    files._PIECE, folder = 1 << 20, Path(folder)
    load_decoder(folder, dtype=torch.bfloat16)
    status = Path("/proc/self/status")

    def bytes_of(name):
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")
    before = bytes_of("VmRSS")
    model = load_decoder(folder, dtype=torch.bfloat16)
    size = sum(weight.nbytes for weight in model.parameters())
    return size, bytes_of("VmHWM") - before


def edited(source, target, **changes):
    """A copy of an official folder with other entries in its config.json; None removes one."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"vocab_size": 184621}, "vocab_size must be 184622, got 184621"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false, got True"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling must be null, got {'type': 'yarn'}"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be null"),
        ({"hidden_act": "gelu"}, "hidden_act must be \"silu\", got 'gelu'"),
        ({"hidden_size": None}, "lacks a size of the decoder: 'hidden_size'"),
        ({"num_key_value_heads": 3}, "num_heads .4. must be a multiple of num_kv_heads"),
        ({"intermediate_size": 64}, r"down_proj.weight is \(32, 48\), expected \(32, 64\)"),
        ({"num_hidden_layers": 3}, "it lacks model.layers.2.self_attn.q_proj.weight and 8 more"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight has no place here"),
    ],
)
def test_a_folder_of_another_model_gives_one_line(changes, line, folders, tmp_path):
    folder = edited(folders / "official", tmp_path / "edited", **changes)
    with pytest.raises(ValueError, match=line) as error:
        load_decoder(folder)
    assert "\n" not in str(error.value)


def test_damaged_folders_give_one_line(folders, made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders / "official", folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a safetensors file"):
        load(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=f"no file {shard}, which"):
        load(folder)
    shard.write_bytes(whole)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json is not a JSON object"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no decoder"):
        load(folder)


def test_weights_of_few_bits_are_refused(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders / "official", folder)
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    with safe_open(shard, "pt") as file:
        name = next(iter(file.keys()))
    save_file(load_file(shard) | {name: load_file(shard)[name].to(torch.int8)}, shard)
    with pytest.raises(ValueError, match=rf"{name} must be floats of 16 bits or more, got I8"):
        load_decoder(folder)


def test_a_vision_tokenizer_is_found_beside_the_decoder_or_asked_for(folders, made, tmp_path):
    folder = tmp_path / "Emu3-Gen"
    shutil.copytree(folders / "official", folder)
    (folder / "Emu3-VisionTokenizer").rename(tmp_path / "Emu3-VisionTokenizer")
    assert_same_state(made.vision, load(folder).vision)
    (tmp_path / "Emu3-VisionTokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"must hold a vision tokenizer.*name its folder"):
        load(folder)
    assert_same_state(made.vision, load(folder, vision=tmp_path / "elsewhere").vision)


def test_what_was_trained_here_loads_too(tmp_path):
    save_decoder(tmp_path / "decoder.safetensors", tiny_model())
    save_vision(tmp_path / "vision.safetensors", VisionTokenizer(TINY_VISION))
    loaded = load(tmp_path / "decoder.safetensors")
    assert isinstance(loaded.text, ByteTokenizer)
    with pytest.raises(ValueError, match="got a decoder of bytes"):
        save(tmp_path / "out", loaded, "official")


def test_a_folder_with_weights_is_not_written_over(folders, made):
    with pytest.raises(ValueError, match="must hold no weights, got some"):
        save(folders / "official", made, "official")
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'tar'"):
        save(folders / "new", made, "tar")
