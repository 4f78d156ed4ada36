"""Packed scenes are the scenes: the same samples, the same training, text included; damage is named."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_reliability import log, of_folder, scenes

from lct.cli import main
from lct.data.folder import SceneFolder, scene_folders
from lct.data.scenefile import read_scene, rewrite_scene
from lct.data.shards import MANIFEST, SceneShards, write_shards
from lct.pretrained.features import TEXT, FeatureTable, prompts_of, write_features
from lct.train.execution import Execution
from lct.train.trainer import Trainer


@pytest.fixture
def folder(tmp_path):
    """Scenes of one kind and the other, with text features."""
    root = scenes(tmp_path / "scenes", 5)
    for path in sorted(root.iterdir())[:2]:  # segments of one take
        scene = read_scene(path)
        rewrite_scene(path, replace(scene, shots=tuple(replace(shot, cut=False) for shot in scene.shots)))
    draw = torch.Generator().manual_seed(0)
    for path in sorted(root.iterdir()):
        prompts = prompts_of(read_scene(path))
        write_features(path / TEXT, {p: torch.randn(1 + len(p), 8, generator=draw) for p in prompts})
    write_features(root / TEXT, {"": torch.zeros(1, 8)})
    return root


@pytest.fixture
def packed(folder, tmp_path):
    return write_shards(folder, tmp_path / "packed", size=20_000)


def equal(a, b):
    assert a.global_prompt == b.global_prompt and len(a.shots) == len(b.shots)
    for x, y in zip(a.shots, b.shots, strict=True):
        assert (x.prompt, x.cut) == (y.prompt, y.cut)
        assert np.array_equal(np.asarray(x.latents), np.asarray(y.latents))
        assert np.array_equal(np.asarray(x.images), np.asarray(y.images))


def test_samples_are_those_of_the_folders(folder, packed):
    assert len(list(packed.glob("shard-*.safetensors"))) > 1
    ours, theirs = SceneShards(packed), SceneFolder(folder)
    for kind in ("single", "cut", "no_cut"):
        for seed in range(8):
            equal(*(source.sample(kind, np.random.default_rng(seed)) for source in (ours, theirs)))
    parts = [source.sample("no_cut", np.random.default_rng(3), 2) for source in (ours, theirs)]
    equal(*parts)


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\v"])
def test_prompts_may_hold_what_ends_lines_elsewhere(folder, tmp_path, end):
    path = sorted(folder.iterdir())[0]
    scene = read_scene(path)
    said = replace(scene.shots[0], prompt=f"A ship{end}sails.")
    rewrite_scene(path, replace(scene, shots=(said, *scene.shots[1:])))
    packed = SceneShards(write_shards(folder, tmp_path / "packed"))
    assert sorted(packed.scenes, key=str) == sorted(SceneFolder(folder).scenes, key=str)


def test_scenes_are_found_behind_links_and_not_in_unfinished_folders(folder, tmp_path):
    first, *others = scene_folders(folder)
    (tmp_path / "mix" / "one").mkdir(parents=True)
    (tmp_path / "mix" / "two").symlink_to(folder)
    (tmp_path / "mix" / "two" / "round").symlink_to(tmp_path / "mix")  # without end
    shutil.copytree(first, tmp_path / "mix" / ".scene.tmp")
    (tmp_path / "mix" / ".scene.tmp" / TEXT).write_bytes(b"cut off")
    found = scene_folders(tmp_path / "mix")
    assert [path.name for path in found] == [path.name for path in (first, *others)]
    FeatureTable(tmp_path / "mix").check([""])


def test_text_is_that_of_the_folders(folder, packed):
    ours, theirs = FeatureTable(packed), FeatureTable(folder)
    prompts = ["", *(prompt for scene in SceneShards(packed).scenes for prompt in prompts_of(scene))]
    ours.check(prompts)
    for prompt in prompts:
        assert torch.equal(ours.tokenize(prompt), theirs.tokenize(prompt))
        assert ours.length(prompt) == theirs.length(prompt) == len(ours.tokenize(prompt))
    with pytest.raises(ValueError, match="was not encoded"):
        ours.check(["another"])


def test_training_is_that_of_the_folders(folder, packed, tmp_path):
    for name, source in (("folders", folder), ("shards", packed)):
        Trainer(of_folder(source, steps=4), tmp_path / name).run()
    assert [a["loss"] for a in log(tmp_path / "folders")] == [b["loss"] for b in log(tmp_path / "shards")]


def test_the_command_packs(folder, tmp_path, capsys):
    assert main(["pack", str(folder), "--out", str(tmp_path / "out"), "--gigabytes", "1e-5"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert len(SceneShards(tmp_path / "out").scenes) == 5
    assert main(["pack", str(folder), "--out", str(tmp_path / "out")]) == 2  # nothing is overwritten
    assert "remove it or choose another name" in capsys.readouterr().err


def test_every_flipped_bit_of_what_is_read_is_named(packed):
    rng, files = random.Random(0), sorted(packed.glob("shard-*.safetensors"))
    for _ in range(40):
        file = rng.choice(files)
        content = file.read_bytes()
        damaged = bytearray(content)
        header = 8 + int.from_bytes(content[:8], "little")
        damaged[rng.randrange(header, len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file.name}: .*CRC-32"):
            everything(packed)
        file.write_bytes(content)
    everything(packed)


def everything(root: Path) -> None:
    source, table = SceneShards(root), FeatureTable(root)
    for scene, shots in zip(source.scenes, source.shots, strict=True):
        for shot in shots:
            np.asarray(shot.latents), np.asarray(shot.images)
        for prompt in ["", *prompts_of(scene)]:
            table.tokenize(prompt)


def test_a_missing_shard_is_left_out_or_stops_the_run(packed, tmp_path):
    gone = sorted(packed.glob("shard-*"))[1]
    gone.unlink()
    config = of_folder(packed, steps=5)
    with pytest.raises(ValueError, match=f"{gone.name}: .*missing or damaged"):
        Trainer(config, tmp_path / "stop").run()
    with pytest.warns(UserWarning, match=f"left out: .*{gone.name}"):
        Trainer(config, tmp_path / "skip", execution=Execution(damaged="skip")).run()
    assert sum(line["scenes"] for line in log(tmp_path / "skip")) < 20


def test_a_damaged_manifest_is_named_by_its_line(packed):
    file = packed / MANIFEST
    lines = file.read_text().splitlines()
    for wrong in ('{"scene": "a"}', "{", "[]"):
        file.write_text("\n".join([*lines[:2], wrong, *lines[3:]]))
        with pytest.raises(ValueError, match=r"manifest\.jsonl: line 3: damaged"):
            SceneShards(packed)
    told = json.loads(lines[2])
    key = next(iter(told["latents"]))
    entries = [
        5,
        [5, [2], 0],
        ["../a.safetensors", [2], 0],
        ["a", "abc", 0],
        ["a", [2.5], 0],
        ["a", [2]],
        ["a", [2], "0"],
    ]
    wrong = [{"latents": told["latents"] | {key: entry}} for entry in entries]
    for change in ({"scene": 5}, {"file": 5}, {"latents": 5}, {"text": []}, *wrong):
        file.write_text("\n".join([*lines[:2], json.dumps(told | change), *lines[3:]]))
        with pytest.raises(ValueError, match=r"manifest\.jsonl: line 3: damaged"):
            SceneShards(packed)
    told["latents"] = {}
    file.write_text("\n".join([*lines[:2], json.dumps(told), *lines[3:]]))
    with pytest.raises(ValueError, match="no latents; pack the scenes again"):
        SceneShards(packed)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lct pack"):
        SceneShards(packed)


def test_a_scene_without_latents_is_told_before_anything_is_packed(folder, tmp_path):
    path = sorted(folder.iterdir())[0]
    scene = read_scene(path)
    (path / "latents.safetensors").unlink()
    shots = tuple(replace(shot, media=None) for shot in scene.shots)
    rewrite_scene(path, replace(scene, shots=shots))
    with pytest.raises(ValueError, match="shot 1: media"):
        write_shards(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
