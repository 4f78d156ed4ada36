"""A table of a TOML file whose values are checked as they are taken out; a mistake is one line that says the fix."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

REQUIRED = object()


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_file_name(value: Any) -> bool:
    """A name without folders: files of strangers name nothing elsewhere."""
    return is_text(value) and value not in ("", ".", "..") and not {"/", "\\", "\0"} & set(value)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_integer(value: Any, least: int = 0) -> bool:
    """An integer from `least` to what 63 bits hold; TOML's true is none, nor is 1.0."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def is_positive(value: Any) -> bool:
    """A number above 0, and no larger than anything that is counted here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6


def is_integers(count: int, least: int) -> Callable[[Any], bool]:
    """A check for a list of `count` integers, none below `least`."""
    return lambda value: (
        isinstance(value, list | tuple) and len(value) == count and all(is_integer(item, least) for item in value)
    )


@dataclass(frozen=True)
class Table:
    """values of one table of `file`; `where` is its place in the file, such as "shot 2: "."""

    values: Mapping[str, Any]
    file: str
    where: str = ""

    def fail(self, key: str, expected: str, got: Any, fix: str) -> NoReturn:
        """Raise the ValueError that names file, key, what was expected, what was got, and the fix."""
        got = "nothing" if got is None else reprlib.repr(got)
        raise ValueError(f"{self.file}: {self.where}{key}: expected {expected}, got {got}; {fix}")

    def only(self, *keys: str) -> None:
        """ValueError where the table has any other key."""
        for key in self.values:
            if key not in keys:
                close = difflib.get_close_matches(key, keys, 1)
                fix = f"perhaps you meant {close[0]}" if close else "remove it"
                self.fail("key", "one of " + ", ".join(keys), key, fix)

    def take(self, key: str, check: Callable[[Any], bool], expected: str, fix: str, default: Any = REQUIRED) -> Any:
        """The value of `key`; ValueError where it fails the check, or is absent without a default."""
        if key not in self.values and default is not REQUIRED:
            return default
        value = self.values.get(key)
        if not check(value):
            self.fail(key, expected, value, fix)
        return value

    def table(self, key: str) -> Table | None:
        """The table under `key`, None where there is none."""
        values = self.take(key, lambda value: isinstance(value, Mapping), "a table", f"write [{key}]", None)
        return None if values is None else Table(values, self.file, f"{self.where}{key}: ")

    def tables(self, key: str) -> list[Table]:
        """The array of tables under `key`, empty where there is none."""

        def check(value: Any) -> bool:
            return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)

        rows = self.take(key, check, "an array of tables", f"write [[{key}]] before each", ())
        return [Table(row, self.file, f"{self.where}{key} {i + 1}: ") for i, row in enumerate(rows)]
