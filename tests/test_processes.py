"""One process, sharded weights, shared rows: the same losses and gradients; checkpoints go from any number to any."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import small, start
from safetensors.torch import load_file

from lct.cli import main
from lct.layout import SceneLayout, Shot
from lct.model.families import build
from lct.model.shared import share_rows
from lct.pretrained.files import save
from lct.train.checkpoint import newest_whole, read_whole
from lct.train.weights import load_model, save_weights

WAYS = {
    "one process again": (1, {"recompute": "all"}),
    "one process, attention kept": (1, {"recompute": "attention"}),
    "one process, several passes": (1, {"pass_rows": 150}),
    "sharded": (2, {}),
    "sharded, weights held": (2, {"gather_again": False, "pass_rows": 150, "recompute": "attention"}),
    "replicated": (2, {"replicate": 2, "recompute": "all"}),
    "shared rows": (2, {"context": 2}),
    "shared rows, recomputed": (2, {"context": 2, "recompute": "all"}),
}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Gradients of the first step, and 20 steps, in one process."""
    root = tmp_path_factory.mktemp("usual")
    start(1, "gradients", root / "gradients")
    start(1, "train", root / "train")
    return load_file(root / "gradients" / "gradients.safetensors"), root / "train"


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process(way, usual, tmp_path):
    count, execution = WAYS[way]
    start(count, "gradients", tmp_path, json.dumps(execution))
    found, expected = load_file(tmp_path / "gradients.safetensors"), usual[0]
    assert found.keys() == expected.keys() and len(found) > 50
    assert abs(found["loss"] - expected["loss"]) <= 1e-5 * expected["loss"]
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 5e-5 * gradient.norm(), name


TWENTY = ("sharded", "replicated", "shared rows", "one process, several passes", "shared rows, recomputed")


@pytest.mark.parametrize("way", TWENTY)
def test_twenty_steps_are_those_of_one_process(way, usual, tmp_path):
    count, execution = WAYS[way]
    start(count, "train", tmp_path, json.dumps(execution))
    told, expected = log(tmp_path), log(usual[1])
    assert len(told) == len(expected) == 20
    for a, b in zip(told, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert (a["rows"], a["shots"], a["scenes"]) == (b["rows"], b["shots"], b["scenes"])
        for x, y in zip(a["by_noise"], b["by_noise"], strict=True):
            assert x == y if None in (x, y) else x == pytest.approx(y, rel=1e-4)


def test_a_run_goes_on_with_any_number_of_processes(usual, tmp_path):
    """Two, one, two: stopped at steps 5 and 15, and as if it had not been."""
    for count, steps in ((2, 5), (1, 15), (2, 20)):
        start(count, "train", tmp_path, "{}", json.dumps({"save_every": 5}), "until", steps)
    told, expected = log(tmp_path), log(usual[1])
    assert [line["step"] for line in told] == list(range(1, 21))
    for a, b in zip(told, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    ours, theirs = (read_whole(newest_whole(folder)[0], "ema") for folder in (tmp_path, usual[1]))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, rtol=1e-4, atol=1e-6), name


def test_the_same_processes_go_on_bit_for_bit(tmp_path):
    start(2, "train", tmp_path / "whole", "{}", json.dumps({"steps": 8, "save_every": 4}))
    for steps in (4, 8):
        start(2, "train", tmp_path / "parts", "{}", json.dumps({"steps": 8, "save_every": 4}), "until", steps)
    assert [line["loss"] for line in log(tmp_path / "parts")] == [line["loss"] for line in log(tmp_path / "whole")]
    whole, parts = (newest_whole(tmp_path / name)[0] for name in ("whole", "parts"))
    for group in ("model", "ema", "optimizer"):
        a, b = read_whole(whole, group), read_whole(parts, group)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("options", [{}, {"gather_again": False}, {"context": 2}], ids=json.dumps)
def test_samples_on_the_way_change_nothing(options, tmp_path):
    """Averaged weights were gathered; the next step must not compute with them."""
    for name in ("with", "without"):
        start(2, "samples", tmp_path / name, json.dumps(options | {"sample": name == "with"}))
    assert [line["loss"] for line in log(tmp_path / "with")] == [line["loss"] for line in log(tmp_path / "without")]


@pytest.fixture(scope="module")
def open_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    start(1, "families", root, "{}")
    return root


@pytest.mark.parametrize("options", [{}, {"context": 2, "recompute": "attention"}, {"compile": True}], ids=json.dumps)
def test_models_that_others_trained_are_spread_too(options, open_models, tmp_path):
    start(2, "families", tmp_path, json.dumps(options))
    files = sorted(open_models.iterdir())
    assert len(files) >= 3
    for file in files:
        found, expected = load_file(tmp_path / file.name), load_file(file)
        assert found.keys() >= expected.keys()
        assert not any(
            found[name].any() for name in found.keys() - expected.keys()
        )  # compiled: zeros, where none flows
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 5e-5 * gradient.norm().clamp(min=1e-9), f"{file.stem} {name}"


def test_fewer_scenes_than_processes(tmp_path, usual):
    start(1, "train", tmp_path / "one", "{}", json.dumps({"scenes": 1, "steps": 6}))
    start(2, "train", tmp_path / "two", "{}", json.dumps({"scenes": 1, "steps": 6}))
    for a, b in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("cross", [False, True], ids=["joint", "cross"])
def test_shared_rows_are_all_rows(cross, count):
    shots = [Shot(3, (1, 1, 1), "global"), Shot(5, (2, 2, 3)), Shot(4, (1, 3, 1)), Shot(0, (1, 1, 1))]
    layout = SceneLayout([shots[1:] if cross else shots, shots[1:3]])
    whole = layout.geometry(cross=cross)
    parts = [share_rows(whole, index, count, "none") for index in range(count)]
    size = parts[0].shared.size
    assert torch.equal(torch.cat([p.positions for p in parts]), whole.positions)
    for stream in ("text", "video"):
        rows = [getattr(p.streams, f"{stream}_rows") + i * size for i, p in enumerate(parts)]
        assert torch.equal(torch.cat(rows), getattr(whole.streams, f"{stream}_rows"))
        shot = torch.cat([getattr(p.streams, f"{stream}_shot") for p in parts])
        assert torch.equal(shot, getattr(whole.streams, f"{stream}_shot"))
        for p in parts:
            counts = torch.bincount(getattr(p.streams, f"{stream}_shot"), minlength=len(layout.shots))
            assert torch.equal(getattr(p.streams, f"{stream}_starts").diff().long(), counts)
    if cross:
        assert torch.equal(torch.cat([p.cross.dense_mask() for p in parts]), whole.cross.dense_mask())


def test_heads_that_do_not_divide_are_refused(tmp_path):
    done = start(
        2,
        "train",
        tmp_path,
        json.dumps({"context": 2}),
        json.dumps({"model.heads": 3, "model.kv_heads": 3}),
        check=False,
    )
    assert done.returncode and "context: expected a divisor of 3 heads" in done.stderr
    done = start(2, "train", tmp_path, json.dumps({"context": 3}), check=False)
    assert done.returncode and "expected a product that divides 2 processes, got 1 · 3" in done.stderr


BEGINNINGS = {
    "new": ({}, {}),
    "replicated": ({}, {"replicate": 2, "compile": True}),
    "low rank": ({"lora": 2, "init": "ours"}, {}),
    "low rank beside half precision": ({"lora": 2, "init": "wan"}, {}),
}


@pytest.mark.parametrize(("changes", "execution"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_the_first_process_alone_makes_the_model(changes, execution, tmp_path):
    if changes.get("init") == "ours":
        save_weights(tmp_path / "ours.safetensors", build(small().model).state_dict(), small())
        changes = changes | {"init": str(tmp_path / "ours.safetensors")}
    elif changes.get("init") == "wan":
        open_models = pytest.importorskip("open_models")
        changes = changes | {"init": str(save(open_models.ours("wan").bfloat16(), tmp_path / "wan"))}
    start(4 if execution.get("replicate") else 2, "begins", json.dumps(execution), json.dumps(changes))


@pytest.mark.parametrize("init", ["gone.safetensors", None])
def test_what_is_wrong_with_the_first_weights_is_said_to_all(init, tmp_path):
    start(2, "cannot_begin", tmp_path, json.dumps({"init": init and str(tmp_path / init)}), timeout=60)


def torchrun(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lct"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=300)


def test_the_command_in_two_processes(tmp_path):
    """Train, sample on the way, go on: the first process speaks for both; one samples from what they left."""
    scene = Path(__file__).parents[1] / "docs" / "scene"
    how = ["--context", 2, "--recompute", "attention", "--save-beside", "--keep", 2]
    what = ["--init", "None", "--scenes", 2, "--save-every", 2, "--warmup", 1, "--ema", 0.5, "--steps"]
    run = ["train", "tiny_lct", *what, 4, "--out", tmp_path / "run", *how]
    done = torchrun(*run, "--scene", scene, "--sample-every", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "step-0000004")
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "samples" / "step-0000003" / "contact-sheet.png").is_file()
    again = torchrun(*run)
    assert again.stdout.splitlines() == [
        f"resuming {tmp_path / 'run'} at step 4",
        str(tmp_path / "run" / "step-0000004"),
    ]
    arguments = ["sample", scene, "--weights", tmp_path / "run", "--steps", 1, "--out", tmp_path / "made"]
    assert main([str(word) for word in arguments]) == 0
    wrong = torchrun("train", "tiny_lct", *what, 4, "--out", tmp_path / "other", "--context", 3)
    assert wrong.returncode and "lct: error: replicate, context: expected a product that divides 2" in wrong.stderr


def test_low_rank_changes_are_spread_too(tmp_path):
    """Some processes hold nothing of a change of rank two."""
    torch.manual_seed(0)
    base = tmp_path / "base.safetensors"
    model = build(small().model)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    save_weights(base, model.state_dict(), small(), torch.float32)
    changes = json.dumps({"init": str(base), "lora": 2, "steps": 6, "save_every": 3})
    start(1, "train", tmp_path / "one", "{}", changes)
    for steps in (3, 6):
        start(2, "train", tmp_path / "two", "{}", changes, "until", steps)
    for a, b in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    merged = [load_model(tmp_path / name)[0].state_dict() for name in ("one", "two")]
    assert all(torch.allclose(w, merged[1][name], rtol=1e-3, atol=1e-5) for name, w in merged[0].items())
    assert any(not torch.equal(w, model.state_dict()[name]) for name, w in merged[1].items())
