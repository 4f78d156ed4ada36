"""Toy scenes with known truth: hidden identities that persist through a scene and are never named in its text.

A scene's characters (hue, shape, texture) and its background hue are drawn once and stand in no prompt, so that a shot
can show them rightly only by looking at the other shots. Who, where in the frame, motion, framing and place of a shot
stand in its own prompt. The light stands only in the global prompt, or in the shot's own prompt where a single shot has
no global one (§ 3.2.1).
Positions and radii are in pixels of the scene's own size; `scale` renders the same geometry with finer pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from lct.data.scenes import SceneSample, ShotSample

RGB = tuple[float, float, float]
Option = TypeVar("Option")

LIGHTS = {"day": 0.95, "dusk": 0.5, "night": 0.05}
LIGHT_WORDS = {"day": "by day", "dusk": "at dusk", "night": "at night"}
MOTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
PLACES = {"meadow": "in the meadow", "harbour": "by the harbour", "street": "on the street", "market": "at the market"}
SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "striped")
KINDS = ("single", "cut", "no_cut")
ROLES = ("wanderer", "traveller", "dancer")
ENTRANCES = ("left", "right", "up")  # motions of a character that comes in; none comes down out of the sky

# Pixels on a 16 x 16 frame, whose free area below the sky is 14 high; other sizes scale with that area's shorter side.
AREA = 14.0
RADIUS = {"wide shot": 3.0, "close-up": 4.0}
TRAVEL = {"wide shot": 4.0, "close-up": 4.0}
DEPTH = 2.0  # how far an entering character ends from the border that it came in by
ESTABLISHING = "establishing shot"
SUPERSAMPLING = 4
MAX_SHOTS = 9
# Fifth word of the evaluation generator's key; keys made of [seed, step, …] are shorter or have another word there.
EVALUATION = 0x4C43_5445


@dataclass(frozen=True)
class ToyConfig:
    """How hard the scenes are: what there is to remember, and how much the shots vary in size and place.

    establishing  share of shots that show nobody
    entering      share of the others whose character is not there yet in the first frame, and comes in from a border
    grid          characters start in the middle of squares of so many pixels where one is within reach; 0: anywhere
    weaves        strengths of a fine weave in the background, hidden as its hue is
    """

    characters: int = 1
    shapes: tuple[str, ...] = SHAPES[:2]
    textures: tuple[str, ...] = TEXTURES[:1]
    frames: tuple[int, ...] = (3,)
    sizes: tuple[tuple[int, int], ...] = ((16, 16),)
    establishing: float = 0.1
    entering: float = 0.0
    grid: int = 0
    weaves: tuple[float, ...] = ()


PRESETS = {
    "one_character": ToyConfig(grid=2),
    "returning": ToyConfig(textures=TEXTURES, establishing=0.25, entering=0.15, grid=2, weaves=(-0.08, 0.0, 0.08)),
    "two_characters": ToyConfig(characters=2, shapes=SHAPES[:3], frames=(2, 3, 4)),
    "three_characters": ToyConfig(
        characters=3, shapes=SHAPES, textures=TEXTURES, frames=(2, 3, 4), sizes=((16, 16), (12, 20), (20, 12))
    ),
}


@dataclass(frozen=True)
class Character:
    """What a character looks like, in every shot of its scene. `rgb` in [0, 1]."""

    rgb: RGB
    shape: str
    texture: str


@dataclass(frozen=True)
class ShotTruth:
    """What one shot shows. An establishing shot has no character: `who`, `motion`, `start` and `corner` are None.

    who     index into the scene's characters
    start   (y, x) of the character's centre in the first frame, in pixels
    corner  the quarter of the frame that it lies in; nearest to it where that is out of the frame
    enters  the character is out of the first frame and comes in
    """

    who: int | None
    motion: str | None
    framing: str
    place: str
    start: tuple[float, float] | None
    corner: str | None
    enters: bool = False


@dataclass(frozen=True)
class ToyTruth:
    """Everything that is true of a scene: the hidden identities, and what each shot shows.

    weave  how much brighter than the mean every other row of the background is, and darker the rows between
    """

    light: str
    background_rgb: RGB
    characters: tuple[Character, ...]
    shots: tuple[ShotTruth, ...]
    weave: float = 0.0


def sky_rows(height: int) -> int:
    """Rows of sky at the top of a frame of `height` pixels: 2 of 16."""
    return round(height * 2 / 16)


def unit(height: int, width: int) -> float:
    """Pixels of this frame size to one pixel of a 16 x 16 frame."""
    return min(height - sky_rows(height), width) / AREA


def corner_of(y: float, x: float, height: int, width: int) -> str:
    """The quarter of the frame that a point lies in; one on a middle line counts to the bottom or the right."""
    return f"{'top' if y < height / 2 else 'bottom'} {'left' if x < width / 2 else 'right'}"


def step(framing: str, frames: int, height: int, width: int, enters: bool = False) -> float:
    """Pixels a character moves from frame to frame: `frames` steps fit into the free area, an entrance takes all."""
    if enters:
        return unit(height, width) * (2 * RADIUS[framing] + DEPTH) / max(frames - 1, 1)
    free = AREA - 2 * RADIUS[framing]
    return unit(height, width) * min(TRAVEL[framing] / max(frames - 1, 1), free / frames)


def _samples(pixels: int, scale: int) -> np.ndarray:
    per_pixel = scale * SUPERSAMPLING
    return ((np.arange(pixels * per_pixel) + 0.5) / per_pixel).astype(np.float32)


def _pool(samples: np.ndarray) -> np.ndarray:
    """Mean over squares of samples: [..., H·4, W·4] -> float32 [..., H, W]."""
    *lead, rows, columns = samples.shape
    n = SUPERSAMPLING
    across = samples.reshape(*lead, rows, columns // n, n).sum(-1, dtype=np.float32)
    return across.reshape(*lead, rows // n, n, columns // n).sum(-2) / n**2


def inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points, given relative to the centre in radii, lie inside a shape; bool, broadcast of y and x."""
    if shape == "circle":
        return y * y + x * x <= 1
    if shape == "square":
        return np.maximum(np.abs(y), np.abs(x)) <= np.sqrt(np.pi) / 2
    if shape == "triangle":
        return (np.abs(y) <= 1) & (np.abs(x) <= (y + 1) / 2)
    return (np.maximum(np.abs(y), np.abs(x)) <= 1) & (np.minimum(np.abs(y), np.abs(x)) <= 0.4)


def coverage(shape: str, centres: np.ndarray, radius: float, height: int, width: int, scale: int = 1) -> tuple:
    """How much of every pixel a shape covers, and how much its dark stripe does (anti-aliased).

    centres  [T, 2], (y, x) in pixels
    Returns two float32 [T, height·scale, width·scale] in [0, 1].
    """
    centres = np.asarray(centres, np.float32)
    y = (_samples(height, scale) - centres[:, :1])[:, :, None] / np.float32(radius)
    x = (_samples(width, scale) - centres[:, 1:])[:, None, :] / np.float32(radius)
    shown = inside(shape, y, x)
    return _pool(shown), _pool(shown & (np.abs(x) <= 1 / 3))


@lru_cache(maxsize=64)
def place_pattern(place: str, height: int, width: int, scale: int = 1) -> np.ndarray:
    """Brightness that a place adds to the background; float32 [height·scale, width·scale], zero in the sky."""
    sky = sky_rows(height)
    down = ((_samples(height, scale) - sky) / (height - sky))[:, None]
    across = (_samples(width, scale) / width)[None, :]
    pattern = np.zeros((down.size, across.size), np.float32)
    if place == "harbour":
        pattern -= 0.1 * (down > 2 / 3)
    elif place == "street":
        pattern += 0.06 * (1 - 2 * (np.floor(8 * across) % 2))
    elif place == "market":
        pattern += 0.06 * (1 - 2 * ((np.floor(4 * across) + np.floor(4 * down)) % 2))
    pooled = _pool(pattern * (down >= 0))
    pooled.setflags(write=False)
    return pooled


def weave_rows(height: int) -> np.ndarray:
    """Which rows of the frame a weave of strength 1 makes brighter and which darker; float32 [height] of 1 and -1."""
    return (1 - 2 * (np.arange(height) % 2)).astype(np.float32)


def background(truth: ToyTruth, place: str, height: int, width: int, scale: int = 1) -> np.ndarray:
    """The frame without a character: sky above, the place below; float32 [height·scale, width·scale, 3] in [0, 1]."""
    frame = place_pattern(place, height, width, scale)[..., None] + np.asarray(truth.background_rgb, np.float32)
    if truth.weave:
        frame += np.float32(truth.weave) * weave_rows(height).repeat(scale)[:, None, None]
    frame[: sky_rows(height) * scale] = LIGHTS[truth.light]
    return frame


def render(
    truth: ToyTruth, shot: ShotTruth, centres: np.ndarray, height: int, width: int, scale: int = 1
) -> np.ndarray:
    """Draw one shot, its character at `centres` [T, 2]; float32 [T, height·scale, width·scale, 3] in [0, 1]."""
    empty = background(truth, shot.place, height, width, scale)
    if shot.who is None:
        return np.repeat(empty[None], len(centres), axis=0)
    who = truth.characters[shot.who]
    radius = RADIUS[shot.framing] * unit(height, width)
    cover, stripe = coverage(who.shape, centres, radius, height, width, scale)
    cover[:, : sky_rows(height) * scale] = 0
    stripe[:, : sky_rows(height) * scale] = 0
    shown = paint(cover, stripe, who.texture)
    return empty * (1 - cover)[..., None] + shown[..., None] * np.asarray(who.rgb, np.float32)


def paint(cover: np.ndarray, stripe: np.ndarray, texture: str) -> np.ndarray:
    """How strongly each pixel shows its character's colour: a dark stripe shows half of it."""
    return cover - 0.5 * stripe if texture == "striped" else cover


def path_of(shot: ShotTruth, at: np.ndarray, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Centres [T, 2] of a shot's character at times `at` [T], counted in its frames; zeros in an establishing shot."""
    if shot.start is None or shot.motion is None:
        return np.zeros((len(at), 2))
    travelled = step(shot.framing, frames, *size, shot.enters) * at
    return np.asarray(shot.start) + travelled[:, None] * np.asarray(MOTIONS[shot.motion])


def to_frames(latents: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] of latents in [-1, 1]; the same shape."""
    return (latents + 1) / 2


def _shot_text(shot: ShotTruth) -> str:
    if shot.who is None:
        return f"{shot.framing} of the {shot.place}"
    who = f"Character {shot.who + 1}{' entering' if shot.enters else ''}"
    return f"{shot.framing} of {who}, {shot.corner}, moving {shot.motion} {PLACES[shot.place]}"


def _global_text(truth: ToyTruth) -> str:
    """[Character] [Environment] [Story] (§ 3.2.1)."""
    cast = [f"Character {i + 1}: a {ROLES[i]}." for i in range(len(truth.characters))]
    story = "Character 1 wanders about." if len(cast) == 1 else "They wander about."
    return " ".join([*cast, f"The scene is set {LIGHT_WORDS[truth.light]}.", story])


def _choose(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


class ToyScenes:
    """Draws toy scenes; every scene is a pure function of the arguments and the generator's state.

    preset     a name in PRESETS, or a ToyConfig of one's own
    max_shots  most shots of a scene, 2 to 9
    Raises ValueError on an unknown preset or a number of shots out of range.
    """

    def __init__(self, preset: str | ToyConfig = "one_character", max_shots: int = 4):
        if isinstance(preset, str) and preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        if not 2 <= max_shots <= MAX_SHOTS:
            raise ValueError(f"max_shots: expected 2 to {MAX_SHOTS}, got {max_shots}")
        self.config = PRESETS[preset] if isinstance(preset, str) else preset
        self.max_shots = max_shots

    def sample(self, kind: str, rng: np.random.Generator, shots: int | None = None) -> SceneSample:
        """Draw one scene; `rng` advances.

        kind   "single": one shot on its own, no global prompt; "cut": shots with a cut before each, every one at a
               fresh place, framing and position; "no_cut": one long shot, divided where the motion changes
        shots  their number, 1 to 9; by default drawn from 2 to max_shots
        Raises ValueError on an unknown kind or a number out of range.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "single":
            shots = 1
        elif shots is None:
            shots = int(rng.integers(1 if kind == "cut" else 2, self.max_shots + 1))
        _check_shots(shots)
        size = _choose(rng, self.config.sizes)
        if kind == "no_cut":
            lengths = (int(_choose(rng, self.config.frames)),) * shots
            events = self._long_shot(rng, lengths[0], shots, size)
        else:
            lengths = tuple(int(_choose(rng, self.config.frames)) for _ in range(shots))
            events = tuple(self._shot(rng, frames, size) for frames in lengths)
        return self._scene(kind, self._truth(rng, events), lengths, size)

    def evaluation_scene(
        self,
        index: int,
        seed: int,
        shots: int,
        cast: Sequence[int | None] | None = None,
        entering: Collection[int] = (),
        kind: str = "cut",
    ) -> SceneSample:
        """Scene `index` of a held-out set, of any number of shots. The generator's key lies in a namespace of its own:
        no training seed leads to the same stream.

        cast      who each shot shows, None for nobody; by default the characters take turns, and the framing alternates
                  from one turn to the next, so that identity is defined in every shot
        entering  the shots whose character comes in
        kind      as in `sample`; segments of a "no_cut" shot have a cast of their own
        """
        if shots < 1:
            raise ValueError(f"shots: expected at least 1, got {shots}")
        rng = np.random.default_rng(np.random.SeedSequence([seed, index], spawn_key=(EVALUATION,)))
        size = _choose(rng, self.config.sizes)
        if kind == "no_cut":
            lengths = (int(_choose(rng, self.config.frames)),) * shots
            events = self._long_shot(rng, lengths[0], shots, size)
            return self._scene(kind, self._truth(rng, events), lengths, size)
        lengths = tuple(int(_choose(rng, self.config.frames)) for _ in range(shots))
        framings = list(RADIUS) if rng.random() < 0.5 else list(RADIUS)[::-1]
        turns = [divmod(i, self.config.characters) for i in range(shots)]
        who = [character for _, character in turns] if cast is None else cast
        events = tuple(
            self._event(rng, frames, size, who[i], framings[turns[i][0] % 2], i in entering)
            for i, frames in enumerate(lengths)
        )
        return self._scene(kind, self._truth(rng, events), lengths, size)

    def _truth(self, rng: np.random.Generator, events: tuple[ShotTruth, ...]) -> ToyTruth:
        characters = tuple(
            Character(
                colorsys.hsv_to_rgb(rng.random(), 0.9, 0.95),
                _choose(rng, self.config.shapes),
                _choose(rng, self.config.textures),
            )
            for _ in range(self.config.characters)
        )
        background_rgb = colorsys.hsv_to_rgb(rng.random(), 0.35, 0.5)
        light = _choose(rng, list(LIGHTS))
        weave = _choose(rng, self.config.weaves) if self.config.weaves else 0.0
        return ToyTruth(light, background_rgb, characters, events, weave)

    def _shot(self, rng: np.random.Generator, frames: int, size) -> ShotTruth:
        """What a shot of a scene with cuts shows."""
        place = _choose(rng, list(PLACES))
        if rng.random() < self.config.establishing:
            return _nobody(place)
        framing = _choose(rng, list(RADIUS))
        who = int(rng.integers(self.config.characters))
        enters = self.config.entering > 0 and rng.random() < self.config.entering
        return self._appearance(rng, frames, size, who, framing, place, enters)

    def _event(self, rng: np.random.Generator, frames: int, size, who: int | None, framing: str, enters: bool):
        """The same with everything chosen but place and motion."""
        place = _choose(rng, list(PLACES))
        return _nobody(place) if who is None else self._appearance(rng, frames, size, who, framing, place, enters)

    def _appearance(
        self, rng: np.random.Generator, frames: int, size, who: int, framing: str, place: str, enters: bool
    ) -> ShotTruth:
        low, high = _room(framing, size)
        motion = _choose(rng, ENTRANCES if enters else list(MOTIONS))
        way = np.asarray(MOTIONS[motion])
        if enters:
            radius = RADIUS[framing] * unit(*size)
            before = np.where(way > 0, -radius, np.asarray(size) + radius)
            start = np.where(way, before, self._place(rng, low, high))
        else:
            travel = (frames - 1) * step(framing, frames, *size) * way
            start = self._place(rng, low + np.maximum(-travel, 0), high - np.maximum(travel, 0))
        return _seen(who, motion, framing, place, start, size, enters)

    def _place(self, rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """A point (y, x) between low and high, in the middle of a square of the grid where one lies there."""
        point, grid = rng.uniform(low, high), self.config.grid
        if not grid:
            return point
        on_grid = (np.clip(np.floor(point / grid), np.ceil(low / grid - 0.5), np.floor(high / grid - 0.5)) + 0.5) * grid
        return np.where((low <= on_grid) & (on_grid <= high), on_grid, point)

    def _long_shot(self, rng: np.random.Generator, frames: int, shots: int, size) -> tuple[ShotTruth, ...]:
        """Segments of one long shot. The character moves between the corners of a square, an edge per segment: there is
        room for every segment, and the motion changes at every boundary."""
        who, place = int(rng.integers(self.config.characters)), _choose(rng, list(PLACES))
        framing = _choose(rng, list(RADIUS))
        low, high = _room(framing, size)
        edge = frames * step(framing, frames, *size)
        square = self._place(rng, low, np.maximum(high - edge, low))
        far = rng.integers(2, size=2)
        events = []
        for axis in rng.integers(2, size=shots):
            motion = (("down", "up"), ("right", "left"))[axis][far[axis]]
            events.append(_seen(who, motion, framing, place, square + edge * far, size))
            far[axis] = 1 - far[axis]
        return tuple(events)

    def _scene(self, kind: str, truth: ToyTruth, lengths: Sequence[int], size: tuple[int, int]) -> SceneSample:
        shots = []
        for event, frames in zip(truth.shots, lengths, strict=True):
            pixels = render(truth, event, path_of(event, np.arange(frames), frames, size), *size)
            latents = (2 * pixels - 1).astype(np.float32, copy=False)
            text = _shot_text(event)
            if kind == "single":
                text = f"{text} {LIGHT_WORDS[truth.light]}"
            shots.append(ShotSample(latents, text, kind == "cut", latents))
        return SceneSample(None if kind == "single" else _global_text(truth), tuple(shots), truth)


def _check_shots(shots: int) -> None:
    if not 1 <= shots <= MAX_SHOTS:
        raise ValueError(f"shots: expected 1 to {MAX_SHOTS}, got {shots}")


def _nobody(place: str) -> ShotTruth:
    return ShotTruth(None, None, ESTABLISHING, place, None, None)


def _seen(who: int, motion: str, framing: str, place: str, start: np.ndarray, size, enters: bool = False) -> ShotTruth:
    y, x = float(start[0]), float(start[1])
    return ShotTruth(who, motion, framing, place, (y, x), corner_of(y, x, *size), enters)


def _room(framing: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest centre (y, x) at which a character lies inside the free area."""
    height, width = size
    radius = RADIUS[framing] * unit(height, width)
    return np.array([sky_rows(height) + radius, radius]), np.array([height - radius, width - radius])
