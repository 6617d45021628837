"""LoRA adapters of PEFT, merged as they are loaded, against PEFT's own merge."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Emu3ForConditionalGeneration

from emu3.config import load_model
from emu3.model import Emu3
from emu3.text import QwenTokenizer
from emu3.weights import Pretrained, load, load_decoder, save
from emu3.weights import processor as processor_files
from emu3.weights.adapter import read_adapter
from emu3_kernels.testing.budget import assert_as_accurate
from tests.model.published import SMALL, SMALL_8B
from tests.model.vision_parts import random_tokenizer

peft = pytest.importorskip("peft")

SETTINGS = {
    "r": 4,
    "lora_alpha": 12,
    "use_rslora": True,
    "target_modules": r".*text_model.*\.(q_proj|v_proj|o_proj|gate_proj|down_proj)",
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"down_proj": 5},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Hugging Face's layout, as its classes save it."""
    torch.manual_seed(0)
    model = Emu3(load_model("8b", SMALL_8B)).eval()
    folder = tmp_path_factory.mktemp("base") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor_files, "save_processor", lambda folder, text: None)
        save(folder, Pretrained(model, random_tokenizer(SMALL), QwenTokenizer()), "runtime")
    return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """PEFT's model with random adapters, and the folder that it saves."""
    model = Emu3ForConditionalGeneration.from_pretrained(base).eval()
    model = peft.get_peft_model(model, peft.LoraConfig(**SETTINGS))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.2)
    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_logits_equal_peft_s_own_merge(tuned, base):
    model, folder = tuned
    merged = model.merge_and_unload()
    tokens = torch.arange(1, 30).view(1, -1)
    low = merged(tokens).logits
    exact = merged.double()(tokens).logits
    ours = load(folder).model
    assert_as_accurate("logits", ours.logits(ours(tokens), slice(None)), low, exact)
    plain = load(base).model
    assert (plain.logits(plain(tokens), slice(None)) - exact).abs().max() > 0.1 * exact.abs().max()


def test_a_merge_is_rounded_once(tuned, base):
    adapter = read_adapter(tuned[1])
    weight, narrow, codes = (
        load_decoder(adapter.base_of(base), adapter=adapter, **how).blocks[0].mlp.down
        for how in ({}, {"dtype": torch.bfloat16}, {"weights": "int8"})
    )
    assert narrow.weight.equal(weight.weight.bfloat16())
    assert (codes.codes * codes.scales[:, None] - weight.weight).abs().max() <= codes.scales.max()


def changed(folder, target, **settings):
    shutil.copytree(folder, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | settings))
    return target


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"use_dora": True}, "use_dora is not supported, got True"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must leave the base as it is"),
        ({"r": 8}, r"of \(.*\) and rank 8 has matrices of"),
        ({"lora_alpha": "high"}, "lora_alpha must be a number, got 'high'"),
        ({"base_model_name_or_path": "BAAI/Emu3-Gen"}, "name its base .--base."),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_in_one_line(settings, line, tuned, tmp_path):
    with pytest.raises(ValueError, match=line) as raised:
        load(changed(tuned[1], tmp_path / "odd", **settings))
    assert "\n" not in str(raised.value)


def test_an_adapter_of_another_model_is_refused_in_one_line(tuned, base, tmp_path):
    folder = changed(tuned[1], tmp_path / "odd")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    save_file({**tensors, name.replace("q_proj", "z_proj"): tensors[name].clone()}, file)
    with pytest.raises(ValueError, match="z_proj must have both matrices, got lora_A"):
        load(folder)
    save_file({n: v for n, v in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match="q_proj must have both matrices, got lora_B"):
        load(folder)
    with pytest.raises(ValueError, match=r"base is of an adapter, but .* has no adapter_config"):
        load(base, base=base)
    file.unlink()
    with pytest.raises(ValueError, match=r"no file .*adapter_model.safetensors"):
        load(folder)
