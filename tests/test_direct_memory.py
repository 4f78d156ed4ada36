"""Where and how a director keeps the keys and values of what a shot sees: takes, bytes, refusals."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_direct import SCENE, hashes, settings, shown, small_weights, states

from lct.cli import main
from lct.data.scenefile import write_scene
from lct.direct.open import open_studio
from lct.direct.studio import Studio
from lct.model.config import Memory
from lct.model.mmdit import MMDiT
from lct.train.weights import load_model, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_weights(tmp_path_factory.mktemp("weights"), "context_causal")


@pytest.fixture
def studio(tmp_path, weights):
    write_scene(tmp_path / "scene", SCENE)
    return Studio.begin(tmp_path / "scene", tmp_path / "project", settings(weights))


@pytest.mark.parametrize("dtype, near", [(None, 1e-5), ("bfloat16", 0.1)])
def test_where_a_history_is_kept_changes_takes_by_rounding(tmp_path, weights, dtype, near):
    write_scene(tmp_path / "scene", SCENE)
    plain = Studio.begin(tmp_path / "scene", tmp_path / "plain", settings(weights, dtype=dtype))
    apart = Studio.begin(tmp_path / "scene", tmp_path / "apart", settings(weights, dtype=dtype), history_device="cpu")
    assert plain.make(all=True) == apart.make(all=True)
    for shot in (1, 2, 3):
        np.testing.assert_allclose(shown(plain, shot), shown(apart, shot), atol=near)


def test_eight_bits_are_a_setting(studio):
    studio.make(all=True)
    before, plain = [card.take for card in studio.board.cards], shown(studio, 3)
    small = studio.open(studio.folder, {"fp8": True})
    assert states(small) == ["stale"] * 3
    small.refresh()
    assert 1e-5 < np.abs(shown(small, 3) - plain).max() < 0.1
    again = studio.open(studio.folder, {"fp8": False})
    again.refresh()
    assert [card.take for card in again.board.cards] == before  # found again
    boards = hashes(studio.folder / "boards")
    studio.open(studio.folder, {"fp8": False})
    assert hashes(studio.folder / "boards") == boards


def test_a_history_takes_less_where_it_is_asked_to(monkeypatch, tmp_path, weights):
    """Of a model with twelve blocks, the bytes of keys and values while a third take is made."""
    _, config = load_model(weights)
    deep = MMDiT(replace(config.model, blocks=12))
    save_weights(tmp_path / "deep.safetensors", deep.state_dict(), replace(config, model=deep.config))
    write_scene(tmp_path / "scene", SCENE)
    module, made = sys.modules["lct.sample.autoregressive"], []
    make = module._history
    monkeypatch.setattr(module, "_history", lambda *given: made.append(make(*given)) or made[-1])
    held = {}
    for name, options, device in (("plain", {}, None), ("fp8", {"fp8": True}, None), ("cpu", {}, "cpu")):
        begun = settings(tmp_path / "deep.safetensors", dtype="bfloat16", guidance=1.0, **options)
        Studio.begin(tmp_path / "scene", tmp_path / name, begun, history_device=device).make(all=True)
        held[name] = made[-1].cache.bytes, made[-1].pool.bytes if name != "plain" else 0
    assert sum(held["fp8"]) < 0.75 * sum(held["plain"])
    assert held["cpu"][0] < 0.2 * sum(held["plain"])  # what stays on the model's device


def test_weights_that_keep_no_history_say_so_before_anything_is_written(tmp_path):
    write_scene(tmp_path / "scene", SCENE)
    both = small_weights(tmp_path, "bidirectional")
    with pytest.raises(ValueError, match="only weights tuned with context_causal"):
        Studio.begin(tmp_path / "scene", tmp_path / "project", settings(both, fp8=True))
    assert not (tmp_path / "project").exists()
    studio = Studio.begin(tmp_path / "scene", tmp_path / "project", settings(both))
    before = hashes(studio.folder)
    for changes, options in (({"fp8": True}, {}), ({}, {"history_device": "cpu"})):
        with pytest.raises(ValueError, match="only weights tuned with context_causal"):
            Studio.open(studio.folder, changes, **options)
    assert hashes(studio.folder) == before


def test_products_are_kept_in_the_dtype_of_a_project(studio):
    for dtype in ("bfloat16", None):
        changed = studio.open(studio.folder, {"dtype": dtype})
        model, _ = changed._model(changed.board.settings)
        assert model.video_out.weight.dtype == (torch.bfloat16 if dtype else torch.float32)


def test_a_device_that_is_not_there_is_said(studio):
    with pytest.raises(ValueError, match="memory.device: expected one of"):
        Studio(studio.folder, history_device="gpu")


def test_the_options_of_a_history_reach_the_studio(studio):
    opened = open_studio(studio.folder, history_device="cpu", fp8=True)
    assert opened._memory(opened.board.settings) == Memory("cpu", fp8=True, layered=True)
    assert studio._memory(settings(Path(studio.board.settings.weights))) is None


def test_a_command_names_them_as_sample_does(studio, capsys):
    def status(*options):
        return main(["direct", str(studio.folder), *options, "status"]), capsys.readouterr().err

    assert status("--memory.fp8", "True", "--memory.device", "cpu") == (0, "")
    assert studio.board.settings.fp8
    code, said = status("--memory.device", "gpu")
    assert code == 2 and "memory.device: expected one of" in said
