"""Tests of ops that passed are left out until a source that they depend on changes."""

from types import SimpleNamespace as Object
from unittest import mock

import pytest

from tests.unchanged import ROOT, SHARED_TESTS, STACK, Unchanged, digest, family_of

FILES = (
    "emu3_kernels/ops/norm/triton.py",
    "emu3_kernels/ops/vq/triton.py",
    "emu3_kernels/runtime/launch.py",
    "csrc/cpu/norm/rms_norm.cpp",
    "csrc/cpu/vq/search.cpp",
    "csrc/bindings/vq.cpp",
    f"tests/{SHARED_TESTS}/test_all_ops.py",
    "tests/norm/test_norm.py",
    "tests/vq/test_vq.py",
    "tests/model/test_model.py",
    "tests/conftest.py",
    "pyproject.toml",
    "emu3/model.py",
)
OTHERS = {path for path in FILES if "vq" in path} | {"tests/model/test_model.py", "emu3/model.py"}


@pytest.mark.parametrize("edited", FILES)
def test_an_edit_concerns_the_families_that_depend_on_it(edited, tmp_path):
    for path in FILES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("before")
    before = digest.__wrapped__("norm", tmp_path)
    (tmp_path / edited).write_text("after")
    assert (digest.__wrapped__("norm", tmp_path) == before) == (edited in OTHERS)


@pytest.mark.parametrize(
    ("edited", "concerned"),
    [
        ("emu3_kernels/ops/norm/triton.py", False),
        ("emu3_kernels/ops/norm/api.py", True),
        ("emu3_kernels/runtime/launch.py", True),
        ("emu3/model.py", True),
        ("tests/train/test_loop.py", True),
        ("tests/model/test_model.py", False),
    ],
)
def test_an_edit_of_a_triton_kernel_does_not_concern_the_stack(edited, concerned, tmp_path):
    for path in {*FILES, "emu3_kernels/ops/norm/api.py", "tests/train/test_loop.py"}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("before")
    before = digest.__wrapped__(STACK, tmp_path)
    (tmp_path / edited).write_text("after")
    assert (digest.__wrapped__(STACK, tmp_path) != before) == concerned


def item(path, *params):
    callspec = Object(params=dict(enumerate(params)))
    name = f"{path}{list(params)}"
    return Object(path=ROOT / path, callspec=callspec, nodeid=name, user_properties=[])


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_stack_s_tests_are_known_by_their_folder_where_there_is_no_gpu(has_gpu):
    with mock.patch("torch.cuda.is_available", return_value=has_gpu):
        found = family_of(item("tests/serve/test_app.py"))
    assert found == (None if has_gpu else STACK)


def test_a_test_of_one_family_is_known_by_its_folder_or_its_op():
    assert family_of(item("tests/norm/test_norm.py", "triton")) == "norm"
    assert family_of(item("tests/gates/test_all_ops.py", "swiglu", "triton", 1)) == "swiglu"
    for path, *params in [
        ("tests/gates/test_all_ops.py", "swiglu", "rms_norm"),
        ("tests/gates/test_suite.py",),
        ("tests/norm/test_norm.py", "swiglu"),
        ("tests/model/test_model.py", "swiglu"),
        ("tests/test_layers.py", "swiglu"),
        ("benchmarks/tests/test_ops.py", "swiglu"),
    ]:
        assert family_of(item(path, *params)) is None


def run(items, outcomes):
    """What a run of ``items`` leaves out; tests that it runs end as ``outcomes`` say."""
    plugin, config = Unchanged(), mock.Mock(spec=["hook"])
    kept = [*items]
    plugin.pytest_collection_modifyitems(config, kept)
    for one in kept:
        for when in ("setup", "call", "teardown"):
            failed = outcomes.get(one.nodeid) == when
            plugin.pytest_runtest_logreport(
                Object(
                    nodeid=one.nodeid,
                    user_properties=one.user_properties,
                    when=when,
                    passed=not failed,
                    failed=failed,
                )
            )
    plugin.pytest_sessionfinish(Object(config=config))
    return [one.nodeid for one in items if one not in kept]


def test_only_what_passed_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("EMU3_TEST_CACHE", str(tmp_path))
    names = "tests/norm/test_a.py", "tests/vq/test_b.py", "tests/norm/test_c.py", "tests/test_d.py"
    items = [item(name) for name in names]
    fails = {items[1].nodeid: "call", items[2].nodeid: "teardown"}
    assert run(items, fails) == []
    assert run(items, {}) == [items[0].nodeid]
    assert run(items, {}) == [one.nodeid for one in items[:3]]
