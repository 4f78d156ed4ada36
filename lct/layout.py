"""Scenes of shots as one sequence of rows: order, visibility, positions (paper § 3.2.2, § 3.3, Fig. 3).

`SceneLayout` is the single source of truth. The plan that kernels walk, the dense mask, the RoPE positions, the maps
between the text and video streams, FLOP counts and cache rows all derive from it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np

from lct.plan import Interval, Plan, Run, merge_intervals

if TYPE_CHECKING:
    import torch

VISIBILITIES = ("isolated", "bidirectional", "context_causal")
ROLES = ("shot", "global")

Selection = tuple[tuple[tuple[int, ...], ...], ...]


def _size(name: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number of tokens, got {value!r}")
    number = operator.index(value)  # type: ignore[arg-type]
    if number < 0:
        raise ValueError(f"{name}: expected at least 0 tokens, got {number}")
    return number


@dataclass(frozen=True)
class Shot:
    """One text prompt followed by one video clip (an image has T = 1).

    text   number of text tokens L
    video  (T, H, W), frames, height and width in latent patches
    role   "shot", or "global" for the global prompt with its dummy video token, which is shot 0 of its scene
    """

    text: int
    video: tuple[int, int, int]
    role: str = "shot"

    def __post_init__(self):
        object.__setattr__(self, "text", _size("Shot.text", self.text))
        if not isinstance(self.video, Sequence) or len(self.video) != 3:
            raise ValueError(f"Shot.video: expected (frames, height, width) in patches, got {self.video!r}")
        named = zip(("frames", "height", "width"), self.video, strict=True)
        object.__setattr__(self, "video", tuple(_size(f"Shot.video {name}", value) for name, value in named))
        if self.role not in ROLES:
            raise ValueError(f"Shot.role: expected one of {ROLES}, got {self.role!r}")

    @property
    def video_rows(self) -> int:
        frames, height, width = self.video
        return frames * height * width

    @property
    def rows(self) -> int:
        return self.text + self.video_rows

    def extent(self, text_scale: float = 1.0) -> float:
        """How far along the diagonal the next shot starts after this one (Fig. 3b)."""
        return text_scale * self.text + max(self.video)


MAX_ROWS = 2**31 - 1  # row numbers are int32 in the plan; offsets are int64 before the first multiply
GLOBAL_VIDEO = (1, 1, 1)  # one zero latent, time 0: the dummy video of a global prompt (§ 3.2.2 leaves its size open)


@dataclass(frozen=True)
class Streams:
    """Where the rows of the two streams sit in joint order, and which shot each belongs to.

    text_rows [S_text], video_rows [S_video]   joint row of each stream row; int64
    text_shot [S_text], video_shot [S_video]   its shot, an index into a vector of per-shot values such as times; int64
    text_starts, video_starts [N + 1]          the first stream row of each shot, and the number of rows; int32
    """

    text_rows: torch.Tensor
    video_rows: torch.Tensor
    text_shot: torch.Tensor
    video_shot: torch.Tensor
    text_starts: torch.Tensor
    video_starts: torch.Tensor


@dataclass(frozen=True)
class SharedRows:
    """How the joint rows of a pass are shared out over processes; see `lct.model.shared`.

    group        name of the process group
    count, size  processes, and joint rows of each, the last ones perhaps fewer
    text, video  (first, end) of this process's rows in the two streams
    """

    group: str
    count: int
    size: int
    text: Interval
    video: Interval


@dataclass(frozen=True)
class Geometry:
    """All that one forward pass needs to know about its rows.

    shots      the shots whose rows are computed, in row order
    plan       who sees whom
    streams    stream rows to joint rows and shots
    positions  float32 [S, 3], (t, y, x) of each joint row
    slots      int64 [S], the cache row each joint row's key and value are written to; None without a cache
    cross      for models whose video rows read text by cross-attention (Wan): which rows of packed text each video row
               sees. Then joint rows are video rows alone, and `streams` has no text
    shared     where each of several processes computes some of the rows: then `streams` and `positions` are of those,
               and `plan` of all
    """

    shots: tuple[Shot, ...]
    plan: Plan
    streams: Streams
    positions: torch.Tensor
    slots: torch.Tensor | None = None
    cross: Plan | None = None
    shared: SharedRows | None = None


@dataclass(frozen=True, init=False)
class SceneLayout:
    """Scenes of shots packed without padding into S rows: scene by scene, shot by shot, text before video.

    scenes      sequences of shots; a scene's first shot may have the role "global"
    visibility  "isolated"        a shot sees itself and the global prompt of its scene
                "bidirectional"   a shot sees its whole scene (§ 3.2.2)
                "context_causal"  a shot sees its scene up to its own end (§ 3.3)
                or, per scene and shot, the indices of the earlier shots it sees beside itself and the global prompt
    offsets     per scene and shot, where it starts along the space diagonal, for studies; None: each where the one
                before it ends, as in the paper

    Immutable, hashable, equal by value; lives on the host. TypeError or ValueError for sizes that are not whole and
    non-negative, empty scenes, misplaced global prompts, impossible selections and offsets that are not one a shot.
    """

    scenes: tuple[tuple[Shot, ...], ...]
    visibility: str | Selection
    offsets: tuple[tuple[float, ...], ...] | None

    def __init__(
        self,
        scenes: Iterable[Iterable[Shot]],
        visibility: str | Iterable[Iterable[Iterable[int]]] = "context_causal",
        offsets: Iterable[Iterable[float]] | None = None,
    ):
        object.__setattr__(self, "scenes", _scenes(scenes))
        object.__setattr__(self, "visibility", _visibility(visibility, self.scenes))
        object.__setattr__(self, "offsets", _offsets(offsets, self.scenes))

    # -- rows ----------------------------------------------------------------------------------------------------

    @cached_property
    def shots(self) -> tuple[Shot, ...]:
        """All shots in row order."""
        return tuple(shot for scene in self.scenes for shot in scene)

    @cached_property
    def shot_ends(self) -> tuple[int, ...]:
        return tuple(accumulate(shot.rows for shot in self.shots))

    @cached_property
    def shot_starts(self) -> tuple[int, ...]:
        return (0, *self.shot_ends[:-1])

    @cached_property
    def scene_of_shot(self) -> tuple[int, ...]:
        return tuple(index for index, scene in enumerate(self.scenes) for _ in scene)

    @cached_property
    def scene_rows(self) -> tuple[int, ...]:
        """Rows of each scene."""
        return tuple(sum(shot.rows for shot in scene) for scene in self.scenes)

    @cached_property
    def first_shots(self) -> tuple[int, ...]:
        """Index in `shots` of each scene's first shot."""
        return (0, *accumulate(len(scene) for scene in self.scenes))[:-1]

    @property
    def rows(self) -> int:
        return self.shot_ends[-1]

    @cached_property
    def text_rows(self) -> int:
        return sum(shot.text for shot in self.shots)

    @cached_property
    def video_rows(self) -> int:
        return sum(shot.video_rows for shot in self.shots)

    # -- visibility ----------------------------------------------------------------------------------------------

    def visible_shots(self, scene: int, shot: int) -> tuple[int, ...]:
        """Indices within `scene` of the shots that `shot` sees, itself included, ascending."""
        count = len(self.scenes[scene])
        if not 0 <= shot < count:
            raise IndexError(f"shot: expected 0 to {count - 1}, got {shot}")
        if self.visibility == "bidirectional":
            return tuple(range(count))
        if self.visibility == "context_causal":
            return tuple(range(shot + 1))
        seen = {shot}
        if self.scenes[scene][0].role == "global":
            seen.add(0)
        if not isinstance(self.visibility, str):
            seen.update(self.visibility[scene][shot])
        return tuple(sorted(seen))

    def _scene_intervals(self, scene: int, shot: int) -> tuple[Interval, ...]:
        """What a shot sees, as rows counted from the start of its scene."""
        ends = tuple(accumulate((s.rows for s in self.scenes[scene]), initial=0))
        return merge_intervals((ends[other], ends[other + 1]) for other in self.visible_shots(scene, shot))

    def visible_intervals(self, index: int) -> tuple[Interval, ...]:
        """The merged row intervals that the rows of `shots[index]` see."""
        scene = self.scene_of_shot[index]
        first = self.first_shots[scene]
        origin = self.shot_starts[first]
        return tuple((origin + a, origin + b) for a, b in self._scene_intervals(scene, index - first))

    def plan(self, device: str | torch.device = "cpu") -> Plan:
        """The table of runs that kernels walk; memoised, its size depends on the number of shots alone."""
        return _plan(self, str(device))

    def dense_mask(self) -> torch.Tensor:
        """bool [S, S], True where row i sees row j. For tests and pictures."""
        return self.plan().dense_mask()

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        return self.plan().pairs

    def flops(self, heads: int, head_dim: int, backward: bool = False) -> int:
        """Operations of one attention over visible pairs: 4·pairs·A·D forward, 2.5 times that backward."""
        forward = 4 * self.pairs * heads * head_dim
        return forward * 5 // 2 if backward else forward

    def _one_each(self, name: str, values: object) -> None:
        got = len(values) if isinstance(values, Sequence) else values
        if got != len(self.scenes):
            raise ValueError(f"{name}: expected one for each of {len(self.scenes)} scenes, got {got}")

    # -- positions and streams -----------------------------------------------------------------------------------

    def origins(self, text_scale: float = 1.0) -> tuple[float, ...]:
        """Offset p of every shot along the space diagonal; each scene starts at 0 (Fig. 3b)."""
        if not 0 <= text_scale < float("inf"):
            raise ValueError(f"text_scale: expected a finite number of at least 0, got {text_scale}")
        if self.offsets is not None:
            return tuple(offset for scene in self.offsets for offset in scene)
        return tuple(
            origin
            for scene in self.scenes
            for origin in tuple(accumulate((shot.extent(text_scale) for shot in scene), initial=0.0))[:-1]
        )

    def positions(self, text_scale: float = 1.0, device: str | torch.device = "cpu") -> torch.Tensor:
        """float32 [S, 3], the (t, y, x) of every row: interleaved 3D RoPE coordinates (§ 3.2.2, Fig. 3b).

        Text token i of a shot at offset p sits at (p + λi) on all axes, video token (f, h, w) at p + λL + (f, h, w);
        λ = `text_scale`. λ = 0 puts all text at the shot's origin, as in models that do not rotate text.
        """
        return _positions(self.shots, self.origins(text_scale), text_scale, device)

    def streams(self, device: str | torch.device = "cpu") -> Streams:
        """Index maps between the text and video streams and joint order."""
        return _streams(self.shots, device)

    def geometry(self, device: str | torch.device = "cpu", text_scale: float = 1.0, cross: bool = False) -> Geometry:
        """Everything a forward pass over all rows of this layout needs; see `Geometry.cross` for `cross`."""
        if cross:
            return _crossed(self.videos.geometry(device), self.shots, device)
        return Geometry(self.shots, self.plan(device), self.streams(device), self.positions(text_scale, device))

    @cached_property
    def videos(self) -> SceneLayout:
        """The layout of the videos alone, without their text; ValueError where there is a global prompt, which has a
        place of its own among rows of text and video only."""
        if any(shot.role == "global" for shot in self.shots):
            raise ValueError("scenes: with cross-attention a global prompt stands before the text of every shot")
        return SceneLayout([map(_mute, scene) for scene in self.scenes], self.visibility, self.offsets)

    # -- generation ----------------------------------------------------------------------------------------------

    def append(self, shots: Sequence[Shot], sees: Sequence[Iterable[int]] | None = None) -> SceneLayout:
        """The layout with one more shot at the end of every scene; the rows of each scene keep their order.

        sees  for an explicit selection: per scene, the earlier shots that the new one sees
        """
        self._one_each("shots", shots)
        if self.offsets is not None:
            raise ValueError("offsets: expected a layout whose shots stand one behind the other; make a new one")
        scenes = [(*scene, shot) for scene, shot in zip(self.scenes, shots, strict=True)]
        if isinstance(self.visibility, str):
            if sees is not None:
                raise ValueError(f"sees: only an explicit selection takes it, visibility is {self.visibility!r}")
            return SceneLayout(scenes, self.visibility)
        self._one_each("sees", sees)
        assert sees is not None
        selection = [(*scene, new) for scene, new in zip(self.visibility, sees, strict=True)]
        return SceneLayout(scenes, selection)

    def tail(
        self,
        first: int,
        capacity: int,
        alternatives: Sequence[Shot] | None = None,
        device: str | torch.device = "cpu",
        text_scale: float = 1.0,
        alone: Sequence[Shot] | None = None,
        cross: bool = False,
    ) -> Geometry:
        """Geometry of the rows from shot `first` of every scene on, over a cache that holds the shots before it.

        Scene b owns cache rows b·capacity onward, in the order of its rows. `alternatives` adds to each scene a second
        version of its last shot, for guidance: same place and history, other prompt. `alone` adds one that sees the
        global prompt and no other shot, for guidance on the history. They are written behind the scene
        ([history | shot | alternative | alone]), and no version sees another.

        ValueError where a scene does not fit `capacity`, before anything is written, and for bidirectional visibility,
        under which a cached key would have to change.
        """
        if cross:
            mute = [version and [*map(_mute, version)] for version in (alternatives, alone)]
            geometry = self.videos.tail(first, capacity, mute[0], device, 0.0, mute[1])
            versions = [version for version in (alternatives, alone) if version is not None]
            own = [(*scene[first:], *(v[b] for v in versions)) for b, scene in enumerate(self.scenes)]
            return _crossed(geometry, [shot for shots in own for shot in shots], device)
        if self.visibility == "bidirectional":
            raise ValueError("visibility: a cache needs context_causal, isolated or a selection, got 'bidirectional'")
        first = _size("first", first)
        versions = [(name, v) for name, v in (("alternatives", alternatives), ("alone", alone)) if v is not None]
        for name, version in versions:
            self._one_each(name, version)
        shots: list[Shot] = []
        origins: list[float] = []
        slots: list[Interval] = []
        runs: list[Run] = []
        at = 0
        all_origins = self.origins(text_scale)

        def add(shot: Shot, origin: float, slot: int, sees: Iterable[Interval]) -> None:
            nonlocal at
            shots.append(shot)
            origins.append(origin)
            slots.append((slot, slot + shot.rows))
            runs.append(Run(at, at + shot.rows, merge_intervals(sees)))
            at += shot.rows

        for b, scene in enumerate(self.scenes):
            if first >= len(scene):
                raise ValueError(f"first: expected a shot of scene {b}, which has {len(scene)}, got {first}")
            starts = tuple(accumulate((shot.rows for shot in scene), initial=0))
            needed = starts[-1] + sum(version[b].rows for _, version in versions)
            if needed > capacity:
                raise ValueError(
                    f"capacity: scene {b} needs {needed} cache rows, got {capacity}; allocate a larger cache or rewind"
                )
            base = b * capacity
            for index in range(first, len(scene)):
                sees = [(base + i, base + j) for i, j in self._scene_intervals(b, index)]
                add(scene[index], all_origins[self.first_shots[b] + index], base + starts[index], sees)
            slot, own = base + starts[-1], (base + starts[-2], base + starts[-1])
            history = _without(runs[-1].sees, own)
            shared = ((base, base + scene[0].rows),) if scene[0].role == "global" and len(scene) > 1 else ()
            for name, version in versions:
                end = slot + version[b].rows
                add(version[b], origins[-1], slot, (*(shared if name == "alone" else history), (slot, end)))
                slot = end
        import torch

        plan = Plan.build(runs, at, len(self.scenes) * capacity, device)
        where = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in slots])
        return Geometry(
            tuple(shots),
            plan,
            _streams(shots, device),
            _positions(shots, origins, text_scale, device),
            torch.from_numpy(where).to(device),
        )


def _mute(shot: Shot) -> Shot:
    return replace(shot, text=0)


def _crossed(geometry: Geometry, shots: Sequence[Shot], device: str | torch.device) -> Geometry:
    """A geometry of videos alone, whose rows see the text of their own shot by cross-attention."""
    texts, videos = ([0, *accumulate(rows)] for rows in zip(*((s.text, s.video_rows) for s in shots), strict=True))
    runs = [Run(*video, (text,)) for video, text in zip(pairwise(videos), pairwise(texts), strict=True)]
    return replace(geometry, shots=tuple(shots), cross=Plan.build(runs, videos[-1], texts[-1], device))


def _without(intervals: Sequence[Interval], cut: Interval) -> tuple[Interval, ...]:
    """The intervals less the rows of `cut`."""
    before = ((a, min(b, cut[0])) for a, b in intervals)
    after = ((max(a, cut[1]), b) for a, b in intervals)
    return merge_intervals((*before, *after))


def _items(name: str, values: object, wanted: str) -> tuple:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{name}: expected {wanted}, got {values!r}")
    return tuple(values)


def _scenes(scenes: object) -> tuple[tuple[Shot, ...], ...]:
    packed = tuple(
        _items(f"scenes: scene {b}", scene, "a list of shots (scenes are a list of lists)")
        for b, scene in enumerate(_items("scenes", scenes, "a list of scenes, each a list of shots"))
    )
    if not packed:
        raise ValueError("scenes: expected at least one scene, got none")
    for b, scene in enumerate(packed):
        if not scene:
            raise ValueError(f"scenes: scene {b} is empty; give it at least one Shot")
        for index, shot in enumerate(scene):
            if not isinstance(shot, Shot):
                raise TypeError(f"scenes: scene {b}, shot {index}: expected a Shot, got {shot!r}")
            if shot.role == "global" and index:
                raise ValueError(f"scenes: scene {b}: the global prompt must be shot 0, got it as shot {index}")
    rows = sum(shot.rows for scene in packed for shot in scene)
    if rows > MAX_ROWS:
        raise ValueError(f"scenes: expected at most {MAX_ROWS} rows, got {rows}; split the batch")
    return packed


def _visibility(visibility: object, scenes: tuple[tuple[Shot, ...], ...]) -> str | Selection:
    if isinstance(visibility, str):
        if visibility not in VISIBILITIES:
            raise ValueError(f"visibility: expected one of {VISIBILITIES} or a selection, got {visibility!r}")
        return visibility
    chosen = _items("visibility", visibility, f"one of {VISIBILITIES} or a selection per scene and shot")
    if len(chosen) != len(scenes):
        raise ValueError(f"visibility: expected a selection for each of {len(scenes)} scenes, got {len(chosen)}")
    return tuple(_selection(b, scene, shots) for b, (scene, shots) in enumerate(zip(scenes, chosen, strict=True)))


def _selection(b: int, scene: tuple[Shot, ...], chosen: object) -> tuple[tuple[int, ...], ...]:
    shots = _items(f"visibility: scene {b}", chosen, "the earlier shots that each shot sees")
    if len(scene) != len(shots):
        raise ValueError(f"visibility: scene {b} has {len(scene)} shots, its selection {len(shots)}")
    selection = []
    for index, sees in enumerate(shots):
        name = f"visibility: scene {b}, shot {index}"
        others = {_size(name, other) for other in _items(name, sees, "a list of earlier shots")}
        if others and max(others) >= index:
            raise ValueError(f"{name} may select earlier shots only, got {max(others)}")
        selection.append(tuple(sorted(others)))
    return tuple(selection)


def _offsets(offsets: object, scenes: tuple[tuple[Shot, ...], ...]) -> tuple[tuple[float, ...], ...] | None:
    if offsets is None:
        return None
    given = tuple(
        tuple(float(offset) for offset in _items(f"offsets: scene {b}", scene, "a number for each shot"))
        for b, scene in enumerate(_items("offsets", offsets, "numbers per scene and shot"))
    )
    if [len(scene) for scene in given] != [len(scene) for scene in scenes]:
        raise ValueError(
            f"offsets: expected one for each shot, {[len(s) for s in scenes]}, got {list(map(len, given))}"
        )
    if not all(isfinite(offset) for scene in given for offset in scene):
        raise ValueError("offsets: expected finite numbers")
    return given


def parse_layout(words: Sequence[str], visibility: str) -> SceneLayout:
    """The SceneLayout of words such as `global:12 9:3x8x8 / 4:1x2x2`; ValueError names the word that is wrong."""
    scenes: list[list[Shot]] = [[]]
    for word in words:
        if word == "/":
            scenes.append([])
            continue
        text, _, video = word.partition(":")
        try:
            if text == "global":
                scenes[-1].append(Shot(int(video), GLOBAL_VIDEO, "global"))
            else:
                frames, height, width = (int(n) for n in video.split("x"))
                scenes[-1].append(Shot(int(text), (frames, height, width)))
        except ValueError as error:
            wanted = "TEXT:TxHxW, for example 9:3x8x8, or global:TEXT"
            reason = "" if "invalid literal" in str(error) or "unpack" in str(error) else f" ({error})"
            raise ValueError(f"shots: expected {wanted}, got {word!r}{reason}") from None
    return SceneLayout(scenes, visibility)


@lru_cache(maxsize=256)
def _plan(layout: SceneLayout, device: str) -> Plan:
    runs = [
        Run(start, end, layout.visible_intervals(index))
        for index, (start, end) in enumerate(zip(layout.shot_starts, layout.shot_ends, strict=True))
    ]
    return Plan.build(runs, layout.rows, layout.rows, device)


def _positions(
    shots: Sequence[Shot], origins: Sequence[float], text_scale: float, device: str | torch.device
) -> torch.Tensor:
    import torch

    parts = []
    for shot, origin in zip(shots, origins, strict=True):
        text = origin + text_scale * np.arange(shot.text, dtype=np.float64)
        video = np.indices(shot.video, dtype=np.float64).reshape(3, -1).T + (origin + text_scale * shot.text)
        parts += [np.repeat(text[:, None], 3, axis=1), video]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(device)


def _streams(shots: Sequence[Shot], device: str | torch.device) -> Streams:
    import torch

    sizes = np.array([(shot.text, shot.video_rows) for shot in shots], np.int64)
    ids = np.arange(2 * len(shots))
    part = np.repeat(ids, sizes.ravel())  # shot 0 text, shot 0 video, shot 1 text, …
    is_video = part % 2 == 1

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    rows, shot = np.arange(part.size, dtype=np.int64), (part // 2).astype(np.int64)
    starts = np.concatenate([np.zeros((1, 2), np.int64), sizes.cumsum(0)]).astype(np.int32)
    return Streams(
        *(tensor(x) for x in (rows[~is_video], rows[is_video], shot[~is_video], shot[is_video])),
        *(tensor(x) for x in starts.T),
    )
