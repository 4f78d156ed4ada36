"""Hypothesis strategies for scenes, visibilities and seeds, in the oracle's plain tuples.

Sizes come from small pools, so that failing examples are small and kernels compile for few shapes. Every part may be
empty, a whole layout too. Tensors are never drawn: a test makes them from the seed.
"""

from hypothesis import strategies as st

TEXT_SIZES = (0, 1, 2, 3, 7, 17)
# No video at all (twice), then images, then clips with each side in turn the longest.
VIDEO_SIZES = ((0, 0, 0), (0, 2, 1), (1, 1, 1), (1, 2, 3), (1, 4, 4), (2, 2, 2), (3, 1, 2), (2, 5, 3), (5, 2, 1))
NAMED_VISIBILITIES = ("context_causal", "isolated", "bidirectional")

seeds = st.integers(0, 2**32 - 1)


def shots(text_sizes=TEXT_SIZES, video_sizes=VIDEO_SIZES, role="shot"):
    """`(text, (T, H, W), role)`."""
    return st.tuples(st.sampled_from(text_sizes), st.sampled_from(video_sizes), st.just(role))


def scene_lists(shot=None, max_scenes=3, min_shots=1, max_shots=4):
    """A list of 1 to `max_scenes` scenes of `min_shots` to `max_shots` shots each, some behind a global prompt."""
    global_prompt = shots(video_sizes=((1, 1, 1),), role="global")
    opening = st.lists(global_prompt, max_size=1)
    body = st.lists(shots() if shot is None else shot, min_size=min_shots, max_size=max_shots)
    return st.lists(st.builds(list.__add__, opening, body), min_size=1, max_size=max_scenes)


@st.composite
def selections(draw, scenes):
    """For every shot of every scene, a tuple of earlier shots; the global prompt needs no naming but may be named."""
    return [[tuple(n for n in range(shot) if draw(st.booleans())) for shot in range(len(scene))] for scene in scenes]


def visibilities(scenes):
    """A named visibility, or a selection that fits `scenes`."""
    return st.one_of(st.sampled_from(NAMED_VISIBILITIES), selections(scenes))


@st.composite
def problems(draw, scenes=None):
    """(scenes, visibility, seed): all that a test of a layout or a kernel needs; `scenes` is a strategy."""
    drawn = draw(scene_lists() if scenes is None else scenes)
    return drawn, draw(visibilities(drawn)), draw(seeds)
