"""Files of codes: there and back, and one line for one that is damaged or of another kind."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from emu3.data.codes import Header, Making, fingerprint, load_codes, save_codes
from emu3.vision import VisionTokenizer
from tests.model.tiny import TINY_VISION

IMAGE = Header(
    source="a/b.jpg", height=30, width=41, resized=(32, 40), tokenizer="ab12", making=Making()
)
VIDEO = IMAGE.model_copy(update={"frames": 7, "fps": "30000/1001"})


@pytest.mark.parametrize(("shape", "header"), [((4, 5), IMAGE), ((2, 4, 5), VIDEO)])
def test_codes_come_back_with_what_was_said_of_them(shape, header, tmp_path):
    codes = torch.randint(32768, shape)
    codes.flatten()[:2] = torch.tensor([0, 32767])
    save_codes(tmp_path / "x.safetensors", codes, header)
    again, told = load_codes(tmp_path / "x.safetensors")
    assert again.equal(codes)
    assert again.dtype == torch.int64
    assert told == header


@pytest.mark.parametrize("code", [-1, 32768])
def test_a_code_that_16_bits_cannot_hold_is_refused(code, tmp_path):
    with pytest.raises(ValueError, match="stores codes of 16 bits"):
        save_codes(tmp_path / "x.safetensors", torch.tensor([[0, code]]), IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_the_file(tmp_path):
    """safetensors' own save_file lets no one but the owner."""
    (tmp_path / "plain").touch()
    save_codes(tmp_path / "x.safetensors", torch.tensor([[1]]), IMAGE)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def foreign(path, tensors, **changes):
    told = json.loads(IMAGE.model_dump_json()) | changes
    save_file(tensors, path, metadata={"emu3_codes": json.dumps(told)})


GOOD = {"codes": torch.ones(4, 5, dtype=torch.int16)}


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (lambda path: path.write_bytes(b"not tensors"), "is not a safetensors file"),
        (lambda path: path.touch(), "is not a safetensors file"),
        (lambda path: save_file(GOOD, path), "is not a file of codes"),
        (lambda path: save_file(GOOD, path, metadata={"emu3_codes": "{"}), "Expecting property"),
        (lambda path: foreign(path, GOOD, version=2), "version: Input should be 1, got 2"),
        (lambda path: foreign(path, GOOD, more=1), "more: unknown setting"),
        (lambda path: foreign(path, GOOD, frames=4), "frames and fps come together"),
        (lambda path: foreign(path, {"other": GOOD["codes"]}), "got no codes"),
        (lambda path: foreign(path, {"codes": torch.ones(4, 5)}), r"got torch.float32 \(4, 5\)"),
        (lambda path: foreign(path, {"codes": GOOD["codes"][:0]}), r"got torch.int16 \(0, 5\)"),
        (lambda path: foreign(path, {"codes": GOOD["codes"][None]}), r"in 2 dimensions, got"),
        (lambda path: foreign(path, GOOD, frames=4, fps="25"), r"in 3 dimensions, got"),
    ],
)
def test_what_is_no_file_of_codes_gives_one_line_that_names_it(write, line, tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    with pytest.raises(ValueError, match=line) as fault:
        load_codes(path)
    assert str(path) in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_codes(path, torch.ones(4, 5), IMAGE)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a safetensors file"):
            load_codes(path)


def test_impossible_wishes_are_refused():
    with pytest.raises(ValidationError, match="min_pixels must be at most max_pixels"):
        Making(min_pixels=2, max_pixels=1)
    for fps in ("0", "0.0", "25/0", "fast", "-5", "inf", "nan", "1e9", "", "1/2/3", "9" * 12):
        with pytest.raises(ValidationError, match=r"must be frames per second, such as 12, 29\.97"):
            Making(fps=fps)


def test_a_rate_may_be_a_decimal_and_has_one_spelling():
    """29.97 was refused, by a regular expression; 24 and 24.0 were other settings."""
    spelt = {fps: Making(fps=fps).fps for fps in ("29.97", "30000/1001", "24.0", "48/2", "0.5")}
    assert list(spelt.values()) == ["2997/100", "30000/1001", "24", "24", "1/2"]


def test_any_weight_changes_the_fingerprint_and_what_codes_do_not_need_does_not():
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(TINY_VISION.model_copy(update={"ema_decay": 0.97}))
    first = fingerprint(tokenizer)
    for parameter in tokenizer.parameters():
        parameter.data = parameter.data.contiguous()  # no longer channels-last
    for name, value in tokenizer.named_buffers():
        if not name.endswith(("running_mean", "running_var")):
            value += 1
    assert fingerprint(tokenizer) == first
    seen = {first}
    for parameter in tokenizer.parameters():
        with torch.no_grad():
            parameter[(-1,) * parameter.ndim] += 0.5
        seen.add(fingerprint(tokenizer))
    assert len(seen) == 1 + len(list(tokenizer.parameters()))
    assert fingerprint(tokenizer.bfloat16()) not in seen
