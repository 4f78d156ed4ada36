"""Text encoders: prompts in, packed features out."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from lct.model.layers import time_features

NULL = 0  # the one token of the null prompt
_WORDS = re.compile(r"\[[A-Z ]+\]|\w+")  # a mark such as [SHOT CUT] is one word
_WAVES = 16
_SALT = 14  # with it no two words of the toy scenes fall into one of 511 buckets


class TextEncoder(Protocol):
    """What the trainer and the samplers ask of a text encoder, small or large, learned or frozen."""

    def tokenize(self, prompt: str) -> Tensor:
        """A prompt, a row for each text token of its shot; "" is the null prompt of guidance. Of a learned encoder ids
        [L], of a frozen one features [L, text channels], so that it runs once and not in every step."""
        ...

    def length(self, prompt: str) -> int:
        """Rows that `tokenize` would give, without reading them."""
        ...

    def __call__(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Tokens of packed prompts, and places int64 [S_text], where in its prompt each stands -> features [S_text,
        text channels]."""
        ...


class WordEncoder(nn.Module):
    """Learned vectors of hashed words and of their places in the prompt. The null prompt "" is one token of its own."""

    def __init__(self, vocabulary: int, channels: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.words = nn.Embedding(vocabulary, channels)
        self.places = nn.Linear(_WAVES, channels, bias=False)

    def tokenize(self, prompt: str) -> Tensor:
        """int64 ids of the words of a prompt, upper and lower case alike; at least one."""
        words = [word.lower() for word in _WORDS.findall(prompt)]
        return torch.tensor([1 + zlib.crc32(word.encode(), _SALT) % (self.vocabulary - 1) for word in words] or [NULL])

    def length(self, prompt: str) -> int:
        return len(_WORDS.findall(prompt)) or 1

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """tokens, places int64 [S_text] -> [S_text, channels]."""
        waves = time_features(places.to(self.words.weight.dtype) / 1000, _WAVES)
        return self.words(tokens) + self.places(waves)


class Finished:
    """A frozen encoder, whose features are the tokens: `lookup` turns a prompt into them, `count` says how many rows
    that will be."""

    def __init__(self, lookup: Callable[[str], Tensor], count: Callable[[str], int] | None = None):
        self.lookup, self.count = lookup, count

    def tokenize(self, prompt: str) -> Tensor:
        return self.lookup(prompt)

    def length(self, prompt: str) -> int:
        return len(self.lookup(prompt)) if self.count is None else self.count(prompt)

    def __call__(self, tokens: Tensor, places: Tensor) -> Tensor:
        return tokens
