"""Flow, batches, the loop, checkpoints: identities of the path, purity of the draws, bitwise resume, damage named."""

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lct.data.batch import _substituted, draw_scene, pack, pack_drawn
from lct.data.toy import ToyScenes
from lct.model.config import tiny
from lct.model.flow import noised, shift_time, shot_losses, shot_shift
from lct.model.mmdit import MMDiT
from lct.train.checkpoint import checkpoints, latest, newest_whole, verify
from lct.train.config import TrainConfig
from lct.train.runs import PRETRAINED, RUNS, paper_lct, paper_lct_causal, paper_text_rope, run, tiny_lct, tiny_pretrain
from lct.train.trainer import Trainer, shot_errors
from lct.train.weights import config_of, load_model, load_weights, save_weights

PATCH = tiny().patch
MIXTURE = {"single": 1.0, "cut": 1.0, "no_cut": 2.0}


def small(**changes) -> TrainConfig:
    model = replace(tiny(), blocks=1, width=32, heads=1, kv_heads=1, mlp_width=64)
    config = replace(tiny_lct(), model=model, init=None, steps=6, scenes=3, save_every=3, warmup=2)
    return replace(config, **changes)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def tokenizer():
    return MMDiT(replace(tiny(), blocks=1)).text_encoder.tokenize


def batch(step=0, seed=0, scenes=4, **probabilities):
    options = {"image_probability": 0.3, "drop_probability": 0.3} | probabilities
    toy = ToyScenes()
    drawn = [draw_scene(toy, MIXTURE, **options, seed=seed, step=step, slot=slot) for slot in range(scenes)]
    return pack_drawn(drawn, tokenizer(), PATCH, "context_causal")


# -- flow --------------------------------------------------------------------------------------------------------------


def test_the_path_runs_from_data_to_noise_at_constant_velocity():
    z_0, noise, t = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    path = noised(z_0, noise, t)
    assert torch.equal(path.z_t[0], z_0[0]) and torch.equal(path.z_t[-1], noise[-1])
    assert torch.allclose(path.z_t - t[:, None] * path.target, z_0, atol=1e-6)


def test_shot_losses_are_means_over_each_shots_own_rows():
    velocity, target, shot = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 0, 0, 2, 2, 2])
    by_hand = [((velocity[a:b] - target[a:b]) ** 2).mean() for a, b in ((0, 3), (3, 6))]
    assert torch.allclose(
        shot_losses(velocity, target, shot, 3), torch.stack([by_hand[0], torch.tensor(0.0), by_hand[1]])
    )


def test_time_shift_keeps_the_ends_and_moves_the_middle():
    u = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(shift_time(u, 1.0), u)
    assert torch.allclose(shift_time(u, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert shot_shift(3.0, 400, 100) == 6.0 and shot_shift(3.0, 400) == 3.0


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone():
    a, b, other = batch(step=3), batch(step=3), batch(step=4)
    assert a.layout == b.layout and a.layout != other.layout
    for name in ("latents", "tokens", "places", "normal", "noise"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_a_slot_does_not_depend_on_the_size_of_the_batch():
    few, many = batch(scenes=2), batch(scenes=5)
    rows = sum(shot.video_rows for scene in few.layout.scenes for shot in scene)
    assert few.layout.scenes == many.layout.scenes[:2]
    assert torch.equal(few.noise, many.noise[:rows]) and torch.equal(few.latents, many.latents[:rows])


def test_shares_of_the_mixture_and_of_images_are_those_asked_for():
    layouts = [scene for step in range(60) for scene in batch(step=step, scenes=10, drop_probability=0.0).layout.scenes]
    single = np.mean([scene[0].role == "shot" for scene in layouts])
    shots = [shot for scene in layouts for shot in scene if shot.role == "shot"]
    images = np.mean([shot.video[0] == 1 for shot in shots])
    assert abs(single - 0.25) < 0.06 and abs(images - 0.3) < 0.05


def test_dropped_prompts_are_the_null_prompt_and_images_are_frames_of_their_shot():
    all_dropped = batch(drop_probability=1.0, image_probability=1.0)
    assert all(shot.text == 1 for shot in all_dropped.layout.shots)
    assert all(shot.video == (1, 4, 4) for shot in all_dropped.layout.shots if shot.role == "shot")
    sample = ToyScenes().sample("cut", np.random.default_rng(0))
    stills = tuple(replace(shot, images=shot.latents[:2] + 2) for shot in sample.shots)  # encoded apart from the clip
    substituted = _substituted(replace(sample, shots=stills), 1.0, np.random.default_rng(0))
    for shot, still in zip(substituted.shots, stills, strict=True):
        assert any(np.array_equal(shot.latents, image[None]) for image in still.images)


def test_the_dummy_video_of_a_global_prompt_is_zero_and_has_no_loss():
    sample = ToyScenes().sample("cut", np.random.default_rng(0), shots=2)
    packed = pack([sample], tokenizer(), PATCH, "bidirectional")
    assert packed.is_shot.tolist() == [False, True, True] and not packed.latents[0].any()
    b = batch(scenes=3)
    model = MMDiT(replace(tiny(), blocks=1)).double()
    torch.nn.init.normal_(model.video_out.weight)
    times = torch.full((len(b.layout.shots),), 0.5)
    noisy = replace(b, noise=torch.where(b.is_shot[b.layout.streams().video_shot][:, None], b.noise, 1e6))
    losses = [shot_errors(model, x, times, 1.0, torch.float64, "auto").total / x.losses for x in (b, noisy)]
    assert losses[0] == losses[1]


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_resume_gives_bitwise_the_same_losses_and_weights(tmp_path):
    Trainer(small(), tmp_path / "whole").run()
    first = Trainer(small(), tmp_path / "parts")
    for _ in range(5):  # dies between two checkpoints
        record = first.train_step()
        with (tmp_path / "parts" / "log.jsonl").open("a") if first.step > 1 else _log(tmp_path / "parts") as log:
            log.write(record.line() + "\n")
        if first.step == 3:
            first.save()
    second = Trainer(small(), tmp_path / "parts")
    assert second.resume() and second.step == 3
    second.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    a, b = (load_weights(tmp_path / name)[0] for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def _log(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "log.jsonl").open("a")


def test_loss_falls_on_toy_scenes(tmp_path):
    Trainer(small(steps=60, scenes=4, lr=3e-3, save_every=60), tmp_path).run()
    curve = losses(tmp_path)
    assert np.mean(curve[-10:]) < 0.7 * np.mean(curve[:3])


def test_a_step_takes_the_mean_over_its_shots(tmp_path):
    """Loss, loss by noise level and gradient are those of all its shots, each weighed alike."""
    trainer = Trainer(small(steps=2, scenes=6), tmp_path)
    ((batch, _),) = trainer.steps[0].passes
    times = trainer.times(batch)
    losses = shot_errors(trainer.model, batch, times, trainer.config.text_scale_at(0), trainer.dtype, "auto")
    (losses.total / int(batch.has_loss.sum())).backward()
    norm = torch.stack([w.grad.norm() for w in trainer.trained.values() if w.grad is not None]).norm()
    trainer.optimizer.zero_grad()
    record = trainer.train_step()
    own = [(min(int(4 * t), 3), x) for t, x, counts in zip(times, losses.each, batch.has_loss, strict=True) if counts]
    assert record.shots == len(own) > 6 and record.loss == pytest.approx(np.mean([x for _, x in own]), rel=1e-5)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for level, mean in enumerate(record.by_noise):
        of_level = [x for at, x in own if at == level]
        assert mean == (pytest.approx(np.mean(of_level), rel=1e-5) if of_level else None)


def test_float16_is_refused_for_its_gradients():
    with pytest.raises(
        ValueError, match="compute_dtype: expected float32 or bfloat16, got 'float16'; gradients in float16"
    ):
        small(compute_dtype="float16")


def test_resuming_with_another_configuration_is_refused(tmp_path):
    Trainer(small(steps=3), tmp_path).run()
    with pytest.raises(ValueError, match="lr="):
        Trainer(small(steps=3, lr=1.0), tmp_path).resume()


def test_the_papers_figures_stand_in_the_runs():
    lct, causal = paper_lct(), paper_lct_causal()
    assert (lct.steps, lct.data.shots, lct.visibility, lct.shift) == (135_000, 9, "bidirectional", 1.0)
    assert (causal.steps, causal.visibility, causal.init) == (9_000, "context_causal", "runs/paper_lct")
    assert lct.data.no_cut == pytest.approx(2 * lct.data.cut) and lct.data.single > 0
    rope = paper_text_rope()
    assert (rope.data.single, rope.data.cut + rope.data.no_cut, rope.text_scale) == (1.0, 0.0, 1.0)
    assert lct.init == f"runs/{rope.name}" and lct.model == causal.model == rope.model
    stages = [run(name) for name in ("tiny_pretrain", "tiny_text_rope", "tiny_lct", "tiny_causal")]
    assert [s.text_scale for s in stages] == [0.0, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="tiny_lct"):
        run("paper_ltc")
    assert set(RUNS) == {function().name for function in RUNS.values()}


@pytest.mark.parametrize("name", RUNS)
def test_an_average_has_forgotten_what_its_stage_began_with(name):
    """Else a causal stage would hand out weights that are still bidirectional in good part."""
    config = run(name)
    assert config.ema**config.steps < 0.01 and config.warmup <= config.steps / 5


def test_times_reach_history_however_they_are_shifted(tmp_path):
    """A shift of 5 all but leaves out shots as clean as history; a share without it keeps them."""
    drawn = [draw_scene(ToyScenes(), MIXTURE, 0.0, 0.0, 0, 0, slot) for slot in range(600)]

    def near_clean(trainer):
        c = trainer.config
        times = trainer.times(pack_drawn(drawn, tokenizer(), PATCH, "isolated", unshifted=c.unshifted))
        return float((times < 0.15).float().mean())

    plain, shifted, mixed = (
        near_clean(Trainer(small(shift=shift, unshifted=unshifted), tmp_path))
        for shift, unshifted in ((1.0, 0.0), (5.0, 0.0), (5.0, 0.5))
    )
    assert plain > 0.1 > 0.03 > shifted and plain / 2 < mixed < 0.7 * plain
    one = pack_drawn(drawn, tokenizer(), PATCH, "isolated", shared_time=True, unshifted=0.5)
    scenes = torch.tensor(one.layout.scene_of_shot)
    assert all(len(one.shifted[scenes == b].unique()) == 1 for b in range(600)) and len(one.shifted.unique()) == 2


def test_configurations_survive_json():
    for function in RUNS.values():
        config = function()
        assert TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    Trainer(small(steps=2, save_every=1), tmp_path / "run").run()
    return tmp_path / "run"


def test_a_flipped_bit_is_named_in_every_file(trained):
    folder = latest(trained)
    rng = np.random.default_rng(0)
    for file in [f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json"]:
        content = file.read_bytes()
        for position in rng.integers(len(content), size=5):
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{file.name}: damaged"):
                verify(folder)
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{file.name}: damaged"):
            verify(folder)
        if file.parent.name in ("ema", folder.name):  # all that weights are made of
            with pytest.raises(ValueError, match=f"{file.name}: damaged"):
                load_model(folder)
        file.write_bytes(content)
    assert verify(folder)["step"] == 2


def test_a_missing_file_or_manifest_is_named(trained):
    folder = latest(trained)
    next((folder / "ema").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"ema/.*safetensors: missing"):
        load_model(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: damaged"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a checkpoint"):
        verify(folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        latest(trained / "nowhere")


def test_an_interrupted_save_leaves_the_older_checkpoint_the_newest(tmp_path, monkeypatch):
    trainer = Trainer(small(steps=2, save_every=1), tmp_path)
    trainer.train_step()
    trainer.save()
    trainer.train_step()

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("lct.train.checkpoint.save", full_disk)
    with pytest.raises(OSError, match="step 2: it takes .* are missing; step-0000001 stands"):
        trainer.save()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-0000001"]
    assert verify(latest(tmp_path))["step"] == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_shared_weights_carry_their_configuration(trained, tmp_path):
    weights, config = load_weights(trained)
    save_weights(tmp_path / "w.safetensors", weights, config, torch.float16)
    model, again = load_model(tmp_path / "w.safetensors")
    assert again == config
    assert all(torch.equal(p, weights[name].half().float()) for name, p in model.named_parameters())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:500])
    for bad, match in (
        (tmp_path / "cut.safetensors", "not a weights file"),
        (tmp_path / "none.safetensors", "no such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            load_model(bad)


def test_a_configuration_is_read_without_weights(trained, tmp_path, monkeypatch):
    weights, config = load_weights(trained)
    save_weights(tmp_path / "w.safetensors", weights, config)
    monkeypatch.setattr("lct.train.weights.read_whole", lambda *_: pytest.fail("weights were read"))
    opened = safe_open(tmp_path / "w.safetensors", "pt").__enter__()
    only = SimpleNamespace(metadata=opened.metadata)  # no get_tensor, no keys
    monkeypatch.setattr("lct.train.weights.safe_open", lambda *_: nullcontext(only))
    assert config_of(tmp_path / "w.safetensors") == config_of(trained) == config


def test_weights_of_another_model_are_refused_by_name(trained, tmp_path):
    weights, config = load_weights(trained)
    save_weights(tmp_path / "w.safetensors", weights, config, torch.float32)
    wider = replace(config.model, width=64)
    with pytest.raises(ValueError, match=r"w.safetensors: weight .*expected shape"):
        Trainer(small(model=wider, init=str(tmp_path / "w.safetensors")), tmp_path / "out")
    with pytest.raises(ValueError, match=r"is missing"):
        Trainer(small(model=replace(config.model, blocks=2), init=str(tmp_path / "w.safetensors")), tmp_path / "out")


def test_a_loss_that_is_not_finite_changes_nothing_is_counted_and_never_saved(tmp_path):
    trainer = Trainer(small(steps=20), tmp_path)
    trainer.train_step()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.video_out.bias.data.fill_(float("inf"))
    record = trainer.train_step()
    assert (record.loss, record.grad_norm, record.skipped, trainer.step) == (None, None, 1, 2)
    assert json.loads(record.line())["loss"] is None
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["video_out.bias"]
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.save()
    assert not list(tmp_path.iterdir())
    trainer.model.video_out.bias.data.copy_(before["video_out.bias"])
    assert trainer.train_step().loss is not None and trainer.skipped == 1
    trainer.save()
    again = Trainer(small(steps=20), tmp_path)
    assert again.resume() and (again.step, again.skipped) == (3, 1)


def test_five_steps_in_a_row_that_are_not_finite_end_a_run(tmp_path):
    trainer = Trainer(small(steps=20, save_every=1), tmp_path)
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    trainer.times = lambda batch: torch.full((len(batch.layout.shots),), float("nan"))
    with pytest.raises(FloatingPointError, match="5 steps up to 7") as error:
        trainer.run()
    assert error.value.__notes__ == ["step 7 was saved"]  # the weights of step 2, which nothing changed
    ours, theirs = (load_weights(tmp_path / f"step-000000{step}")[0] for step in (2, 7))
    assert all(torch.equal(w, theirs[name]) for name, w in ours.items())
    trainer = Trainer(small(steps=20, save_every=1), tmp_path)
    trainer.resume()
    trainer.model.video_out.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        trainer.run()
    assert newest_whole(tmp_path)[1]["step"] == 7


def test_no_two_toy_words_share_a_bucket():
    model = MMDiT(tiny())
    words = {
        word
        for i in range(100)
        for word in _words(ToyScenes("three_characters").sample("cut", np.random.default_rng(i)))
    }
    assert len({int(model.text_encoder.tokenize(word)[0]) for word in words | {"[SHOT CUT]"}}) == len(words) + 1


def _words(sample):
    prompts = [sample.global_prompt, *(shot.prompt for shot in sample.shots)]
    return {word.lower() for prompt in prompts for word in re.findall(r"\w+", prompt)}


def test_a_changed_manifest_is_noticed(trained):
    folder = latest(trained)
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for change in ({"step": 9}, {"files": {}}, {"files": {"ema": 3}}, {"sha256": ""}):
        file.write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=r"manifest.json: damaged"):
            verify(folder)


@pytest.mark.parametrize("saved", [True, False], ids=["with a checkpoint", "before the first"])
def test_a_log_cut_off_by_a_crash_does_not_stop_a_resume(tmp_path, saved):
    trainer = Trainer(small(save_every=2), tmp_path)
    lines = [trainer.train_step().line() for _ in range(2)]
    if saved:
        trainer.save()
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    resumed = Trainer(small(save_every=2), tmp_path)
    assert resumed.resume() == saved
    resumed.run()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_prompts_are_dropped_shot_by_shot_and_scene_by_scene():
    """Guidance nulls one shot at a time, or, in joint denoising, all of them: both occur in training."""
    scenes = [s for step in range(80) for s in batch(step=step, scenes=8, drop_probability=0.3).layout.scenes]
    dropped = [[shot.text == 1 for shot in s if shot.role == "shot"] for s in scenes if len(s) > 3]
    assert np.mean(np.concatenate(dropped)) == pytest.approx(0.3, abs=0.05)
    assert 0.1 < np.mean([all(d) for d in dropped]) < 0.25
    assert np.mean([any(d) and not all(d) for d in dropped]) > 0.2


def test_a_run_says_before_training_what_its_scenes_lack(tmp_path):
    from lct.data.scenefile import SceneFile, ShotEntry, write_scene

    video = np.zeros((2, 6, 8, 3), np.float32)
    write_scene(tmp_path / "a", SceneFile(None, (ShotEntry("", False, (2, 6, 8), media="m"),)), {"m.video": video})
    folder = replace(small().data, source=str(tmp_path), single=1.0, cut=0.0, no_cut=0.0)
    with pytest.raises(ValueError, match=r"shot 1: the patch \(1, 4, 4\) does not divide .*--patch 4"):
        Trainer(small(data=folder), tmp_path / "out")
    with pytest.raises(ValueError, match="expected a scene of 2 shots with cuts for kind 'cut'"):
        Trainer(small(data=replace(folder, cut=1.0)), tmp_path / "out")


def test_the_committed_weights_are_those_of_the_run_that_makes_them():
    """Changing the tiny model or its run without `make pretrained` leaves weights that say they are something else."""
    weights, config = load_weights(PRETRAINED)
    assert config == tiny_pretrain()
    assert {name: w.shape for name, w in weights.items()} == {n: w.shape for n, w in MMDiT(tiny()).state_dict().items()}
    assert sum(w.numel() * w.element_size() for w in weights.values()) <= 4 * 2**20


def test_a_run_does_not_begin_anew_over_checkpoints(tmp_path):
    Trainer(small(steps=3), tmp_path).run()
    again = Trainer(small(steps=3), tmp_path)
    for use in (again.run, again.train_step, again.save, again.averaged, again.averaged_weights().__enter__):
        with pytest.raises(ValueError, match="holds checkpoints; resume"):
            use()


def test_a_run_sees_checkpoints_that_came_after_it_was_made(tmp_path):
    first, second = Trainer(small(steps=3), tmp_path), Trainer(small(steps=3, seed=5), tmp_path)
    first.run()
    with pytest.raises(ValueError, match="holds checkpoints; resume"):
        second.run()


def test_no_weights_are_drawn_where_they_are_read(tmp_path):
    """Of a large model that takes longer than reading them; torch's generator tells."""
    Trainer(small(steps=3), tmp_path / "run").run()
    weights, config = load_weights(tmp_path / "run")
    save_weights(tmp_path / "shared.safetensors", weights, config)
    state = torch.get_rng_state()
    for path in (tmp_path / "run", tmp_path / "shared.safetensors"):
        model, stored = load_model(path)[0], load_weights(path)[0]
        assert all(torch.equal(weight, stored[name].float()) for name, weight in model.named_parameters())
    assert Trainer(small(steps=3), tmp_path / "run").resume()
    Trainer(small(steps=3, init=str(tmp_path / "run")), tmp_path / "next")
    assert torch.equal(torch.get_rng_state(), state)
    Trainer(small(steps=3), tmp_path / "new")
    assert not torch.equal(torch.get_rng_state(), state)
