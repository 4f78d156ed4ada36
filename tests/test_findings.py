"""The studies of the paper's findings: measures that are zero on the truth and large on lies, and all of it runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

from findings import ask, history, notes, page, rivals, ways  # noqa: E402
from findings.finding import Finding, Row, Series, World, above, below, said  # noqa: E402
from findings.metrics import by_gap, cut_accuracy, measure, paired  # noqa: E402

from lct.data.toy import ToyScenes, to_frames  # noqa: E402
from lct.evaluate import Mean95  # noqa: E402
from lct.train.weights import load_model, load_weights, save_weights  # noqa: E402


def truth(samples):
    return [[to_frames(shot.latents) for shot in sample.shots] for sample in samples]


# -- measures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(), (0,)], ids=["own first appearance", "given"])
def test_the_truth_is_without_error_and_another_scene_is_not(given):
    samples = World(12).draw(4, entering=(3,))
    right = measure(truth(samples), samples, given)
    wrong = measure(truth(samples[1:] + samples[:1]), samples, given)
    for name in ("colour", "background", "weave"):
        assert np.nanmax(right[name]) < 0.06 and np.nanmean(right[name]) < 0.005
    assert np.nanmean(right["text"]) == 1 and np.nanmean(wrong["text"]) < 0.8
    assert np.nanmax(np.abs(right["saturation"])) == 0 and np.nanmax(right["misfit"]) < 0.03
    assert np.isnan(right["colour"][:, 0]).all() and np.isnan(right["text"][:, 0]).all() == bool(given)
    # another scene agrees with itself, but not with the given shot
    assert (np.nanmean(wrong["colour"]) > 0.5) == bool(given)


def test_a_look_that_changes_in_the_middle_is_an_error():
    a, b = World(2).draw(4), World(2).draw(4)[::-1]
    mixed = [x[:2] + y[2:] for x, y in zip(truth(a), truth(b), strict=True)]
    errors = measure(mixed, a)
    assert np.nanmax(errors["colour"][:, 1]) < 0.05 and np.nanmin(errors["colour"][:, 2:]) > 0.1


def test_blur_and_noise_are_artefacts():
    samples = World(6).draw(2)
    frames = truth(samples)
    noisy = [[np.clip(x + 0.05 * np.random.default_rng(0).standard_normal(x.shape), 0, 1) for x in s] for s in frames]
    soft = [[(x + np.roll(x, 1, 2) + np.roll(x, -1, 2)) / 3 for x in s] for s in frames]
    clean, rough, blurred = (measure(f, samples) for f in (frames, noisy, soft))
    assert np.nanmean(rough["misfit"]) > np.nanmean(clean["misfit"]) + 0.03
    assert np.nanmean(blurred["misfit"]) > np.nanmean(clean["misfit"]) + 0.01
    assert np.nanmean(blurred["detail"]) < -0.01 < 0.01 < np.nanmean(rough["detail"])


def test_gaps_are_counted_from_the_last_appearance():
    samples = World(3).draw(5, cast=(0, None, None, 0, 0))
    m = measure(truth(samples), samples)
    assert m["gap"][0].tolist() == [0, 0, 0, 3, 1]
    assert [np.isnan(v.mean) for v in by_gap(m, "colour", ((1, 1), (2, 2), (3, 9)))] == [False, True, False]


def test_cuts_are_found_where_they_are_and_nowhere_else():
    for kind, marked in (("cut", True), ("no_cut", False)):
        samples = World(8).draw(8, kind=kind)
        cuts = cut_accuracy(truth(samples), [[shot.cut for shot in sample.shots] for sample in samples])
        counts = [int(x.sum()) for x in (cuts.found, cuts.marked, cuts.false)]
        assert counts == ([56, 56, 0] if marked else [0, 0, 0]) and cuts.f1().mean == float(marked)
    long = World(8).draw(6, kind="no_cut")
    recoloured = [[np.roll(shot, i, axis=3) for i, shot in enumerate(scene)] for scene in truth(long)]
    assert cut_accuracy(recoloured, [[False] * 6] * 8).false.sum() == 40
    spliced = [x[:3] + y[3:] for x, y in zip(truth(long), truth(long[1:] + long[:1]), strict=True)]
    assert cut_accuracy(spliced, [[False] * 6] * 8).false.sum() >= 6


def test_pairs_leave_out_what_is_not_known():
    value = paired(np.array([1.0, 2.0, np.nan]), np.array([0.5, 1.5, 0.0]))
    assert value.mean == 0.5 and value.half == 0 and said(Mean95(0.5, float("nan"))) == "0.500"


# -- rivals and images -------------------------------------------------------------------------------------------------


def test_a_keyframe_of_an_entrance_shows_the_place_alone():
    sample = World(1).draw(3, entering=(1,))[0]
    scene = ways.SceneRequest.like(sample, (1, 4, 4), 0)
    stills = [ways.still(shot, i == 1) for i, shot in enumerate(scene.shots)]
    assert [shot.video[0] for shot in stills] == [1, 1, 1]
    assert stills[0].prompt == scene.shots[0].prompt
    assert stills[1].prompt == f"[SHOT CUT] establishing shot of the {scene.shots[1].prompt.split()[-1]}"


def test_portraits_do_not_show_the_scenes_background():
    sample = World(1).draw(1)[0]
    portrait = 0.5 + 0.5 * rivals._picture(sample, 0, rivals._other_background(sample))
    place = 0.5 + 0.5 * rivals._picture(sample, None, sample.truth.background_rgb)
    from lct.data.readout import colour_error, read_shot

    who, where = read_shot(portrait[None]), read_shot(place[None])
    assert colour_error(who.character_rgb, sample.truth.characters[0].rgb) < 0.05 and not where.visible
    assert colour_error(where.background_rgb, sample.truth.background_rgb) < 0.05
    assert colour_error(who.background_rgb, sample.truth.background_rgb) > 0.1


def test_recomputed_history_of_everything_in_order_is_the_same_scene():
    weights = random_weights()
    samples = World(2).draw(3)
    scenes = ways.requests(weights, samples, (0,))
    chosen = [[], [0], [0, 1]]
    pooled = ways.shot_by_shot(weights, scenes, chosen, steps=2)
    anew = history.recomputed(weights, scenes, chosen, pooled, steps=2)
    for a, b in zip(pooled, anew, strict=True):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a, b, strict=True))


def random_weights(visibility="context_causal") -> ways.Weights:
    from lct.model.mmdit import MMDiT
    from lct.train.runs import micro_causal

    config = replace(micro_causal(), visibility=visibility, model=replace(micro_causal().model, blocks=1))
    torch.manual_seed(0)
    model = MMDiT(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return ways.Weights(model.requires_grad_(False), config)


# -- all of it ---------------------------------------------------------------------------------------------------------


class RandomModels(ask.Models):
    """Weights that know nothing: what is asked of them must run, and must not hold."""

    before = property(lambda self: random_weights("bidirectional"))
    lct = property(lambda self: random_weights("bidirectional"))
    causal = property(lambda self: random_weights())
    control = property(lambda self: random_weights("bidirectional"))

    def causal_steps(self):
        return {10: self.causal, 90: self.causal}

    def ablated(self):
        return self.lct, {name: self.lct for name in ask.quality.ABLATIONS}


@pytest.mark.parametrize("name", ask.STUDIES)
def test_every_study_runs_and_does_not_hold_of_noise(name, monkeypatch):
    monkeypatch.setattr(ways, "STEPS", 1)
    monkeypatch.setattr(ask.long, "MINUTE", 12)
    findings, tables = ask.STUDIES[name](RandomModels(None, "cpu"), World(3))
    for finding in findings:
        assert (
            finding.rows
            and finding.plot
            and finding.outcome.endswith(".")
            and finding.paper.startswith(("§", "T", "F"))
        )
        json.dumps(finding.to_dict(), allow_nan=False)
        assert not finding.holds
    assert set(tables) <= {"table 1", "table 2"}


def test_studies_that_were_asked_are_not_asked_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ask, "_digest", lambda *_: "inputs")
    finding = Finding("name", "§ 1", "claim", "outcome.", True, [Row("a", "b", Mean95(1, 2, 3))], ("x", "y"), [])
    monkeypatch.setattr(ask, "STUDIES", {"one": lambda m, w: (asked.append(1), ([finding], {"table 1": {}}))[1]})
    monkeypatch.setattr(ask, "train", lambda *_: None)
    console = Console(quiet=True)
    first, second = (ask.ask(False, tmp_path, "cpu", console) for _ in range(2))
    assert asked == [1] and first["findings"] == second["findings"] == [finding.to_dict()]
    monkeypatch.setattr(ask, "_digest", lambda *_: "other inputs")
    ask.ask(False, tmp_path, "cpu", console)
    assert asked == [1, 1]


def test_training_of_the_findings_is_a_chain(tmp_path):
    stages = list(ask.stages(tmp_path))
    made = {str(tmp_path / config.name) for config in stages}
    assert stages[0].init is None and all(config.init in made for config in stages[1:])
    assert len({config.name for config in stages}) == len(stages) == 4 + 2 + len(ask.quality.ABLATIONS)
    steps = {config.steps for config in stages if config.name.startswith("ablation")}
    assert steps == {ask.ABLATION_STEPS}


def test_a_page_and_a_summary(tmp_path):
    value = Mean95(0.5, float("nan"))
    finding = Finding("A, b", "§ 1", "c", "o.", False, [Row("x", "y", value)], ("x", "y"), [Series("s", [1], [value])])
    record = {"findings": [finding.to_dict()], "scenes": 3, "table 1": {"ours": {"text": 0.5}}, "table 2": {}}
    written = page.page(record)
    assert "](#a-b)" in written and "## A, b" in written and "| ours |" in written and "**differs**" in written
    assert "0 of 1" in page.summary(record)


def test_what_notes_say_is_true_of_the_record():
    record = json.loads(ask.RECORD.read_text(encoding="utf-8"))
    plots = {f["name"]: f["plot"] for f in record["findings"]}
    first = [series["y"][0]["mean"] for series in plots[notes.HISTORY] if series["panel"] == "identity"]
    assert len(first) == 5 and len(set(first)) == 1  # shot 3 is the same at every t_c
    clean, noisy = (notes.value(record, notes.NOISY, "background, kept", f"t_c {t}") for t in (0, 0.1))
    assert below(clean, noisy.mean - noisy.half)
    before = float(notes.note(record, notes.SINGLE).split("accuracy is ")[1].split()[0])
    assert below(notes.value(record, notes.SINGLE, "text", "after LCT"), before)  # what LCT does not bring back
    assert above(notes.value(record, "Consistency against the rivals", "background", "identity images"), 0.1)
    assert f"{ask.ABLATION_STEPS:,} steps" in notes.note(record, notes.ABLATIONS)
    assert ToyScenes(ask.micro_lct().data.toy).config.frames == (3,)
    assert "deviation of 1.6, half of" in notes.training() and "3 : 2" in notes.training()
    names = {f["name"] for f in record["findings"]}
    assert names >= notes.NOTES.keys() | notes.COVERS.keys()


def test_a_verdict_says_where_alone_a_finding_holds():
    rows = [Row("identity, growth at 0 − growth", f"t_c {t}", Mean95(x, 0.1, 3)) for t, x in ((0.1, 1), (0.3, 1))]

    def judged(at_half: float, holds: bool = True) -> str:
        last = Row("identity, growth at 0 − growth", "t_c 0.5", Mean95(at_half, 0.1, 3))
        finding = Finding(notes.HISTORY, "", "", "", holds, [*rows, last], ("", ""), []).to_dict()
        return notes.verdict({"findings": [finding]}, finding)

    assert judged(1) == "holds" and judged(0.05) == "holds at 0.1 and at 0.3 only" and judged(1, False) == "differs"


# -- shared weights ----------------------------------------------------------------------------------------------------


def test_eight_bit_weights_come_back(tmp_path):
    weights = random_weights()
    save_weights(tmp_path / "w.safetensors", weights.model.state_dict(), weights.config, torch.int8)
    again, config = load_weights(tmp_path / "w.safetensors")
    assert config == weights.config and again.keys() == weights.model.state_dict().keys()
    for name, weight in weights.model.state_dict().items():
        assert (again[name] - weight).norm() <= 0.02 * weight.norm() + 1e-6, name
    size = (tmp_path / "w.safetensors").stat().st_size
    assert size < 1.2 * weights.model.parameter_count()


@pytest.mark.parametrize("name", ask.NAMES)
def test_shared_weights_are_small_and_load(name):
    files = list(ask.SHARED.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 4e6 and len(files) == len(ask.NAMES)
    model, config = load_model(ask.SHARED / f"{name}.safetensors")
    assert config.name == ask.NAMES[name] and model.config == config.model
    assert ToyScenes(config.data.toy)
