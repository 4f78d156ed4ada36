"""Every way to generate: history at times of its own, guidance on it, kept keys, positions by hand, chosen shots."""

from dataclasses import replace

import pytest
import torch
from test_model import random_model
from test_sample import requests, worst

from lct import SceneLayout, Shot
from lct.data.batch import draw_scene, pack_drawn
from lct.data.toy import ToyScenes
from lct.model.mmdit import MMDiT
from lct.sample import Sampling, SceneRequest, autoregressive, joint
from lct.sample.history import CachedHistory
from lct.sample.select import choose, recent, relevant

SCENE = [Shot(3, (1, 1, 1), "global"), Shot(2, (2, 1, 2)), Shot(1, (1, 2, 2)), Shot(4, (2, 2, 1))]


def with_times(scenes, *times):
    shots = [tuple(replace(x, history_time=t) for x, t in zip(s.shots, times, strict=True)) for s in scenes]
    return [replace(s, shots=x) for s, x in zip(scenes, shots, strict=True)]


# -- history at times of its own ---------------------------------------------------------------------------------------


def test_times_of_each_shot_cached_equal_recomputed():
    model, scenes = random_model(), with_times(requests(given=(0,)), 0.4, 0.2, None)
    cached, recomputed = (autoregressive(model, scenes, Sampling(steps=3), cached=c) for c in (True, False))
    assert worst(cached, recomputed) <= 1e-10
    clean = autoregressive(model, requests(given=(0,)), Sampling(steps=3))
    assert worst([s[:1] for s in cached], [s[:1] for s in clean]) == 0 and worst(cached, clean) > 1e-3


def test_a_schedule_by_age_is_the_times_it_says():
    """With three shots the last one sees the first at the second number and the second at the first."""
    model, scenes = random_model(), requests()
    by_age = autoregressive(model, scenes, Sampling(steps=3, history_time=(0.1, 0.6)), cached=False)
    until_second = autoregressive(model, scenes, Sampling(steps=3, history_time=0.1), cached=False)
    assert worst([s[:2] for s in by_age], [s[:2] for s in until_second]) == 0
    finished = [
        replace(s, shots=(*(replace(x, given=g) for x, g in zip(s.shots[:2], made, strict=False)), s.shots[2]))
        for s, made in zip(scenes, by_age, strict=True)
    ]
    third = autoregressive(model, with_times(finished, 0.6, 0.1, None), Sampling(steps=3))
    assert worst([s[2:] for s in by_age], [s[2:] for s in third]) <= 1e-10


def test_a_schedule_cannot_be_cached_and_times_are_checked():
    with pytest.raises(ValueError, match="schedule by age needs cached=False"):
        autoregressive(random_model(), requests(), Sampling(history_time=(0.1, 0.2)))
    for wrong in ((), (0.1, 1.0)):
        with pytest.raises(ValueError, match="history_time"):
            Sampling(history_time=wrong)
    with pytest.raises(ValueError, match="history_time"):
        replace(requests()[0].shots[0], history_time=1.5)


def test_joint_shots_on_noisy_media():
    """The time of given media matters and is what the model is told; they come back clean."""
    model, given = random_model(), requests(given=(0, 2))
    at = [joint(model, with_times(given, t, None, t), Sampling(steps=2)) for t in (0.0, 0.5)]
    assert worst([s[1:2] for s in at[0]], [s[1:2] for s in joint(model, given, Sampling(steps=2))]) == 0
    assert worst([s[1:2] for s in at[0]], [s[1:2] for s in at[1]]) > 1e-3
    for scene, request in zip(at[1], given, strict=True):
        assert all(torch.equal(scene[i], request.shots[i].given.double()) for i in (0, 2))


# -- guidance on the history -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("prompt", [True, False], ids=["global prompt", "none"])
def test_guidance_on_the_history_cached_equals_recomputed(guidance, prompt):
    model = random_model()
    scenes = [s if prompt else replace(s, global_prompt=None) for s in requests(given=(0,))]
    sampling = Sampling(steps=3, guidance=guidance, history_guidance=1.7)
    chosen = [list(range(i)) for i in range(3)]
    cached = autoregressive(model, scenes, sampling)
    assert worst(cached, autoregressive(model, scenes, sampling, cached=False)) <= 1e-10
    assert worst(cached, autoregressive(model, scenes, sampling, chosen=chosen)) <= 1e-10
    assert worst(cached, autoregressive(model, scenes, replace(sampling, history_guidance=1.0))) > 1e-3


def test_guidance_on_the_history_is_linear_and_its_zero_is_the_shot_alone():
    model, scenes = random_model(), requests(count=1, shots=2, given=(0,))
    at = lambda w: autoregressive(model, scenes, Sampling(steps=1, history_guidance=w))[0][1]  # noqa: E731
    assert torch.allclose(at(3.0) - at(0.0), 3 * (at(1.0) - at(0.0)), atol=1e-9)
    assert not torch.allclose(at(1.0), at(0.0))
    # at the same place, so that only the history is missing
    isolated = autoregressive(model, scenes, Sampling(steps=1), "isolated")[0][1]
    assert torch.allclose(at(0.0), isolated, atol=1e-9)


def test_joint_guidance_on_the_other_shots():
    model, scenes = random_model(), requests()
    at = lambda w: joint(model, scenes, Sampling(steps=1, history_guidance=w))  # noqa: E731
    assert worst(at(0.0), joint(model, scenes, Sampling(steps=1), "isolated")) <= 1e-10
    both = joint(model, scenes, Sampling(steps=1, history_guidance=2.0, guidance=1.5))
    assert worst(at(1.0), joint(model, scenes, Sampling(steps=1))) == 0 and worst(both, at(2.0)) > 1e-3


# -- keys of a step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"guidance": 2.0, "history_guidance": 1.5}], ids=str)
def test_keys_of_a_step_kept_in_the_cache_and_in_the_pool(options):
    model, scenes = random_model(), requests(given=(0,))
    sampling = Sampling(steps=4, keep="step", history_time=0.3, **options)
    cached = autoregressive(model, scenes, sampling)
    pooled = autoregressive(model, scenes, sampling, chosen=[[], [0], [0, 1]])
    assert worst(cached, pooled) <= 1e-10
    passed = autoregressive(model, scenes, replace(sampling, keep="pass"))
    assert worst([s[:2] for s in cached], [s[:2] for s in passed]) == 0 and worst(cached, passed) > 1e-3


def test_keys_of_a_step_spare_a_pass_a_shot(monkeypatch):
    calls, forward = [], MMDiT.forward
    monkeypatch.setattr(MMDiT, "forward", lambda self, *args, **kw: (calls.append(1), forward(self, *args, **kw))[1])
    counts = {}
    for keep in ("pass", "step"):
        calls.clear()
        autoregressive(random_model(), requests(count=1), Sampling(steps=4, keep=keep))
        counts[keep] = len(calls)
    assert counts == {"pass": 1 + 3 * 4 + 2, "step": 1 + 3 * 4}
    with pytest.raises(ValueError, match="keep: expected one of"):
        Sampling(keep="all")


def test_the_step_nearest_the_history_time_is_kept(monkeypatch):
    kept, velocity = [], CachedHistory.velocity

    def watched(self, z, times, keep=False):
        kept.extend(times.tolist() if keep else [])
        return velocity(self, z, times, keep)

    monkeypatch.setattr(CachedHistory, "velocity", watched)
    for time, step in ((0.99, 1.0), (0.4, 0.5), (0.3, 0.25), (0.0, 0.25)):
        kept.clear()
        autoregressive(random_model(), requests(count=1), Sampling(steps=4, keep="step", history_time=time))
        assert kept == [step] * 2  # the last shot is nobody's history


# -- positions by hand -------------------------------------------------------------------------------------------------


def test_chosen_shots_at_their_own_places_are_the_whole_scene():
    model, scenes = random_model(), requests(given=(0,))
    everything = [list(range(i)) for i in range(3)]
    plain = autoregressive(model, scenes, Sampling(steps=2))
    assert worst(plain, autoregressive(model, scenes, Sampling(steps=2), chosen=everything, absolute=True)) <= 1e-10
    last = [[], [0], [0]]
    compact, absolute = (autoregressive(model, scenes, Sampling(steps=2), chosen=last, absolute=a) for a in (0, 1))
    assert worst([s[2:] for s in compact], [s[2:] for s in absolute]) > 1e-6
    with pytest.raises(ValueError, match="goes with chosen shots"):
        autoregressive(model, scenes, Sampling(steps=2), absolute=True)


@pytest.mark.parametrize("sampler", ["joint", "cached", "recomputed", "pooled"])
def test_one_place_for_all_shots(sampler):
    model, scenes = random_model(), requests(given=(0,))

    def make(**options):
        sampling = Sampling(steps=2, **options)
        if sampler == "joint":
            return joint(model, scenes, sampling)
        chosen = [[], [0], [0, 1]] if sampler == "pooled" else None
        return autoregressive(model, scenes, sampling, cached=sampler != "recomputed", chosen=chosen)

    assert worst(make(), make(one_place=True)) > 1e-6
    if sampler in ("cached", "pooled"):
        again = autoregressive(model, scenes, Sampling(steps=2, one_place=True), cached=False)
        assert worst(again, make(one_place=True)) <= 1e-10


def test_offsets_of_a_layout():
    layout = SceneLayout([SCENE], offsets=[[0, 7, 0.5, 30]])
    plain = SceneLayout([SCENE])
    moved = layout.positions() - plain.positions()
    for shot, (start, end) in enumerate(zip(plain.shot_starts, plain.shot_ends, strict=True)):
        assert torch.equal(
            moved[start:end], torch.full((end - start, 3), [0, 7, 0.5, 30][shot] - plain.origins()[shot])
        )
    assert layout != plain and hash(layout) == hash(SceneLayout([SCENE], offsets=[[0, 7, 0.5, 30]]))
    assert torch.equal(layout.dense_mask(), plain.dense_mask())
    for wrong, message in (([[0, 1]], "one for each shot"), ([[0, 1, 2, float("nan")]], "finite"), ([0], "scene 0")):
        with pytest.raises((ValueError, TypeError), match=message):
            SceneLayout([SCENE], offsets=wrong)
    with pytest.raises(ValueError, match="offsets"):
        layout.append([SCENE[1]])


def test_training_with_one_place_and_one_time():
    toy, words = ToyScenes("returning", max_shots=9), lambda prompt: torch.ones(len(prompt.split()), dtype=torch.int64)

    def draw(**options):
        drawn = [draw_scene(toy, {"cut": 1.0}, 0.0, 0.0, seed=0, step=0, slot=slot) for slot in range(4)]
        return pack_drawn(drawn, words, (1, 4, 4), "bidirectional", **options)

    plain, shared, placed = draw(), draw(shared_time=True), draw(one_place=True)
    scenes = torch.tensor(plain.layout.scene_of_shot)
    assert all(len(shared.normal[scenes == b].unique()) == 1 for b in range(4)) and len(plain.normal.unique()) > 4
    assert torch.equal(plain.noise, shared.noise) and set(placed.layout.origins()) == {0.0}


@pytest.mark.parametrize("first", [1, 3])
def test_versions_behind_a_tail(first):
    """[history | shot | other prompt | alone]: no version sees another, the last sees the global prompt only."""
    other, alone = Shot(2, (2, 2, 1)), Shot(1, (1, 1, 1))
    layout = SceneLayout([SCENE])
    tail = layout.tail(first, layout.rows + 10, [other], alone=[alone])
    mask = tail.plan.dense_mask()
    ends = [0, *layout.shot_ends, layout.rows + other.rows, layout.rows + other.rows + alone.rows]
    rows = mask[-(SCENE[-1].rows + other.rows + alone.rows) :].split([SCENE[-1].rows, other.rows, alone.rows])
    sees = [[0, 1, 2, 3], [0, 1, 2, 4], [0, 5]]
    for block, shots in zip(rows, sees, strict=True):
        wanted = torch.zeros(mask.shape[1], dtype=torch.bool)
        for shot in shots:
            wanted[ends[shot] : ends[shot + 1]] = True
        assert torch.equal(block, wanted.expand_as(block))
    assert tail.slots.tolist() == list(range(ends[first], ends[-1]))
    starts = tail.positions[[-(SCENE[-1].rows + other.rows + alone.rows), -(other.rows + alone.rows), -alone.rows]]
    assert torch.equal(starts, starts[:1].expand(3, 3))


# -- choosing shots by what they say -----------------------------------------------------------------------------------

STORY = [
    "establishing shot of the harbour",
    "wide shot of Character 1 by the harbour",
    "close-up of Character 2 at the market",
    "wide shot of Character 2 on the street",
    "close-up of Character 2 on the street",
]


def test_the_newest_and_the_most_relevant():
    assert recent(5, 2) == [3, 4] and recent(1, 4) == [0]
    assert relevant("close-up of Character 1", STORY, 1) == [1]
    assert relevant("Character 1 and Character 2 at the market", STORY, 2) == [1, 2]
    assert relevant("establishing shot of the harbour at night", STORY, 1) == [0]
    assert relevant("close-up of Character 2 on the street", STORY, 2) == [3, 4]
    assert relevant("Character 9", [], 3) == [] and relevant("anything", STORY, 9) == [0, 1, 2, 3, 4]


def test_rules_of_a_scene_file():
    prompts = [f"wide shot of Character {1 + i % 3}" for i in range(14)]
    assert choose(None, prompts, 8) == list(range(8)) and choose("all", prompts, 12) == list(range(12))
    fits = choose(None, prompts, 13)
    assert len(fits) == 8 and fits == sorted(fits) and {1, 4, 7, 10} < set(fits)
    assert choose("recent:3", prompts, 10) == [7, 8, 9] and choose("relevant:2", prompts, 12) == [6, 9]
    for wrong in ("recent:0", "recent", "all:2", "newest:2", "relevant:x"):
        with pytest.raises(ValueError, match="sees: expected all"):
            choose(wrong, prompts, 3)


def test_extension_and_composition_are_scenes_like_others():
    """Images as given shots of one frame; a segment without the mark of a cut."""
    model, (scene,) = random_model(), requests(count=1, given=(0, 1))
    images = [replace(x, video=(1, *x.video[1:]), given=x.given[: x.video[1] * x.video[2]]) for x in scene.shots[:2]]

    def last(*shots, make=autoregressive):
        return make(model, [SceneRequest(scene.global_prompt, shots)], Sampling(steps=2))[0][-1]

    for make in (joint, autoregressive):
        composed = last(*images, scene.shots[2], make=make)
        assert len(composed) == torch.tensor(scene.shots[2].video).prod()
        for i in range(2):  # both images are seen
            others = [replace(x, given=-x.given) if j == i else x for j, x in enumerate(images)]
            assert not torch.allclose(last(*others, scene.shots[2], make=make), composed, atol=1e-3)
    going_on = replace(scene.shots[2], prompt=scene.shots[2].prompt.removeprefix("[SHOT CUT] "))
    assert not torch.equal(last(*scene.shots[:2], going_on), last(*scene.shots))
