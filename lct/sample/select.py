"""Which earlier shots a new one sees: the newest, or those that its prompt speaks of (paper § 3.4, human selection).

A choice is a list of shot numbers in the order in which they are to stand. Only prompts are looked at, so that a choice
can be made, shown and changed before anything is generated.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from lct.data.prompts import characters

WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
# A character named in both prompts weighs more than all words they can share: identity is what history is for.
SAME_CHARACTER = 2.0


def recent(shots: int, most: int) -> list[int]:
    """The newest `most` of `shots` earlier shots, oldest first."""
    return list(range(max(0, shots - most), shots))


def relevant(prompt: str, earlier: Sequence[str], most: int) -> list[int]:
    """The `most` earlier shots whose prompts have most to do with `prompt`, in the order of the scene.

    Relevance is the cosine of the prompts' words, rare ones weighing more, and SAME_CHARACTER for each character that
    both name. First every character of the prompt gets the shot that fits best among those that name it; what room is
    left goes to the most relevant others. The newer shot wins a draw.
    """
    seen = Counter(word for text in earlier for word in _words(text))
    rarity = {word: math.log(1 + len(earlier) / (1 + seen[word])) ** 2 for word in seen.keys() | _words(prompt)}
    score = [_relevance(prompt, other, rarity) for other in earlier]
    ranked = sorted(range(len(earlier)), key=lambda i: (score[i], i), reverse=True)
    wanted = characters(prompt)
    first = [next((i for i in ranked if name in characters(earlier[i])), None) for name in wanted]
    order = dict.fromkeys([*(i for i in first if i is not None), *ranked])
    return sorted(list(order)[:most])


def _relevance(prompt: str, other: str, rarity: Mapping[str, float]) -> float:
    mine, theirs = _words(prompt), _words(other)

    def weight(words: frozenset[str]) -> float:
        return sum(rarity[word] for word in sorted(words))

    both = math.sqrt(weight(mine) * weight(theirs))
    cosine = weight(mine & theirs) / both if both else 0.0
    return cosine + SAME_CHARACTER * len(set(characters(prompt)) & set(characters(other)))


@lru_cache(maxsize=4096)
def _words(text: str) -> frozenset[str]:
    return frozenset(word.lower() for word in WORD.findall(text))


CONTEXT = 9  # shots that training had in one context, the new one included (§ 4)


def choose(sees: str | tuple[int, ...] | None, prompts: Sequence[str], index: int, context: int = CONTEXT) -> list[int]:
    """The shots that shot `index` sees by what a scene file says, in the order in which they stand before it.

    sees  "all", "recent:K" or "relevant:K"; shot numbers, counted from 1; None: all where they fit a context as in
          training, else the most relevant

    Raises ValueError for another rule.
    """
    if isinstance(sees, tuple):
        return [number - 1 for number in sees]
    rule, _, number = (sees or "").partition(":")
    if rule == "all" and not number:
        return list(range(index))
    most = context - 1 if sees is None else int(number) if number.isdecimal() else 0
    if sees is None and (index <= most or most == 0):
        return list(range(index if most else 0))
    if rule == "recent" and most:
        return recent(index, most)
    if (rule == "relevant" or sees is None) and most:
        return relevant(prompts[index], prompts[:index], most)
    raise ValueError(f"sees: expected all, recent:K, relevant:K or shot numbers, got {sees!r}")
