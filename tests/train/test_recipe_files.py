"""Recipe files as editors write them, and errors that fit on a line."""

import pytest

from emu3.settings import SettingsError
from emu3.tasks import load_recipe

RECIPE = 'preset = "mini"\n[train]\nstage = "vision"\nsteps = 7\n'


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path):
    """Notepad writes them: "Invalid statement (at line 1, column 1)"."""
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load_recipe(path).train.steps == 7


@pytest.mark.parametrize(
    "content", [RECIPE.encode("utf-16"), ("# größe\n" + RECIPE).encode("latin-1")]
)
def test_another_encoding_names_the_file(content, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="must be UTF-8 text") as fault:
        load_recipe(path)
    assert str(fault.value).startswith(str(path))


def test_a_file_without_ending_is_a_recipe_and_a_recipe_that_ships_goes_first(
    tmp_path, monkeypatch
):
    """It was there, and the error said "no file"."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "digits"):
        (tmp_path / name).write_text(RECIPE)
    assert load_recipe("mine").train.steps == 7
    assert load_recipe("./digits").train.steps == 7
    assert load_recipe("digits").train.steps != 7


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[train]\nsteps = 7", "train.stage: Field required"),
        (
            RECIPE + "[model]\nnum_heads = 3",
            "model: num_heads (3) must be a multiple of num_kv_heads",
        ),
        (RECIPE + "seed = -1", "train.seed: Input should be greater than or equal to 0, got -1"),
    ],
)
def test_an_error_tells_what_is_wrong_and_not_all_settings(content, line, tmp_path):
    """Of a missing setting, 1.5 kB of all others were shown."""
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(SettingsError) as fault:
        load_recipe(path)
    assert str(fault.value) == line


def test_a_long_value_is_cut():
    with pytest.raises(SettingsError) as fault:
        load_recipe("digits", [f"optim.lr={'x' * 3000}", f"media.crop={list(range(999))}"])
    assert len(str(fault.value)) < 200


def test_spaces_around_an_override_do_not_matter_and_no_part_may_lack():
    """``.lr=3`` was ": unknown setting", of the recipe."""
    assert load_recipe("digits", ["optim.lr = 1e-3"]).optim.lr == 1e-3
    for word in ("=3", ".lr=3", "optim.=3", "optim..lr=3", "optim.lr"):
        with pytest.raises(SettingsError, match="must read key=value"):
            load_recipe("digits", [word])
