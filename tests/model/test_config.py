"""Settings: presets, recipes, overrides, and one clear line for every mistake."""

import pytest
from pydantic import ValidationError

from emu3.config import PRESETS, RECIPES, SettingsError
from emu3.tasks import load_recipe


def test_the_real_vocabulary_ends_where_the_official_one_does():
    vocabulary = PRESETS["8b"].vocabulary
    assert vocabulary.size == 184_622
    assert vocabulary.visual_start == vocabulary.eoi + 1


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_loads_by_name_and_by_path(path):
    assert load_recipe(path.stem) == load_recipe(path)


def test_an_override_wins_over_the_file_and_the_rest_stays():
    plain, changed = load_recipe("digits"), load_recipe("digits", ["optim.lr=1e-4"])
    assert changed.optim.lr == 1e-4
    assert changed.model == plain.model


def test_a_table_of_the_recipe_refines_the_preset(tmp_path):
    path = tmp_path / "wide.toml"
    path.write_text(
        'preset = "8b"\n[train]\nstage = "decoder"\nsteps = 1\n[model]\nnum_layers = 2\n'
    )
    with pytest.raises(SettingsError, match="visual tokens"):
        load_recipe(path, ["vision.num_codes=512"])
    model = load_recipe(path).model
    assert (model.num_layers, model.hidden_size) == (2, PRESETS["8b"].hidden_size)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optim.lrr=1", "optim.lrr: unknown setting; optim has betas, clip, decay, eps, lr, "),
        ("optimm.lr=1", "optimm: unknown setting; recipe has data, media, model, objective"),
        (
            "model.vocabulary.bow=1",
            "model.vocabulary.bow: unknown setting; vocabulary has boi, bos, ",
        ),
        ("optim.lr=-1", "optim.lr: Input should be greater than 0, got -1"),
        ("train.steps=soon", "train.steps: Input should be a valid integer"),
        ("preset=9b", "preset: unknown '9b'; expected one of 8b, mini"),
        ("preset=[1]", "preset: unknown [1]; expected one of 8b, mini"),
        ("vision.multipliers=[]", "vision.multipliers: Tuple should have at least 1 item"),
        (f"train.seed={2**64}", "train.seed: Input should be less than 18446744073709551616"),
        ("optim.lr.peak=1", "optim.lr.peak: lr is a value, not a table"),
        ("optim.lr", "optim.lr: an override must read key=value"),
        ("model.num_kv_heads=3", "num_heads (4) must be a multiple of num_kv_heads"),
        ("model.vocabulary.eol=99999", "model.vocabulary: eol (99999) must be in [256, 264)"),
        ("model.vocabulary.pad=99999", "model.vocabulary: pad (99999) must be in [256, 264)"),
        ("model.vocabulary.bos=-1", "model.vocabulary: bos (-1) must be in [256, 264)"),
        ("model.vocabulary.eos=259", "model.vocabulary: eos (259) must differ from bos"),
        ("model.vocabulary.visual_start=-4", "model.vocabulary: pad (256) must be in [256, -4)"),
    ],
)
def test_a_wrong_setting_gives_one_line_that_helps(word, line):
    with pytest.raises(SettingsError) as fault:
        load_recipe("digits", [word])
    assert line in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_missing_recipe_names_those_that_ship():
    with pytest.raises(SettingsError, match="no file 'digit'; those that ship are clips"):
        load_recipe("digit")


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        PRESETS["mini"].hidden_size = 1
