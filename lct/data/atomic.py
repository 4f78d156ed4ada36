"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, so that the rename stays on one file system; the suffix is kept."""
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")


@contextmanager
def new_file(path: str | Path, replaces: bool = True) -> Iterator[Path]:
    """Give a temporary path that becomes `path` when the block ends well and is deleted when it does not.

    replaces  an older file; False raises FileExistsError instead, also where another process was first
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        if replaces:
            temporary.replace(path)
        else:
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(file: Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_vacant(path: str | Path) -> Path:
    """Return `path` where it is absent or an empty folder; ValueError otherwise: nothing is ever overwritten."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: expected a folder that does not exist or is empty; remove it or choose another name")
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well and is deleted when it does not.

    Raises ValueError when `path` exists and is not an empty folder.
    """
    path = check_vacant(path).resolve()  # behind a link
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
