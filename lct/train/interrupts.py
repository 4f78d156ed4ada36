"""Being told to stop: the signal is noted, and whatever runs comes to an orderly end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A run that was told to stop and saved; ends the program with the status that shells give to the signal."""

    def __init__(self, number: int, step: int, seconds: float):
        super().__init__(128 + number)
        self.number, self.step, self.seconds = number, step, seconds

    def __str__(self) -> str:
        told = signal.Signals(self.number).name
        return f"{told}: stopped at step {self.step} after {self.seconds:.1f} s; the same command goes on from there"


class _Abandoned(Exception):
    """What ends a sample in the middle."""


class Interrupts:
    """Notes SIGTERM and SIGINT, and when, while it is entered; a second SIGINT interrupts at once, as usual."""

    def __init__(self) -> None:
        self.number, self.at = 0, 0.0
        self._before: dict[int, object] = {}

    @property
    def wanted(self) -> bool:
        """Whether this process was told to stop."""
        return self.number != 0

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.at = number, time.monotonic()


@contextmanager
def abandoned_when(model: nn.Module, wanted: Callable[[], bool]):
    """Ends what happens within, without a word, before the next forward pass of a model for which `wanted`."""

    def ask(*_: object) -> None:
        if wanted():
            raise _Abandoned

    hook = model.register_forward_pre_hook(ask)
    try:
        yield
    except _Abandoned:
        pass
    finally:
        hook.remove()
