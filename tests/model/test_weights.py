"""Checkpoints: there and back, foreign names, and one clear line for a wrong file."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from emu3.files import replacing
from emu3.vision import VisionTokenizer
from emu3.weights import (
    files,
    load_decoder,
    load_decoder_into,
    load_vision,
    official_views,
    save_decoder,
    save_vision,
)
from tests.model.tiny import TINY, TINY_VISION, tiny_model
from tests.model.vision_parts import SMALL, random_tokenizer


def test_a_decoder_comes_back_bit_for_bit(tmp_path):
    model = tiny_model()
    save_decoder(tmp_path / "decoder.safetensors", model)
    again = load_decoder(tmp_path / "decoder.safetensors")
    assert again.settings == TINY
    assert not again.training
    assert_same_state(model, again)


def test_settings_are_read_under_the_names_of_older_files(tmp_path):
    model, tokenizer = tiny_model(), VisionTokenizer(TINY_VISION)
    former = {new: old for names in files.FORMER_NAMES.values() for old, new in names.items()}
    settings = {"decoder": TINY, "vision": TINY_VISION}
    told = {
        part: json.dumps({former.get(k, k): v for k, v in s.model_dump(mode="json").items()})
        for part, s in settings.items()
    }
    assert '"ff_width"' in told["decoder"]
    assert '"revive_below"' in told["vision"]
    weights = {name: view.clone() for name, view in official_views(model).items()}
    save_file(weights, tmp_path / "decoder.safetensors", metadata=told)
    save_vision(tmp_path / "new.safetensors", tokenizer)
    tensors = load_file(tmp_path / "new.safetensors")
    save_file(tensors, tmp_path / "vision.safetensors", metadata=told)
    assert_same_state(model, load_decoder(tmp_path / "decoder.safetensors"))
    assert load_vision(tmp_path / "vision.safetensors").settings == TINY_VISION


def test_a_disk_that_takes_no_more_is_told_in_one_line(tmp_path, monkeypatch):
    """safetensors has an exception of its own for it, which the command line does not know."""

    def refuse(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: File too large")

    monkeypatch.setattr(files, "save_file", refuse)
    path = tmp_path / "vision.safetensors"
    with pytest.raises(OSError, match=f"weights: cannot write {path}: .*too large"):
        save_vision(path, VisionTokenizer(TINY_VISION))
    assert list(tmp_path.iterdir()) == []


def test_a_vision_tokenizer_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(TINY_VISION)
    save_vision(tmp_path / "vision.safetensors", tokenizer)
    again = load_vision(tmp_path / "vision.safetensors")
    assert again.settings == TINY_VISION
    assert_same_state(tokenizer, again)


@pytest.mark.parametrize("layout", ["official", "huggingface"])
@pytest.mark.parametrize("prefix", ["", "vqmodel.", "model.vqmodel."])
def test_a_vision_tokenizer_in_any_layout_comes_back_bit_for_bit(layout, prefix, tmp_path):
    """Without metadata, in two shards, and beside a decoder if it stands behind a prefix."""
    tokenizer = random_tokenizer(SMALL)
    save_vision(tmp_path / "own.safetensors", tokenizer, layout=layout)
    tensors = {prefix + name: v for name, v in load_file(tmp_path / "own.safetensors").items()}
    if prefix:
        tensors["lm_head.weight"] = torch.zeros(2, 2)
    (tmp_path / "own.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:99], names[99:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{number}.safetensors")
    for source in (tmp_path, str(tmp_path), tensors):
        again = load_vision(source)
        assert again.settings == SMALL
        assert not again.training
        assert_same_state(tokenizer, again)


def test_a_shard_of_text_alone_is_passed_over(tmp_path):
    """It was taken for the tokenizer: what stands behind the prefix was sought shard by shard."""
    tokenizer = random_tokenizer(SMALL)
    own = tokenizer.state_dict()
    tensors = {f"model.vqmodel.{name}": v.contiguous() for name, v in own.items()}
    save_file({"model.text_model.norm.weight": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file(tensors, tmp_path / "2.safetensors")
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "3.safetensors")
    assert_same_state(tokenizer, load_vision(tmp_path))


def test_the_file_has_the_official_names_of_the_vision_tokenizer(tmp_path):
    save_vision(tmp_path / "vision.safetensors", VisionTokenizer(SMALL))
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "vision.safetensors").items()}
    assert len(shapes) == 495
    assert shapes["encoder.down.3.attn.1.proj_out.weight"] == (128, 128, 1, 1)
    assert shapes["encoder.time_res_stack.1.norm2.num_batches_tracked"] == ()
    assert shapes["decoder.up.3.attn.2.norm.conv_y.weight"] == (128, 4, 1, 1)
    assert shapes["quant_conv.conv.weight"] == (4, 4, 3, 1, 1)


def test_weights_keep_their_dtype_and_convolutions_their_memory_format(tmp_path):
    save_vision(tmp_path / "vision.safetensors", VisionTokenizer(SMALL).bfloat16())
    again = load_vision(tmp_path / "vision.safetensors")
    weight = again.decoder.up[0].block[1].conv1.weight
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_running_means_start_again_at_the_codebook(tmp_path):
    tokenizer = VisionTokenizer(TINY_VISION)
    tokenizer.quantize.cluster_size.fill_(7.0)
    save_vision(tmp_path / "vision.safetensors", tokenizer)
    again = load_vision(tmp_path / "vision.safetensors").quantize
    assert again.cluster_size.eq(1.0).all()
    assert again.sums.equal(tokenizer.codebook)


def test_all_faults_of_a_vision_file_are_named_in_one_line():
    tensors = dict(VisionTokenizer(SMALL).state_dict())
    del tensors["encoder.mid.block_1.conv1.bias"], tensors["decoder.conv_out.weight"]
    tensors["encoder.extra"] = torch.zeros(1)
    tensors["decoder.conv_in.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="does not fit the vision tokenizer") as fault:
        load_vision(tensors)
    for part in (
        "missing encoder.mid.block_1.conv1.bias, decoder.conv_out.weight",
        "unexpected encoder.extra",
        "of another shape decoder.conv_in.bias (3,) for (128,)",
    ):
        assert part in str(fault.value)
    assert "\n" not in str(fault.value)
    with pytest.raises(ValueError, match=r"missing encoder\.conv_in\.weight"):
        load_vision({"lm_head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="layout must be official or huggingface, got 'mine'"):
        save_vision("none.safetensors", VisionTokenizer(TINY_VISION), layout="mine")


CODEBOOK, FIRST = "quantize.embedding.weight", "encoder.conv_in.weight"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (CODEBOOK, torch.ones(512, 4).long(), r"or more, \[N, D\], got torch.int64 \(512, 4\)"),
        (
            CODEBOOK,
            torch.ones(512),
            r"must be floats of 16 bits or more, \[N, D\], got torch.float32 \(512,\)",
        ),
        (CODEBOOK, torch.ones(0, 4), "num_codes: Input should be greater than 0, got 0"),
        (
            CODEBOOK,
            torch.ones(512, 4).to(torch.float8_e4m3fn),
            r"got torch.float8_e4m3fn \(512, 4\)",
        ),
        (FIRST, torch.ones(0, 3, 3, 3), "base_channels: Input should be greater than 0, got 0"),
        (FIRST, torch.ones(()), "base_channels: Input should be greater than 0, got 0"),
        (FIRST, torch.ones(24, 3, 3, 3), r"groups \(32\) must divide every width of \(24, "),
        (FIRST, torch.ones(64, 3, 3, 3), "multipliers.0: Input should be greater than 0, got 0"),
    ],
)
def test_tensors_of_no_possible_shape_give_one_line(name, value, line):
    tensors = {**VisionTokenizer(SMALL).state_dict(), name: value}
    with pytest.raises(ValueError, match=line) as fault:
        load_vision(tensors)
    assert str(fault.value).startswith(
        "weights: the state dict does not fit the vision tokenizer: "
    )
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ("{", "Expecting property name"),
        ("3", "Input should be a valid dictionary"),
        ('{"groups": 0}', "groups: Input should be greater than 0, got 0"),
    ],
)
def test_damaged_metadata_give_one_line_that_names_the_file(told, line, tmp_path):
    path = tmp_path / "vision.safetensors"
    save_file({CODEBOOK: torch.ones(2, 2)}, path, metadata={"vision": told})
    with pytest.raises(ValueError, match=line) as fault:
        load_vision(path)
    assert str(fault.value).startswith(f"weights: {path}: metadata vision: ")
    assert "\n" not in str(fault.value)


def test_the_file_has_the_official_layout(tmp_path):
    save_decoder(tmp_path / "decoder.safetensors", tiny_model())
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "decoder.safetensors").items()}
    assert shapes["model.embed_tokens.weight"] == (776, 48)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (64, 48)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (32, 48)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (80, 48)
    assert len(shapes) == 3 + 9 * TINY.num_layers


@pytest.mark.parametrize("layout", ["text_model.model", "model.text_model"])
def test_hugging_face_layouts_in_shards_load_and_their_vision_part_is_passed_over(layout, tmp_path):
    """``text_model.*`` is how the hub files are written, ``model.text_model.*`` the runtime."""
    model = tiny_model(seed=1)
    tensors = {
        name.replace("model.", f"{layout}.", 1)
        if name.startswith("model.")
        else (f"text_model.{name}" if layout.startswith("text") else name): view.clone()
        for name, view in official_views(model).items()
    }
    vision = "vqmodel." if layout.startswith("text") else "model.vqmodel."
    tensors[f"{vision}quantize.embedding.weight"] = torch.zeros(2, 2)
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{number}.safetensors")
    again = tiny_model(seed=2)
    load_decoder_into(again, tmp_path)
    assert_same_state(model, again)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"intermediate_size": 64}, r"down_proj.weight is \(48, 80\), expected \(48, 64\)"),
        ({"num_layers": 1}, r"model.layers.1.input_layernorm.weight has no place here"),
        ({"num_layers": 3}, r"it lacks model.layers.2.self_attn.q_proj.weight and 8 more"),
    ],
)
def test_a_checkpoint_of_another_configuration_gives_one_line(changes, line, tmp_path):
    save_decoder(tmp_path / "decoder.safetensors", tiny_model())
    with pytest.raises(ValueError, match=line) as fault:
        load_decoder_into(tiny_model(**changes), tmp_path / "decoder.safetensors")
    assert "of another configuration" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_files_that_are_no_checkpoint_give_one_line(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not tensors")
    save_vision(tmp_path / "vision.safetensors", VisionTokenizer(TINY_VISION))
    for path, line in [
        (broken, "is not a safetensors file"),
        (tmp_path / "none.safetensors", "weights: no file"),
        (tmp_path / "vision.safetensors", "holds no decoder; it holds vision"),
    ]:
        with pytest.raises(ValueError, match=line) as fault:
            load_decoder(path)
        assert "\n" not in str(fault.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_decoder_into(tiny_model(), tmp_path / "empty")


def sharded(folder, tokenizer, parts=2):
    """The folder of a hub: shards without metadata of ours, and their index."""
    folder.mkdir()
    tensors = {name: value.contiguous() for name, value in tokenizer.state_dict().items()}
    shards = {
        f"model-{n + 1}-of-{parts}.safetensors": sorted(tensors)[n::parts] for n in range(parts)
    }
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    places = {name: file for file, names in shards.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return tensors


def test_a_folder_is_read_without_what_its_index_does_not_name_and_hidden_files(tmp_path):
    """macOS leaves ``._name`` beside each file it copies: "header too large"."""
    tokenizer = random_tokenizer(SMALL)
    tensors = sharded(tmp_path / "hub", tokenizer)
    (tmp_path / "hub/._model-1-of-2.safetensors").write_bytes(b"\0\5\26\7Mac OS X")
    (tmp_path / "hub/._model.safetensors.index.json").write_bytes(b"\0\5\26\7Mac OS X")
    assert_same_state(tokenizer, load_vision(tmp_path / "hub"))
    save_file(tensors, tmp_path / "hub/model.safetensors")
    assert_same_state(tokenizer, load_vision(tmp_path / "hub"))


def test_a_missing_shard_is_the_file_that_the_index_names(tmp_path):
    """It was a missing tensor."""
    sharded(tmp_path / "hub", VisionTokenizer(SMALL), parts=3)
    missing = tmp_path / "hub/model-2-of-3.safetensors"
    missing.unlink()
    line = f"weights: no file {missing}, which model.safetensors.index.json names"
    with pytest.raises(ValueError, match=f"^{line}$"):
        load_vision(tmp_path / "hub")
    with pytest.raises(ValueError, match=f"^{line}$"):
        load_decoder_into(tiny_model(), tmp_path / "hub")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{", b"[]", b"{}", b'{"weight_map": 3}'])
def test_a_damaged_index_is_named(content, tmp_path):
    sharded(tmp_path / "hub", VisionTokenizer(SMALL))
    index = tmp_path / "hub/model.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(ValueError, match=f"^weights: {index} is not an index of shards$"):
        load_vision(tmp_path / "hub")


def test_the_folder_of_a_run_tells_which_file_is_meant(tmp_path):
    """Its checkpoint, with other tensors, was read too: "groups (32) must divide …"."""
    save_vision(tmp_path / "vision.safetensors", VisionTokenizer(TINY_VISION))
    save_file({"step": torch.ones(1)}, tmp_path / "checkpoint.safetensors")
    line = f"is the folder of a training run; its weights are {tmp_path}/vision.safetensors"
    with pytest.raises(ValueError, match=line):
        load_vision(tmp_path)
    with pytest.raises(ValueError, match=line):
        load_decoder(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    """A run that diverged was loaded, and every image got code 0."""
    tokenizer, model = VisionTokenizer(TINY_VISION), tiny_model()
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight[-1, 2, 1, 0] = value
        model.blocks[1].mlp.gate_up.weight[-1, 3] = value
    save_vision(tmp_path / "vision.safetensors", tokenizer)
    save_decoder(tmp_path / "decoder.safetensors", model)
    for load, part, name in (
        (load_vision, "vision", "decoder.conv_out.weight"),
        (load_decoder, "decoder", "model.layers.1.mlp.up_proj.weight"),
    ):
        path = tmp_path / f"{part}.safetensors"
        line = f"^weights: {path}: {name} must be finite in torch.float32, got NaN or inf$"
        with pytest.raises(ValueError, match=line):
            load(path)


def test_weights_too_large_for_the_dtype_of_the_model_are_refused(tmp_path):
    """They were rounded to infinity."""
    model = tiny_model()
    with torch.no_grad():
        model.norm[5] = 1e6
    save_decoder(tmp_path / "decoder.safetensors", model)
    load_decoder_into(tiny_model().bfloat16(), tmp_path / "decoder.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight must be finite in torch.float16"):
        load_decoder_into(tiny_model().half(), tmp_path / "decoder.safetensors")


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    """The draft's was longer."""
    for target in (tmp_path / f"{'n' * 250}.json", tmp_path / "x.json"):
        with replacing(target) as draft:
            draft.write_text("whole")
        assert target.read_text() == "whole"
        assert draft.parent.parent == tmp_path
        assert draft.parent.name.startswith(".")
        assert draft.suffix == ".json"


def write_half(path):
    with replacing(path) as draft:
        draft.write_text("half of the n")
        (path.parent / "none").read_text()


def assert_same_state(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
