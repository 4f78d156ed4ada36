"""From a film to a tuned model and back to diffusers, with tiny random pipelines: the guide's steps, one by one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from film import fetch_film
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lct.cli import main
from lct.data.ingest import ingest
from lct.data.scenefile import GlobalPrompt, SceneFile, ShotEntry, read_scene, rewrite_scene
from lct.data.video import read_video
from lct.pretrained import encode as encoding
from lct.pretrained import files
from lct.pretrained.encode import encode
from lct.pretrained.features import TEXT, FeatureTable, prompts_of
from lct.train.runs import run
from lct.train.trainer import Trainer
from lct.train.weights import load_model, load_weights, save_weights

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("scenedetect")

import pipelines

from lct.pretrained.pipeline import Pipeline

NAMES = ("hunyuan", "hunyuan15", "wan")
SHIFTS = {"hunyuan": 7.0, "hunyuan15": 5.0, "wan": 5.0}
FPS, FRAMES = 6.0, 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: getattr(pipelines, name)(root / name) for name in NAMES}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Two scenes of the film, their prompts written."""
    root = tmp_path_factory.mktemp("ingested") / "scenes"
    try:
        path = fetch_film()
    except OSError as error:
        pytest.skip(f"the film could not be fetched: {error}")
    ingest(path, root, side=64, stride=8, patch=2, fps=FPS, max_frames=FRAMES)
    for folder in sorted(root.iterdir())[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    for folder in root.iterdir():
        scene = read_scene(folder)
        shots = tuple(replace(shot, prompt=f"a shot of something, {i}") for i, shot in enumerate(scene.shots))
        rewrite_scene(
            folder, replace(scene, shots=shots, global_prompt=replace(scene.global_prompt, environment="sea"))
        )
    return root, path.parent


@pytest.fixture(scope="module")
def encoded(folders, scenes, tmp_path_factory):
    root = tmp_path_factory.mktemp("encoded")
    for name in NAMES:
        encode(scenes[0], Pipeline(folders[name]), scenes[1], root / name, 64, FPS, FRAMES)
    return lambda name: root / name


@pytest.mark.parametrize("name", NAMES)
def test_scenes_are_encoded_whole(name, encoded, folders, scenes):
    pipeline = Pipeline(folders[name])
    table = FeatureTable(encoded(name))
    for folder in sorted(scenes[0].iterdir()):
        before, after = read_scene(folder), read_scene(encoded(name) / folder.name)
        assert [s.prompt for s in after.shots] == [
            s.prompt for s in before.shots
        ] and after.codec == pipeline.codec.name
        latents = load_file(encoded(name) / folder.name / "latents.safetensors")
        for shot in after.shots:
            t, h, w = shot.size
            assert (t - 1) * pipeline.codec.time_stride + 1 <= FRAMES and not h % pipeline.config.patch[1]
            assert latents[f"{shot.media}.video"].shape == (*shot.size, pipeline.codec.channels)
            assert latents[f"{shot.media}.images"].shape[1:] == (h, w, pipeline.codec.channels)
        for prompt in ["", *prompts_of(before)]:
            rows = table.tokenize(prompt)
            assert rows.shape[1] == pipeline.config.text_row_channels
            assert torch.allclose(rows, pipeline.tokenize(prompt), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="was not encoded"):
        table.tokenize("another prompt")


def test_latents_are_the_films(encoded, folders, scenes):
    """The first shot's first frame, decoded from the film and encoded here, is the first latent frame of both kinds."""
    name, codec = "wan", Pipeline(folders["wan"]).codec
    folder = sorted(scenes[0].iterdir())[0]
    shot = read_scene(encoded(name) / folder.name).shots[0]
    frames = read_video(scenes[1] / read_scene(folder).source, resize=lambda h, w: (shot.size[1] * 8, shot.size[2] * 8))
    first = codec.encode_images(frames.frames[shot.frames[0]][None])[0]
    video = load_file(encoded(name) / folder.name / "latents.safetensors")["shot-0.video"]
    assert torch.allclose(video[0], first, atol=1e-4)


def test_encoding_goes_on_where_it_stopped(folders, scenes, tmp_path, monkeypatch):
    pipeline, out = Pipeline(folders["wan"]), tmp_path / "encoded"
    write, count = encoding.write_scene, []

    def broken(*arguments):
        count.append(1)
        if len(count) == 2:
            raise OSError("the disk is full")
        write(*arguments)

    monkeypatch.setattr(encoding, "write_scene", broken)
    with pytest.raises(OSError, match="full"):
        encode(scenes[0], pipeline, scenes[1], out, 64, FPS, FRAMES)
    whole = [path.name for path in out.iterdir() if path.is_dir()]
    assert len(whole) == 1
    stamp = (out / whole[0] / TEXT).stat().st_mtime_ns
    written = encode(scenes[0], pipeline, scenes[1], out, 64, FPS, FRAMES)
    assert len(written) == 1 and (out / whole[0] / TEXT).stat().st_mtime_ns == stamp
    assert encode(scenes[0], pipeline, scenes[1], out, 64, FPS, FRAMES) == []
    rows = load_file(out / whole[0] / TEXT)
    save_file({name: rows[name] for name in sorted(rows)[1:]}, out / whole[0] / TEXT)
    with pytest.raises(ValueError, match="was encoded with other prompts"):
        encode(scenes[0], pipeline, scenes[1], out, 64, FPS, FRAMES)


def test_what_is_encoded_otherwise_is_not_taken_for_finished(folders, scenes, tmp_path):
    pipeline, out, there = Pipeline(folders["wan"]), tmp_path / "encoded", tmp_path / "scenes"
    shutil.copytree(scenes[0], there)
    with pytest.raises(ValueError, match="out: expected a folder beside"):
        encode(there, pipeline, scenes[1], there / "encoded", 64, FPS, FRAMES)
    encode(there, pipeline, scenes[1], out, 64, FPS, FRAMES)
    scene_path = sorted(there.iterdir())[0]
    scene = read_scene(scene_path)
    (start, end), film = scene.shots[0].frames, scenes[1] / scene.source
    others = tmp_path / "films"
    shutil.copytree(scenes[1], others)
    shutil.copy(film, others / f"other{film.suffix}")

    def again(changed, side=64, where=out):
        rewrite_scene(scene_path, changed)
        return encode(there, pipeline, others, where, side, FPS, FRAMES)

    def framed(shot, frames):
        shots = list(scene.shots)
        shots[shot] = replace(shots[shot], frames=frames)
        return replace(scene, shots=tuple(shots))

    elsewhere = replace(scene, source=f"other{film.suffix}")
    assert again(scene) == []
    for changed, side in ((scene, 128), (framed(0, (start + 1, end)), 64), (elsewhere, 64)):
        with pytest.raises(ValueError, match="was encoded with other prompts, frames, sizes"):
            again(changed, side)
    with pytest.raises(ValueError, match="shot 2: expected frames from"):
        again(replace(scene, shots=(scene.shots[0], scene.shots[0])), where=tmp_path / "overlapping")
    with pytest.raises(ValueError, match="the film ends before; is it another film"):
        again(framed(-1, (10**6, 10**6 + 9)), where=tmp_path / "beyond")


@given(st.lists(st.integers(4, 60), min_size=2, max_size=9), st.floats(1.0, 3.2), st.integers(0, 40))
def test_nothing_is_lost_between_segments(lengths, step, start):
    """A segment without cut begins where the latents of the last one end, and all of it fits in whole strides."""
    ends = [start + sum(lengths[: i + 1]) for i in range(len(lengths))]
    shots = [ShotEntry("", False, frames=span) for span in zip([start, *ends], ends, strict=False)]
    plans = encoding._plans(Path(), SceneFile(GlobalPrompt(), tuple(shots)), 200, step, 4)
    assert [p.span[0] for p in plans] == [start, *(p.span[1] for p in plans[:-1])]
    assert all(len(p.video) % 4 == 1 for p in plans) and ends[-1] - plans[-1].span[1] <= 4 * step


@pytest.mark.parametrize("first_is_cut", [True, False])
def test_a_shot_that_another_goes_on_from_is_not_cut_short(first_is_cut):
    def planned(*shots):
        entries = tuple(ShotEntry("", cut, frames=span) for cut, span in shots)
        return [p.span for p in encoding._plans(Path("film"), SceneFile(GlobalPrompt(), entries), 33, 1.0, 4)]

    long, next_, last = (first_is_cut, (0, 60)), (False, (60, 90)), (False, (90, 200))
    with pytest.raises(ValueError, match="shot 1 of film is 27 frames longer than 33, and shot 2 .* raise it, or ing"):
        planned(long, next_)
    assert planned(long, (True, next_[1])) == [(0, 33), (60, 89)]
    assert planned((first_is_cut, (27, 60)), next_, last) == [(27, 60), (60, 89), (89, 122)]


def test_what_cannot_be_encoded_is_told_first(folders, scenes, tmp_path):
    pipeline = Pipeline(folders["wan"])
    with pytest.raises(FileNotFoundError, match="no such film"):
        encode(scenes[0], pipeline, tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="fps: expected at most"):
        encode(scenes[0], pipeline, scenes[1], tmp_path / "out", fps=1000.0)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        Pipeline(tmp_path)


def test_text_encoders_go_before_sampling_begins(folders):
    pipeline = Pipeline(folders["wan"])
    pipeline.prepare(["a boat", "", "a boat"])
    assert "_text" not in vars(pipeline)
    rows = pipeline.tokenize("a boat")
    assert "_text" not in vars(pipeline) and torch.equal(rows, Pipeline(folders["wan"]).tokenize("a boat"))


def test_another_pipelines_features_are_not_mixed(encoded, folders, scenes, tmp_path):
    out = tmp_path / "encoded"
    out.mkdir()
    shutil.copy(encoded("hunyuan15") / TEXT, out / TEXT)
    other = pipelines.hunyuan15(tmp_path / "other", seed=1)
    for pipeline in (folders["wan"], other):
        with pytest.raises(ValueError, match="another pipeline"):
            encode(scenes[0], Pipeline(pipeline), scenes[1], out, 64, FPS, FRAMES)


SHOTS = """
[global]
environment = "sea"
[[shot]]
prompt = "a boat"
cut = true
size = [3, 8, 8]
[[shot]]
prompt = "a gull"
cut = true
size = [3, 8, 8]
"""


@pytest.mark.parametrize("name", NAMES)
def test_an_open_model_as_released(name, folders, tmp_path):
    """It knows single shots: each shot of a scene is what it makes of that shot alone, without mark or global prompt;
    directing makes the same."""
    alone = '[[shot]]\ncut = true\nprompt = "sea. a gull"\nsize = [3, 8, 8]\nseed = 1\n'
    scenes = {"scene": SHOTS, "second": SHOTS.replace("a boat", "a whale"), "alone": alone}
    made = []
    for scene, text in scenes.items():
        (tmp_path / f"{scene}.toml").write_text(text)
        command = ["sample", tmp_path / f"{scene}.toml", "--weights", folders[name]]
        assert main([*map(str, command), "--steps", "2", "--out", str(tmp_path / f"{scene}-made")]) == 0
        made.append(load_file(tmp_path / f"{scene}-made" / "scene" / "latents.safetensors"))
    _, config = load_model(folders[name])
    assert (config.visibility, config.text_scale, config.shift) == ("isolated", 0.0, SHIFTS[name])
    assert np.array_equal(made[0]["shot-1.video"], made[1]["shot-1.video"])
    assert np.allclose(made[0]["shot-1.video"], made[2]["shot-0.video"], atol=1e-5)
    project = tmp_path / "project"
    begin = ["--weights", folders[name], "--project", project, "--steps", "2", "make", "2"]
    assert main([str(x) for x in ("direct", tmp_path / "scene.toml", *begin)]) == 0
    (take,) = (project / "takes").iterdir()
    assert np.allclose(load_file(take / "latents.safetensors")["video"], made[2]["shot-0.video"], atol=1e-5)
    assert not np.array_equal(made[0]["shot-0.video"], made[1]["shot-0.video"])


@pytest.mark.parametrize("name", NAMES)
def test_directing_with_an_open_model(name, folders, scenes, tmp_path):
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "scene.toml").write_text(SHOTS)
    project, film = tmp_path / "project", next(scenes[1].glob("*.mp4"))
    begin = ["--weights", folders[name], "--pipeline", folders[name], "--project", project, "--steps", "1"]
    assert main([str(x) for x in ("direct", tmp_path / "scene", *begin, "make", "1")]) == 0
    for action in (["give", "2", film], ["extend", "a wave"], ["export", tmp_path / "cut"]):
        assert main([str(x) for x in ("direct", project, *action)]) == 0
    codec = Pipeline(folders[name]).codec
    assert read_scene(tmp_path / "cut" / "scene").codec == codec.name
    frames = 1 + 2 * codec.time_stride
    for shot in range(1, 4):
        shown = read_video(tmp_path / "cut" / f"shot-{shot}.mp4").frames
        assert shown.shape == (frames, 8 * codec.stride, 8 * codec.stride, 3)


def tuned(name, stage, folder, source, steps=20, **changes):
    base = run(stage)
    if base.text_scale_steps:
        changes = {"text_scale_steps": steps // 2} | changes
    kinds = {"single": 0.5, "cut": 0.5, "no_cut": 0.0}
    data = replace(base.data, source=str(source), shots=3, **kinds)
    config = replace(
        base, data=data, init=str(folder), steps=steps, scenes=2, warmup=2, save_every=10, lr=3e-3,
        compute_dtype="float32", **changes,
    )  # fmt: skip
    return config


@pytest.mark.parametrize(
    ("name", "stage"), [("hunyuan", "hunyuan15_lct"), ("hunyuan15", "hunyuan15_lct"), ("wan", "wan5b_lct")]
)
def test_the_guide(name, stage, folders, encoded, tmp_path, capsys):
    """Tune low-rank changes for twenty steps, resume, generate a shot, decode it to mp4, and hand it to diffusers."""
    config = tuned(name, stage, folders[name], encoded(name), lora=4)
    trainer = Trainer(config, tmp_path / "run")
    assert all("down" in n or "up" in n for n in trainer.trained)
    trainer.run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 20 and np.isfinite(losses).all()
    checkpoint = tmp_path / "run" / "step-0000020"
    assert sum(f.stat().st_size for f in (checkpoint / "ema").iterdir()) < 400_000  # low-rank changes alone
    again = Trainer(config, tmp_path / "run")
    assert again.resume() and again.step == 20
    assert all(torch.equal(a, b) for a, b in zip(again.trained.values(), trainer.trained.values(), strict=True))

    scene = tmp_path / "scene"
    scene.mkdir()
    size = [3, 8, 8]
    (scene / "scene.toml").write_text(
        f'[global]\nenvironment = "sea"\n[[shot]]\nprompt = "a boat"\ncut = true\nsize = {size}\n'
        f'[[shot]]\nprompt = "a gull"\ncut = true\nsize = {size}\n'
    )
    command = [
        "sample",
        str(scene),
        "--weights",
        str(tmp_path / "run"),
        "--pipeline",
        str(folders[name]),
        "--steps",
        "2",
    ]
    assert main([*command, "--out", str(tmp_path / "made"), "--fps", "8"]) == 0
    codec = Pipeline(folders[name]).codec
    moved = shutil.copytree(folders[name], tmp_path / "moved")  # low-rank changes find their base where it is named
    share = tmp_path / "share.safetensors"
    save_weights(share, *load_weights(tmp_path / "run"))
    two = replace(config, init=str(tmp_path / "run"), text_scale_start=None, text_scale_steps=0, steps=2, save_every=2)
    Trainer(two, tmp_path / "second").run()
    second = [*command, "--weights", str(tmp_path / "second"), "--pipeline", str(moved)]
    assert main([*second, "--out", str(tmp_path / "second-made")]) == 0
    again = [*command, "--pipeline", str(moved), "--weights", str(share), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    other = getattr(pipelines, name)(tmp_path / "other", seed=1)
    capsys.readouterr()
    assert main([*again, "--pipeline", str(other), "--out", str(tmp_path / "wrong")]) == 2
    assert "trained beside other weights" in capsys.readouterr().err
    shown = read_video(tmp_path / "made" / "shot-1.mp4")
    frames = 1 + (size[0] - 1) * codec.time_stride
    assert shown.frames.shape == (frames, size[1] * codec.stride, size[2] * codec.stride, 3)

    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "transformer"), "--dtype", "float32"]) == 0
    import diffusers

    kind = type(diffusers.DiffusionPipeline.from_pretrained(folders[name]).transformer)
    exported = kind.from_pretrained(tmp_path / "transformer")
    model, _ = load_model(tmp_path / "run")
    reloaded = files.load(tmp_path / "transformer")
    assert all(torch.equal(w, reloaded.state_dict()[key]) for key, w in model.state_dict().items())
    before = kind.from_pretrained(folders[name], subfolder="transformer").state_dict()
    changed = {key for key, w in exported.state_dict().items() if not torch.equal(w, before[key])}
    assert changed and all("attn" in key or "proj_out" in key for key in changed)


def test_all_weights_can_be_tuned_and_tuned_further(folders, encoded, tmp_path):
    """Full tuning, then the causal stage from it with low-rank changes."""
    first = replace(tuned("hunyuan15", "hunyuan15_lct", folders["hunyuan15"], encoded("hunyuan15"), 2), lora=0)
    first = replace(first, text_scale_start=None, text_scale_steps=0)
    Trainer(first, tmp_path / "first").run()
    second = tuned("hunyuan15", "hunyuan15_lct_causal", tmp_path / "first", encoded("hunyuan15"), 2, lora=2)
    Trainer(second, tmp_path / "second").run()
    model, config = load_model(tmp_path / "second")
    assert config.visibility == "context_causal" and model.config.family == "hunyuan"
    base = load_model(tmp_path / "first")[0]
    changed = {n for n, w in model.state_dict().items() if not torch.equal(w, base.state_dict()[n])}
    assert changed and all(n.startswith("blocks.") for n in changed)
    # and all weights from there on, the low-rank changes merged
    third = Trainer(replace(second, init=str(tmp_path / "second"), lora=0), tmp_path / "third")
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in third.trained.items()) and len(third.trained) > 50
    third.train_step()
    assert model.config.others == base.config.others != "{}"
    for path in (tmp_path / "second", folders["hunyuan15"]):  # products alone are kept in half precision
        whole, small = load_model(path)[0], load_model(path, dtype="float16")[0]
        products = whole.stream_weights()
        for key, w in whole.named_parameters():
            assert small.get_parameter(key).dtype == (torch.float16 if key in products else w.dtype)
            assert torch.equal(small.get_parameter(key), w.to(small.get_parameter(key).dtype))


def test_weights_on_the_way_are_used_at_the_positions_they_have_come_to(folders, encoded, tmp_path):
    config = tuned(
        "hunyuan15", "hunyuan15_lct", folders["hunyuan15"], encoded("hunyuan15"), 20, lora=2, text_scale_steps=20
    )
    trainer = Trainer(config, tmp_path / "run")
    while trainer.step < 10:
        trainer.train_step()
    trainer.save()
    assert load_model(tmp_path / "run")[1].text_scale == 0.5
    with pytest.raises(ValueError, match="text_scale_steps: expected at most 10"):
        replace(config, steps=10)


def test_half_precision_beside_frozen_weights(folders, encoded, tmp_path):
    """As on a GPU: bf16 weights and streams, fp32 changes."""
    model = files.load(folders["wan"], dtype=torch.bfloat16)
    files.save(model, tmp_path / "half")
    config = tuned("wan", "wan5b_lct", tmp_path / "half", encoded("wan"), 2, lora=2)
    trainer = Trainer(replace(config, compute_dtype="bfloat16"), tmp_path / "run")
    assert trainer.model.video_in.weight.dtype == torch.bfloat16
    assert {w.dtype for w in trainer.trained.values()} == {torch.float32}
    trainer.run()
    assert np.isfinite([w.abs().max().item() for w in trainer.trained.values()]).all()


def test_another_pipelines_scenes_are_not_taken_for_finished(folders, scenes, encoded):
    with pytest.raises(ValueError, match="another pipeline"):
        encode(scenes[0], Pipeline(folders["hunyuan15"]), scenes[1], encoded("wan"), 64, FPS, FRAMES)


def test_another_models_features_are_refused(folders, encoded, tmp_path):
    config = tuned("wan", "hunyuan15_lct", folders["hunyuan15"], encoded("wan"))
    with pytest.raises(ValueError, match="text features of"):
        Trainer(replace(config, data=replace(config.data, single=1.0, cut=0.0)), tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / TEXT).write_bytes(b"0123456789")
    with pytest.raises(ValueError, match="damaged or cut off"):
        FeatureTable(damaged)
    with pytest.raises(FileNotFoundError, match="lct encode"):
        FeatureTable(tmp_path / "nothing")
