"""Tuning on a real film, the short form of bench/film.py: the loss falls, context helps, a further shot is directed."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from film import fetch_film

pytest.importorskip("av", reason="needs PyAV: pip install -e '.[video]'")
pytest.importorskip("scenedetect", reason="needs PySceneDetect: pip install -e '.[video]'")

from lct.data.ingest import ingest
from lct.data.scenefile import load_sample, read_scene
from lct.data.video import read_video
from lct.train.runs import film as film_run
from lct.train.trainer import Trainer

pytestmark = pytest.mark.network
FRAMES = 4  # of the further shot


def bench_film():
    """bench/film.py as a module; bench is no package, and tests/ has a film.py of its own."""
    sys.path.append(str(Path(__file__).parents[1] / "bench"))  # what it imports beside itself
    spec = importlib.util.spec_from_file_location("bench_film", Path(__file__).parents[1] / "bench" / "film.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The benchmark's functions, the longest scene, the losses on fixed draws before and after, the tuned model."""
    try:
        film = fetch_film()
    except OSError as error:
        pytest.skip(f"the film could not be fetched: {error}")
    bench, work = bench_film(), tmp_path_factory.mktemp("film")
    ingest(film, work / "scenes", side=64, patch=4, fps=6.0, max_frames=8)
    longest = max((work / "scenes").iterdir(), key=lambda folder: len(read_scene(folder).shots))
    config = film_run()
    # twice the run's learning rate and a quarter of the benchmark's pixels do in 200 short steps what it does in 300
    config = replace(config, steps=200, lr=4e-3, data=replace(config.data, source=str(work / "scenes")))
    trainer = Trainer(config, work / "run")
    before = bench.losses_at_start(trainer.model.eval(), load_sample(longest))
    trainer.model.train()
    trainer.run()
    model = trainer.averaged()
    return bench, longest, before, bench.losses(model, load_sample(longest), config.text_scale), model


def test_the_loss_on_fixed_draws_halves(tuned):
    _, _, before, after, _ = tuned
    assert after["all"] <= 0.5 * before["all"]  # measured 0.30


def test_the_last_shot_is_better_with_context_than_alone(tuned):
    _, _, before, after, _ = tuned
    assert after["last_with_context"] < 0.8 * after["last_isolated"]  # measured 0.65
    assert before["last_with_context"] > 0.95 * before["last_isolated"]  # tuning taught it: measured 1.24


def test_a_further_shot_is_directed_and_decodes(tuned, tmp_path):
    bench, longest, _, _, model = tuned
    out = bench.further_shot(longest, model, tmp_path)
    last = len(read_scene(longest).shots)
    given, done = load_sample(longest), load_sample(out / "scene")
    assert len(done.shots) == last + 1
    assert all(np.array_equal(a.latents, b.latents) for a, b in zip(given.shots, done.shots[:-1], strict=True))
    frames = read_video(out / f"shot-{last}.mp4").frames
    height, width = given.shots[0].latents.shape[1:3]
    assert frames.shape == (FRAMES, 8 * height, 8 * width, 3)
    assert frames.std() > 10  # a picture, not one grey
