"""The measures of toy scenes tell right from wrong, and the demo leaves what it promises."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lct import demo
from lct.data.readout import CHANCE
from lct.evaluate import MODES, Mean95, held_out, score, true_frames
from lct.train.runs import tiny_causal, tiny_lct, tiny_text_rope
from lct.train.trainer import Trainer
from lct.train.weights import save_weights


@pytest.fixture(scope="module")
def samples():
    return held_out(24, 4)


def test_the_truth_scores_perfectly(samples):
    for mode in ("joint", "auto-regressive"):
        scores = score(mode, true_frames(samples), samples)
        assert scores["colour"].mean < 0.04 and scores["background"].mean < 0.04
        assert all(scores[key].mean == 1 for key in ("motion", "light", "framing", "place", "shape"))
        assert scores["hue_spread"].mean == pytest.approx(scores["hue_spread_truth"].mean, abs=0.01)


def test_scenes_of_other_identities_score_like_chance(samples):
    """Each scene's shots 2 to 4 replaced by those of the next scene: identity is lost, prompts are not followed."""
    frames = true_frames(samples)
    mixed = [[scene[0], *frames[(i + 1) % len(frames)][1:]] for i, scene in enumerate(frames)]
    scores = score("auto-regressive", mixed, samples)
    assert scores["colour"].mean > 0.6 and scores["background"].mean > 0.1 and scores["motion"].mean < 0.5


def test_one_colour_for_all_scenes_is_a_collapse(samples):
    frames = true_frames(samples)
    scores = score("joint", [frames[0]] * len(frames), samples)
    assert scores["colour"].mean < 0.04 and scores["hue_spread"].mean < 0.01 < scores["hue_spread_truth"].mean


@pytest.mark.parametrize("mode", MODES)
def test_frames_without_characters_have_no_identity(mode, samples):
    empty = [[np.full_like(shot, 0.5) for shot in scene] for scene in true_frames(samples)]
    scores = score(mode, empty, samples)
    assert scores["colour"].mean == pytest.approx(CHANCE) and scores["hue_spread"].mean == 0
    assert scores["visible"].mean == scores["motion"].mean == scores["shape"].mean == 0


def test_intervals_cover_the_mean_they_estimate():
    rng = np.random.default_rng(0)
    estimates = [Mean95.of(rng.normal(3, 1, 64)) for _ in range(400)]
    hits = [abs(estimate.mean - 3) <= estimate.half for estimate in estimates]
    assert 0.85 < np.mean(hits) < 0.99
    assert np.isnan(Mean95.of([float("nan")]).mean)


def test_held_out_scenes_are_not_drawn_in_training(samples):
    from lct.data.toy import ToyScenes

    hues = {s.truth.characters[0].rgb for s in samples}
    drawn = (
        ToyScenes().sample("cut", np.random.default_rng([0, step, slot])) for step in range(50) for slot in range(16)
    )
    assert not hues & {s.truth.characters[0].rgb for s in drawn}


def test_the_demo_leaves_one_folder_with_everything_and_resumes(tmp_path, monkeypatch, capsys):
    model = replace(tiny_lct().model, blocks=1, width=32, heads=1, kv_heads=1)
    weights = tmp_path / "pretrained.safetensors"
    fresh = Trainer(replace(tiny_lct(), model=model, init=None), tmp_path / "fresh")
    save_weights(weights, fresh.model.state_dict(), fresh.config)
    for run in (tiny_text_rope, tiny_lct, tiny_causal):
        short = replace(run(), model=model, init=str(weights), steps=2, scenes=2)
        monkeypatch.setattr(demo, run.__name__, lambda short=short: short)
    monkeypatch.setattr(demo, "SAMPLING", replace(demo.SAMPLING, steps=2))
    out = tmp_path / "demo"
    assert demo.run_demo(out, 4, check=True) == 1  # an untrained model misses its targets, and says so
    assert "MISSED" in capsys.readouterr().out
    names = {"index.html", "metrics.json", "mask.png", "positions.png", "contact-sheet-1.png", "auto-regressive.mp4"}
    assert names <= {file.name for file in out.iterdir()}
    record = json.loads((out / "metrics.json").read_text())
    assert record["scenes"] == 4 and sum(row["target"] != "" for row in record["rows"]) == len(demo.TARGETS)
    weights.unlink()
    log = (out / "tiny_lct" / "log.jsonl").read_text()
    assert demo.run_demo(out, 4, resume=True) == 0  # nothing is trained again, so nothing is missing
    assert (out / "tiny_lct" / "log.jsonl").read_text() == log
