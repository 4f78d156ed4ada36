"""Text encoders: prompts in, packed features out."""

from __future__ import annotations

import re
import zlib
from typing import Protocol

from torch import Tensor, nn

from lct.model.layers import time_features

NULL = 0  # the one token of the null prompt
_WORDS = re.compile(r"\[[A-Z ]+\]|\w+")  # a mark such as [SHOT CUT] is one word
_WAVES = 16
_SALT = 14  # with it no two words of the toy scenes fall into one of 511 buckets


class TextEncoder(Protocol):
    """What the trainer and the samplers ask of a text encoder, small or large, learned or frozen."""

    def tokenize(self, prompt: str) -> list[int]:
        """Ids of a prompt, as many as its shot has text tokens; "" is the null prompt of guidance."""
        ...

    def __call__(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids, places [S_text] of packed prompts -> features [S_text, text_channels]."""
        ...


class WordEncoder(nn.Module):
    """Learned vectors of hashed words and of their places in the prompt. The null prompt "" is one token of its own."""

    def __init__(self, vocabulary: int, channels: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.words = nn.Embedding(vocabulary, channels)
        self.places = nn.Linear(_WAVES, channels, bias=False)

    def tokenize(self, prompt: str) -> list[int]:
        """Ids of the words of a prompt, upper and lower case alike; at least one."""
        words = [word.lower() for word in _WORDS.findall(prompt)]
        return [1 + zlib.crc32(word.encode(), _SALT) % (self.vocabulary - 1) for word in words] or [NULL]

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids [S_text], places [S_text] (index of each word in its prompt) -> [S_text, channels]."""
        waves = time_features(places.to(self.words.weight.dtype) / 1000, _WAVES)
        return self.words(ids) + self.places(waves)
