"""Latents that stay on disk until they are asked for, so that a process can draw a scene that another one reads."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open


class Damaged(ValueError):
    """A file of latents that is missing, cut off or changed; the message names it."""


@dataclass(frozen=True)
class Stored:
    """Latents in a safetensors file; `np.asarray` reads them. Slices along the first axis are read as late.

    shape       of what is read
    first, crc  the first row of the stored tensor that is read, and the CRC-32 of the whole tensor where it is known

    Reading raises `Damaged` where the file is, or holds NaN or infinity.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    first: int = 0
    crc: int | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Stored:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows: expected a slice without steps, got {rows}")
        return replace(self, shape=(max(0, stop - start), *self.shape[1:]), first=self.first + start)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self.read().astype(dtype or np.float32, copy=False)

    def read(self) -> np.ndarray:
        if not len(self):
            return np.zeros(self.shape, np.float32)
        try:
            with safe_open(self.file, framework="np") as file:
                if self.crc is None:
                    values = file.get_slice(self.name)[self.first : self.first + len(self)]
                else:
                    values = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{self.file}: {self.name}: missing or damaged ({error}); write it again") from None
        if self.crc is not None:
            if zlib.crc32(values.tobytes()) != self.crc:
                raise Damaged(f"{self.file}: {self.name}: damaged, it does not match its CRC-32; write it again")
            values = values[self.first : self.first + len(self)]
        if values.shape != self.shape:
            raise Damaged(f"{self.file}: {self.name}: expected {self.shape}, got {values.shape}; write it again")
        if not np.isfinite(values).all():
            raise Damaged(f"{self.file}: {self.name}: holds NaN or infinity; encode it again")
        return values
