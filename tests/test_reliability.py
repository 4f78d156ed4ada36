"""Training loses nothing: kills, signals, flipped bits, full disks, damaged scenes, processes that end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import SLOW, small, start
from soak import PHASES, soak

from lct.data.folder import SceneFolder
from lct.data.scenefile import SceneFile, ShotEntry, write_scene
from lct.train.checkpoint import checkpoints, newest_whole, prune, read_whole, sweep, verify
from lct.train.execution import Execution
from lct.train.record import StepRecord
from lct.train.trainer import Trainer
from lct.train.weights import load_weights

HERE = Path(__file__).parent


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints of two processes."""
    out = tmp_path_factory.mktemp("run")
    start(2, "train", out, "{}", json.dumps({"steps": 3, "save_every": 1}))
    return out


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_kills_at_random_moments():
    found = soak(15, seed=1)
    assert found["unloadable"] == [] and found["last step"] > 0
    assert found["most steps lost"] <= found["steps between checkpoints"]
    assert len(set(found["by phase"]) & set(PHASES)) >= 3


def test_every_flipped_bit_and_truncation_is_noticed(run):
    folder, rng = newest_whole(run)[0], random.Random(0)
    files = [file for file in folder.rglob("*") if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    assert {file.parent.name for file in files} == {folder.name, "model", "ema", "optimizer"}
    noticed = 0
    for attempt in range(500):
        (file,) = rng.choices(files, sizes)
        content = file.read_bytes()
        if attempt % 5:
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            damaged = content[: rng.randrange(len(content))]
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file.name}: damaged"):
            verify(folder)
        noticed += 1
        file.write_bytes(content)
    assert noticed == 500 and verify(folder)["step"] == 3


def test_the_next_older_one_is_taken_for_a_damaged_one_and_a_named_one_never_replaced(run):
    newest = newest_whole(run)[0]
    file = next((newest / "ema").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    try:
        with pytest.warns(UserWarning, match=r"step-0000003/ema/.*damaged.*going on with step-0000002"):
            assert newest_whole(run)[0].name == "step-0000002"
        with pytest.warns(UserWarning, match="going on with"):
            weights, _ = load_weights(run)
        assert all(torch.equal(w, load_weights(run / "step-0000002")[0][name]) for name, w in weights.items())
        with pytest.raises(ValueError, match="damaged"):
            load_weights(newest)
        assert newest_whole(run, "model")[0] == newest  # of which nothing is damaged
    finally:
        file.write_bytes(content)


def test_resuming_goes_on_from_the_next_older_one(tmp_path):
    config = small(steps=6, save_every=2)
    Trainer(config, tmp_path).run()
    before = log(tmp_path)
    file = next((newest_whole(tmp_path)[0] / "optimizer").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    again = Trainer(config, tmp_path)
    with pytest.warns(UserWarning, match="going on with step-0000004"):
        assert again.resume() and again.step == 4
    assert len(log(tmp_path)) == 4
    again.train_step()
    records = [again.train_step()]
    assert records[0].loss == before[-1]["loss"]


def test_two_complete_ones_always_stay(tmp_path):
    Trainer(small(steps=6, save_every=1), tmp_path, execution=Execution(keep=3)).run()
    assert [f.name for f in checkpoints(tmp_path)] == ["step-0000004", "step-0000005", "step-0000006"]
    assert (tmp_path / "latest").resolve().name == "step-0000006"
    (tmp_path / "step-0000007").mkdir()  # not complete: it counts as none
    prune(tmp_path, 1)
    assert [f.name for f in checkpoints(tmp_path)] == ["step-0000005", "step-0000006", "step-0000007"]
    (tmp_path / ".step-0000008.0a.tmp").mkdir()
    sweep(tmp_path)
    assert not list(tmp_path.glob(".step*"))


def test_a_checkpoint_written_beside_the_training_is_the_same(tmp_path):
    for name, beside in (("plain", False), ("beside", True)):
        Trainer(small(steps=6, save_every=2), tmp_path / name, execution=Execution(save_beside=beside)).run()
    for folder in checkpoints(tmp_path / "plain"):
        for group in ("model", "ema", "optimizer"):
            mine, theirs = (read_whole(tmp_path / name / folder.name, group) for name in ("plain", "beside"))
            assert mine.keys() == theirs.keys() and all(torch.equal(w, theirs[name]) for name, w in mine.items())


def test_what_goes_wrong_beside_the_training_ends_it(tmp_path, monkeypatch):
    trainer = Trainer(small(steps=6, save_every=2), tmp_path, execution=Execution(save_beside=True))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lct.train.checkpoint.save", full)
    with pytest.raises(OSError, match=r"no space left for the checkpoint of step 2: .* there is none yet"):
        trainer.run()
    assert not checkpoints(tmp_path) and not list(tmp_path.glob(".step*"))


TINY_DISK = """
import sys; sys.path.insert(0, {tests!r})
from processes import small
from lct.train import checkpoint
from lct.train.checkpoint import newest_whole
from lct.train.trainer import Trainer
checkpoint.SPARE, begin = 0, checkpoint.Saver._begin
if {blind}:
    checkpoint.Saver._begin = lambda self, folder, need: begin(self, folder, 0)
try:
    Trainer(small(steps=200, save_every=1), {out!r}).run()
except OSError as error:
    print(error)
    print(newest_whole(__import__("pathlib").Path({out!r}))[0].name)
"""


@pytest.mark.parametrize("blind", [True, False], ids=["found while writing", "found before"])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, blind):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = TINY_DISK.format(tests=str(HERE), out=str(disk / "run"), blind=blind)
    apart = ["unshare", "--user", "--mount", "--map-root-user"]
    mounted = ["sh", "-c", f'mount -t tmpfs -o size=3m none {disk} && exec "$0" "$@"']
    try:
        probe = subprocess.run([*apart, *mounted, "true"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("unshare is not there")
    if probe.returncode:
        pytest.skip(f"no file system of one's own can be made here: {probe.stderr.decode()[:80]}")
    done = subprocess.run([*apart, *mounted, sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    said, *newest = done.stdout.splitlines()
    assert "no space left for the checkpoint of step" in said and "are missing; step-" in said, done.stderr[-2000:]
    assert newest == [said.split("; ")[-1].removesuffix(" stands")]
    assert int(newest[0].removeprefix("step-")) == int(said.split("step ")[1].split(":")[0]) - 1


# -- signals and ends --------------------------------------------------------------------------------------------------


def waited(process, file: Path, words: str) -> None:
    deadline = time.monotonic() + 90
    while not (file.exists() and words in file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.005)


@pytest.mark.parametrize("phase", ["reading", "first step", "step", "write", "sample"])
@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_saves_and_ends(phase, count, tmp_path):
    """In every phase: a complete checkpoint of the step it was in or the next, and the status that tells the signal."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, str(HERE / "processes.py"), "slow", str(tmp_path), phase]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        waited(process, tmp_path / "phase", phase)
        before = len(log(tmp_path)) if (tmp_path / "log.jsonl").exists() else 0
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    manifest = newest_whole(tmp_path)[1]
    assert manifest["step"] == len(log(tmp_path) if (tmp_path / "log.jsonl").exists() else []) <= before + 1
    told = [line.split() for line in (tmp_path / "left").read_text().splitlines()]
    assert [code for code, _ in told] == ["143"] * count
    steps = max((line["seconds"] for line in log(tmp_path)), default=0.0) if manifest["step"] else 0.0
    # the phase, a step, a save; a sample would take minutes
    assert max(float(seconds) for _, seconds in told) < steps + SLOW + 1.0


def test_a_process_that_dies_ends_the_others_with_one_message(tmp_path):
    done = start(2, "dies", tmp_path, check=False, timeout=120)
    assert done.returncode
    lines = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    assert len(lines) == 1 and "process 0 of 2: another one ended after step" in lines[0]
    assert "it goes on from step-0000002" in lines[0] and newest_whole(tmp_path)[1]["step"] == 2


def test_an_error_of_one_process_ends_it_though_others_wait_for_it(tmp_path):
    done = start(2, "fails_alone", tmp_path, check=False, timeout=120)
    assert done.returncode and "told:" not in done.stdout
    assert done.stderr.count("RuntimeError: of this one alone\n") == 1


ENDS = {143: "raise Stopped(15, 3, 0.1)", 1: "raise RuntimeError('of it')", 0: "return 0"}


@pytest.mark.parametrize("code", ENDS)
def test_a_command_that_did_not_leave_its_group_ends_the_program_with_its_own_code(code):
    done = grouped("def work(_):", "    group()", f"    {ENDS[code]}", "cli._main = work", "cli.main([])", "print(1)")
    assert done.returncode == code and not done.stdout
    assert ("RuntimeError: of it" in done.stderr) == (code == 1) and ("Traceback" in done.stderr) == (code == 1)


def test_a_command_within_a_group_that_it_did_not_make_returns(tmp_path):
    mask = f"cli.main(['mask', '9:1x2x2', '--out', {str(tmp_path / 'mask.png')!r}])"
    done = grouped("group()", f"code = {mask}", "print('goes on', code)")
    assert done.stdout.splitlines()[-1] == "goes on 0", done.stderr


def grouped(*lines):
    """Run lines of a program that can be one of a group of processes, itself alone in it."""
    begin = (
        "import torch.distributed as dist",
        "from lct import cli",
        "from lct.train.interrupts import Stopped",
        "group = lambda: dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
    )
    return subprocess.run([sys.executable, "-c", "\n".join([*begin, *lines])], capture_output=True, text=True)


def test_a_run_that_was_stopped_before_its_first_step_goes_on(tmp_path):
    first = Trainer(small(steps=2), tmp_path)
    first.interrupts.number = signal.SIGTERM
    with pytest.raises(SystemExit):
        first.run()
    again = Trainer(small(steps=2), tmp_path)
    assert again.resume() and again.step == 0
    again.run()
    assert newest_whole(tmp_path)[1]["step"] == 2


# -- data --------------------------------------------------------------------------------------------------------------


def scenes(root: Path, count: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        shots = tuple(ShotEntry(f"shot {s}", True, (2, 8, 8), media=f"m{s}") for s in range(3))
        latents = {f"m{s}.video": rng.standard_normal((2, 8, 8, 3), np.float32) for s in range(3)}
        latents |= {f"m{s}.images": rng.standard_normal((4, 8, 8, 3), np.float32) for s in range(3)}
        write_scene(root / f"scene-{i}", SceneFile(None, shots), latents)
    return root


def of_folder(root: Path, **changes):
    config = small(scenes=4, **changes)
    return replace(config, data=replace(config.data, source=str(root), single=0.3, cut=0.7, no_cut=0.0, shots=3))


@pytest.mark.parametrize("harm", ["gone", "cut off", "not finite"])
def test_a_damaged_scene_is_named_and_stops_the_run_or_is_left_out(tmp_path, harm):
    config = of_folder(scenes(tmp_path / "scenes"), steps=6)
    trainers = [Trainer(config, tmp_path / name, execution=Execution(damaged=name)) for name in ("stop", "skip")]
    file = tmp_path / "scenes" / "scene-1" / "latents.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    elif harm == "cut off":
        file.write_bytes(content[:-100])
    else:
        content[-4000:] = np.full(1000, np.nan, np.float32).tobytes()
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"scene-1/latents\.safetensors: .*(missing or damaged|NaN)") as stopped:
        trainers[0].run()
    done = newest_whole(tmp_path / "stop")[1]["step"] if checkpoints(tmp_path / "stop") else 0
    assert done == len(log(tmp_path / "stop")) if done else not (tmp_path / "stop" / "log.jsonl").exists()
    assert not done or f"step {done} was saved" in stopped.value.__notes__
    with pytest.warns(UserWarning, match=r"left out: .*scene-1/latents"):
        trainers[1].run()
    told = log(tmp_path / "skip")
    assert len(told) == 6 and all(line["loss"] is not None for line in told)
    assert sum(line["scenes"] for line in told) < 24


def test_workers_read_what_the_run_would(tmp_path):
    config = of_folder(scenes(tmp_path / "scenes"), steps=5)
    for workers in (0, 1, 2):
        Trainer(config, tmp_path / str(workers), execution=Execution(workers=workers)).run()
    losses = [[line["loss"] for line in log(tmp_path / str(workers))] for workers in (0, 1, 2)]
    assert losses[0] == losses[1] == losses[2]


def test_a_scene_that_was_damaged_before_the_start(tmp_path):
    config = of_folder(scenes(tmp_path / "scenes"), steps=3)
    file = tmp_path / "scenes" / "scene-1" / "latents.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="scene-1/latents"):
        Trainer(config, tmp_path / "stop")
    with pytest.warns(UserWarning, match="left out: .*scene-1/latents"):
        Trainer(config, tmp_path / "skip", execution=Execution(damaged="skip")).run()
    assert all(line["scenes"] == 4 for line in log(tmp_path / "skip"))


def test_a_step_without_scenes_changes_nothing(tmp_path):
    config = of_folder(scenes(tmp_path / "scenes", 1), steps=3)
    trainer = Trainer(config, tmp_path / "run", execution=Execution(damaged="skip"))
    before = {name: w.clone() for name, w in trainer.trained.items()}
    for file in (tmp_path / "scenes").rglob("latents.safetensors"):
        file.unlink()
    with pytest.warns(UserWarning, match="left out"):
        record = trainer.train_step()
    assert (record.loss, record.scenes, record.skipped) == (None, 0, 1)
    assert all(torch.equal(w, before[name]) for name, w in trainer.trained.items())


def test_partners_agree_on_what_is_damaged(tmp_path):
    """Of two that share the rows of a batch, one alone cannot read a scene: both leave it out."""
    root = scenes(tmp_path / "scenes")
    start(2, "partly_blind", tmp_path / "run", root)
    told = log(tmp_path / "run")
    assert len(told) == 4 and sum(line["scenes"] for line in told) < 16


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    config = small(steps=4, save_every=2)
    Trainer(config, tmp_path).run()
    file = next((tmp_path / "step-0000004" / "model").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    again = Trainer(config, tmp_path)
    with pytest.warns(UserWarning, match="going on with step-0000002"):
        again.resume()
    again.run()
    assert verify(tmp_path / "step-0000004")["step"] == 4
    assert len(list(tmp_path.glob("damaged-step-0000004-*"))) == 1


def test_a_folder_that_is_no_checkpoint_does_not_keep_its_step_from_being_saved(tmp_path):
    trainer = Trainer(small(steps=2, save_every=2), tmp_path)
    (tmp_path / "step-0000002").mkdir()
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    assert newest_whole(tmp_path)[1]["step"] == 2 and len(list(tmp_path.glob("damaged-step-0000002-*"))) == 1


def test_what_the_manifest_does_not_name_is_not_read(tmp_path):
    Trainer(small(steps=2, save_every=2), tmp_path).run()
    folder = newest_whole(tmp_path)[0]
    file = next((folder / "model").iterdir())
    (folder / "model" / f"more-{file.name}").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="does not name this file"):
        verify(folder)


def test_leaving_waits_for_what_is_written_beside(tmp_path):
    """A run that fails while a checkpoint is written: the checkpoint is whole, of all processes."""
    start(2, "fails_while_saving", tmp_path)
    folder, manifest = newest_whole(tmp_path)
    assert manifest["step"] == 2
    assert len(list((folder / "model").iterdir())) == 2 and len(read_whole(folder, "model")) > 50


def test_a_step_that_is_left_out_does_not_keep_from_saving(tmp_path, monkeypatch):
    trainer = Trainer(small(steps=4, save_every=2), tmp_path)
    spoil, times = [2, 4], trainer.times
    monkeypatch.setattr(trainer, "times", lambda b: times(b) * (float("nan") if trainer.step + 1 in spoil else 1.0))
    trainer.run()
    assert [line["loss"] is None for line in log(tmp_path)] == [False, True, False, True]
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-0000002", "step-0000004"]


def test_a_scene_reads_what_it_shows_alone(tmp_path):
    folder = SceneFolder(scenes(tmp_path))
    sample = folder.sample("cut", np.random.default_rng(0))
    for file in tmp_path.rglob("latents.safetensors"):
        file.unlink()
    assert sample.shots[0].latents.shape == (2, 8, 8, 3)  # known without reading
    with pytest.raises(ValueError, match="missing or damaged"):
        np.asarray(sample.shots[0].latents)


# -- seeing ------------------------------------------------------------------------------------------------------------


def test_a_line_a_step(tmp_path):
    Trainer(small(steps=3), tmp_path).run()
    told = log(tmp_path)
    assert [line.keys() for line in told] == [StepRecord.__dataclass_fields__.keys()] * 3
    for line in told:
        assert line["rows_per_second"] > 0 and line["tflops"] > 0 and line["memory"] > 10**7 and line["mfu"] is None
        assert 0 <= line["wait"] < line["seconds"] and len(line["by_noise"]) == 4


def test_samples_and_traces_on_the_way(tmp_path):
    write_scene(tmp_path / "scene", SceneFile(None, (ShotEntry("a cat", True, (2, 8, 8)),)), {})
    seen = []
    execution = Execution(scene=tmp_path / "scene", sample_every=2, profile=1)
    trainer = Trainer(small(steps=5), tmp_path / "run", execution=execution, sampler=lambda m, s: seen.append((m, s)))
    averages = trainer.averages
    weights = {}
    trainer.sampler = lambda model, step: weights.update({step: {n: w.clone() for n, w in trainer.trained.items()}})
    trainer.run()
    assert list(weights) == [2, 4]
    assert not all(torch.equal(w, averages[n]) for n, w in trainer.trained.items())
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert any("lct::attention" in str(event.get("name")) for event in trace["traceEvents"])


@pytest.mark.parametrize("save_every", [2, 1000])
def test_an_error_in_a_sample_costs_no_step(tmp_path, save_every):
    """Nor does it come again as soon as the run goes on."""

    def sampler(model, step):
        raise MemoryError("of the VAE")

    execution = Execution(scene=tmp_path / "scene", sample_every=2)
    for step in (2, 4):
        trainer = Trainer(small(steps=5, save_every=save_every), tmp_path, execution=execution, sampler=sampler)
        assert trainer.resume() == (step == 4)
        with pytest.raises(MemoryError, match="of the VAE") as error:
            trainer.run()
        assert error.value.__notes__ == [f"step {step} was saved"] and newest_whole(tmp_path)[1]["step"] == step


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    Trainer(small(steps=2), tmp_path, execution=Execution(tensorboard=True)).run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = log(tmp_path)
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([line["loss"] for line in told])


def test_compiled_blocks_learn_the_same_and_are_compiled_twice(tmp_path):
    """Shots of other sizes come in every step; from the third on none may be compiled for."""
    plain = Trainer(small(), tmp_path / "plain")
    compiled = Trainer(small(), tmp_path / "compiled", execution=Execution(compile=True, recompute="attention"))
    try:
        for step in range(8):
            if step == 2:
                torch.compiler.set_stance("fail_on_recompile")
            a, b = plain.train_step(), compiled.train_step()
            assert b.loss == pytest.approx(a.loss, rel=1e-5) and b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()


def test_memory_and_open_files_do_not_grow(tmp_path):
    """The short form of `make soak`'s 3,000 steps."""
    from soak import steady

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = steady(tmp_path, 400, small(steps=400, save_every=50))
    assert found["open files grew by"] == 0 and found["memory grew by"] < 0.01
