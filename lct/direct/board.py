"""What a director has decided: the shots as they are wanted, and for each the take that stands for it.

A take is made from *inputs*: prompts, size, seed, settings, and the takes that it saw. Its name is a hash of them, so
takes form a graph: one whose inputs are no longer those that its shot asks for is *stale*, and asking again for what
was made before finds it. Boards are values; every action makes a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lct.data.scenefile import GlobalPrompt, SceneFile, ShotEntry
from lct.data.scenes import shot_prompt
from lct.sample.select import CONTEXT, choose

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How takes are made: part of every take's inputs, but for where things lie.

    digest, parts  hashes of the weights, and of text encoders and VAE where a pipeline is named
    fp8            keys and values of what a shot sees are kept in 8 bits
    """

    weights: str
    digest: str
    steps: int = 20
    guidance: float = 1.5
    history_guidance: float = 1.0
    history_time: float = 0.1
    dtype: str | None = None
    fp8: bool = False
    pipeline: str | None = None
    parts: str | None = None


PLACES = ("weights", "pipeline")  # settings that say where things lie


@dataclass(frozen=True)
class Card:
    """One shot on the board.

    name   stays with the shot wherever it stands
    sees   which shots it sees, as in a scene file, but explicit ones by name; None: what fits, see `choose`
    take   the take that stands for it, None while there is none
    kept   approved: nothing but `reroll` and `keep` change its take
    given  its take is media of one's own, which saw nothing
    """

    name: str
    prompt: str
    cut: bool
    size: tuple[int, int, int] | None = None
    seed: int = 0
    sees: str | tuple[str, ...] | None = None
    take: str | None = None
    kept: bool = False
    given: bool = False


@dataclass(frozen=True)
class Board:
    """The shots in order, what they share, and the branch of the story that this is.

    context  shots that one sees by default, itself included: as many as the weights had in training
    """

    global_prompt: GlobalPrompt | None
    cards: tuple[Card, ...]
    settings: Settings
    fps: float
    codec: str
    context: int = CONTEXT
    branch: str = "main"
    action: str = "begin"
    turn: int = 0  # of actions so far; one that makes several takes leaves as many boards with the same turn
    named: int = 0  # of the newest name, in whatever branch
    key: str = ""  # of this board alone, so that who acts on it can tell whether it still stands

    @classmethod
    def of(cls, scene: SceneFile, settings: Settings, fps: float, context: int = CONTEXT) -> Board:
        """The board of a scene file, no take made."""
        names = [f"shot-{i + 1}" for i in range(len(scene.shots))]
        cards = tuple(
            Card(
                name,
                entry.prompt,
                entry.cut,
                entry.size,
                i if entry.seed is None else entry.seed,
                tuple(names[n - 1] for n in entry.sees) if isinstance(entry.sees, tuple) else entry.sees,
            )
            for i, (name, entry) in enumerate(zip(names, scene.shots, strict=True))
        )
        return cls(scene.global_prompt, cards, settings, fps, scene.codec or "pixel/1", context)

    def number(self, shot: int) -> int:
        """Index of the shot that people call `shot`, counting from 1; ValueError where there is none."""
        if not 1 <= shot <= len(self.cards):
            raise ValueError(f"shot: expected 1 to {len(self.cards)}, got {shot}; `status` lists them")
        return shot - 1

    def index(self, name: str) -> int | None:
        """Where the card called `name` stands; None where it was removed."""
        return next((i for i, card in enumerate(self.cards) if card.name == name), None)

    def place(self, name: str) -> int:
        """The same; ValueError where somebody removed it."""
        if (index := self.index(name)) is None:
            raise ValueError(f"{name} is no longer on the board; look again")
        return index

    def with_card(self, index: int, action: str, **changes: Any) -> Board:
        """The board after an action on one card."""
        card = replace(self.cards[index], **changes)
        return replace(self, cards=(*self.cards[:index], card, *self.cards[index + 1 :]), action=action)

    def seen(self, index: int) -> list[int]:
        """Indices of the shots that a shot sees, in the order in which they stand before it; removed ones left out."""
        card = self.cards[index]
        if card.given:
            return []
        if isinstance(card.sees, tuple):
            found = [self.index(name) for name in card.sees]
            return [i for i in found if i is not None]
        prompts = [c.prompt for c in self.cards[: index + 1]]
        return choose(card.sees, prompts, index, self.context)

    def circle(self) -> int | None:
        """A shot that sees itself through others, or None: such shots would make each other stale for ever."""
        chosen = [i for i, card in enumerate(self.cards) if isinstance(card.sees, tuple)]
        if not any(other > i for i in chosen for other in self.seen(i)):  # all look back
            return None
        finished: set[int] = set()

        def reaches_itself(index: int, path: frozenset[int]) -> bool:
            if index in path:
                return True
            if index in finished:
                return False
            found = any(reaches_itself(other, path | {index}) for other in self.seen(index))
            finished.add(index)
            return found

        return next((i for i in range(len(self.cards)) if reaches_itself(i, frozenset())), None)

    def in_order(self) -> list[int]:
        """The shots, each behind those that it sees."""
        order: dict[int, None] = {}

        def visit(index: int) -> None:
            if index not in order:
                for other in self.seen(index):
                    visit(other)
                order[index] = None

        for index in range(len(self.cards)):
            visit(index)
        return list(order)

    def wanted(self, index: int) -> Inputs:
        """The inputs of the take that a shot asks for now. ValueError where a shot that it sees has no take yet, and
        where it has no size."""
        card = self.cards[index]
        if card.size is None:
            raise ValueError(f"shot {index + 1} has no size; give it size = [frames, height, width]")
        seen = self.seen(index)
        missing = [i + 1 for i in seen if self.cards[i].take is None]
        if missing:
            raise ValueError(
                f"shot {index + 1} sees shot {missing[0]}, of which there is no take; `make {missing[0]}`, "
                f"or choose with `sees {index + 1} …`"
            )
        said = {k: v for k, v in asdict(self.settings).items() if v is not None and v is not False}  # 0 says something
        settings = {k: v for k, v in said.items() if k not in PLACES}
        return {
            "shot": card.name,
            "prompt": shot_prompt(card.prompt, card.cut),
            "global": None if self.global_prompt is None else self.global_prompt.text(),
            "size": list(card.size),
            "seed": card.seed,
            "saw": [self.cards[i].take for i in seen],
            "settings": settings,
        }

    def is_stale(self, index: int, made_from: Inputs) -> bool:
        """Whether the take of a shot, made from these inputs, is no longer what the shot asks for."""
        try:
            return self.wanted(index) != made_from
        except ValueError:
            return True

    def to_scene(self, media: Sequence[str | None]) -> SceneFile:
        """The scene file of this board; `media` names the latents of each shot."""
        numbers = {card.name: i + 1 for i, card in enumerate(self.cards)}
        shots = tuple(
            ShotEntry(
                card.prompt,
                card.cut,
                card.size,
                card.seed,
                name,
                sees=tuple(numbers[n] for n in card.sees if n in numbers)
                if isinstance(card.sees, tuple)
                else card.sees,
            )
            for card, name in zip(self.cards, media, strict=True)
        )
        return SceneFile(self.global_prompt, shots, self.fps, codec=self.codec)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Board:
        """The inverse of `to_json`; ValueError for anything else."""
        try:
            values = json.loads(text)
            shared, settings = values.pop("global_prompt"), Settings(**values.pop("settings"))
            cards = tuple(_card(card) for card in values.pop("cards"))
            return cls(None if shared is None else GlobalPrompt(**shared), cards, settings, **values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a board of this version, got {error!r}") from None


def _card(values: dict[str, Any]) -> Card:
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
    return Card(**fields)


def take_name(inputs: Inputs) -> str:
    """Name of the take made from these inputs: the same inputs, the same take."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return f"{inputs['shot']}-{digest[:10]}"
