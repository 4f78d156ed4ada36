"""A checkpoint is a folder with a manifest of hashes that appears whole or not at all.

Each process writes what it holds of weights, moving average and optimiser as safetensors, through torch's distributed
checkpoints; any number of processes reads them again. `manifest.json` names every file with its size and SHA-256,
because no tensor format notices a flipped bit by itself. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lct.data.atomic import sha256_of
from lct.train.config import TrainConfig

MANIFEST, CONFIG = "manifest.json", "config.json"
PREFIX, LATEST = "step-", "latest"
UNFINISHED = f".{PREFIX}"
LEAST_KEPT = 2
SPARE = 64 << 20  # bytes beside those of tensors

# torch remarks that there is one process where there is one
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")

Group = Mapping[str, Tensor]  # names to tensors, whole or sharded


class Saver:
    """Writes the checkpoints of a run, one at a time.

    root      the run's folder
    keep      newest complete checkpoints that stay; 0: all
    beside    write in a thread, from a copy; what goes wrong there is raised by the next `wait`
    cpu_mesh  the processes as sharded tensors know them, for their copies in CPU memory

    All processes of a run save together. A file reaches the disk before its folder gets its name, and the folder before
    older ones go.
    """

    def __init__(self, root: Path, keep: int = 0, beside: bool = False, cpu_mesh: DeviceMesh | None = None):
        self.root, self.keep, self.beside, self._mesh = root, keep, beside, cpu_mesh
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, groups: Mapping[str, Group], config: TrainConfig) -> Path:
        """Write `root/step-NNNNNNN` with a folder for each of `groups`; a complete one of that step is left as it is.

        OSError, and the older checkpoints stand, where the disk is full: it says how much is missing.
        """
        self.wait()
        folder = self.root / f"{PREFIX}{step:07d}"
        copied = {name: {key: self._on_cpu(x) for key, x in group.items()} for name, group in groups.items()}
        if not self.beside:
            self._write(folder, step, copied, config)
            return folder

        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            try:
                if gpu is not None:  # of a thread it is the first one, where all processes would meet
                    torch.cuda.set_device(gpu)
                self._write(folder, step, copied, config)
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()
        return folder

    def wait(self) -> None:
        """Until the checkpoint that is being written stands; raises what went wrong with it."""
        failure = self.end()
        if failure is not None:
            raise failure

    def end(self) -> BaseException | None:
        """The same, without raising: for who leaves anyway, and may not leave while others wait for what it writes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    @property
    def failed(self) -> bool:
        """Whether something went wrong beside the training, which `wait` will raise."""
        return self._failure is not None

    def _write(self, folder: Path, step: int, groups: Mapping[str, Group], config: TrainConfig) -> None:
        rank = dist.get_rank(self._group) if self._group is not None else 0
        need = sum(self._gathered(sum(_bytes(x) for group in groups.values() for x in group.values())))
        temporary = self._first(lambda: self._begin(folder, need), rank)
        if temporary is None:
            return
        try:
            files = self._together(lambda: self._write_own(temporary, groups, rank))
            self._first(lambda: self._finish(temporary, folder, step, files, config), rank)
        except Exception as error:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            raise _disk_full(self.root, step, need + SPARE) if full else error from None

    def _begin(self, folder: Path, need: int) -> Path | None:
        """A new folder to write into; None where the checkpoint stands already."""
        if (folder / MANIFEST).is_file():
            return None
        if folder.exists():
            set_aside(folder)
        self.root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.root).free < need + SPARE:
            raise _disk_full(self.root, int(folder.name.removeprefix(PREFIX)), need + SPARE)
        temporary = self.root / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        return temporary

    def _write_own(self, folder: Path, groups: Mapping[str, Group], rank: int) -> dict[str, dict]:
        """Size and hash of every file that this process wrote."""
        for name, group in groups.items():
            if (self._group is None) == dist.is_initialized():  # torch would take this process for the only one
                raise OSError("the processes parted while a checkpoint was written")
            writer = HuggingFaceStorageWriter(str(folder / name), save_distributed=True, thread_count=1)
            try:
                save(dict(group), storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            except CheckpointException as error:  # no Exception, and it tells the failures of all processes
                failed, (cause, _) = min(error.failures.items())
                raise OSError(f"process {failed}: {name}: {cause}") from error
        own = sorted(folder.glob(f"*/shard-{rank + 1:05d}-*"))
        for file in own:
            _sync(file)
        return {file.relative_to(folder).as_posix(): _told(file) for file in own}

    def _finish(self, temporary: Path, folder: Path, step: int, files: list[dict], config: TrainConfig) -> None:
        (temporary / CONFIG).write_text(json.dumps(asdict(config), indent=1))
        told = {name: entry for part in files for name, entry in part.items()} | {CONFIG: _told(temporary / CONFIG)}
        manifest = {"step": step, "torch": torch.__version__, "files": dict(sorted(told.items()))}
        (temporary / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.rename(folder)
        _sync(self.root)
        link = self.root / f".{LATEST}.{uuid.uuid4().hex[:8]}"
        link.symlink_to(folder.name)
        link.replace(self.root / LATEST)
        if self.keep:
            prune(self.root, self.keep)

    def _on_cpu(self, x: Tensor) -> Tensor:
        """The same tensor in CPU memory, sharded as it is; a copy where the training goes on beside."""
        if isinstance(x, DTensor):
            local = self._on_cpu(x.to_local())
            assert self._mesh is not None
            return DTensor.from_local(
                local, self._mesh, x.placements, shape=x.shape, stride=x.stride(), run_check=False
            )
        return x.detach().to("cpu", copy=self.beside).contiguous()

    # what all processes do together, in the order in which all do it

    def _gathered(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns on each process; where one fails, all raise."""
        try:
            value, failure = work(), None
        except Exception as error:
            value, failure = None, error
        results = self._gathered((value, None if failure is None else f"{failure}"))
        if failure is not None:
            raise failure
        for rank, (_, other) in enumerate(results):
            if other is not None:
                raise OSError(f"process {rank}: {other}")
        return [value for value, _ in results]

    def _first(self, work: Callable[[], Any], rank: int) -> Any:
        """What `work` returns on the first process, which alone does it."""
        return self._together(lambda: work() if rank == 0 else None)[0]


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint another name, so that its step can be saved again; it is not removed."""
    aside = folder.with_name(f"damaged-{folder.name}-{uuid.uuid4().hex[:8]}")
    folder.rename(aside)
    return aside


def prune(root: Path, keep: int) -> None:
    """Remove older checkpoints until `keep` complete ones stand, two at least; what is not complete counts as none.

    A folder is renamed before it is emptied, so that no half of it is taken for a checkpoint.
    """
    complete = [folder for folder in checkpoints(root) if (folder / MANIFEST).is_file()]
    for folder in complete[: -max(keep, LEAST_KEPT)]:
        gone = root / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what interrupted saves left behind."""
    for path in root.glob(f"{UNFINISHED}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for link in root.glob(f".{LATEST}.*"):
        link.unlink(missing_ok=True)


def verify(folder: Path, *groups: str) -> dict:
    """The manifest of a checkpoint whose files all match it, or those of some groups; ValueError names the first that
    does not."""
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        raise ValueError(f"{folder}: not a checkpoint, {MANIFEST} is missing; name a folder called {PREFIX}…")
    try:
        manifest = json.loads(manifest_file.read_text())
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = manifest["sha256"] == _digest(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest_file}: damaged ({error}); use another checkpoint") from None
    if not whole:
        raise ValueError(f"{manifest_file}: damaged, it does not match its own hash; use another checkpoint")
    for name, expected in manifest["files"].items():
        if groups and "/" in name and name.split("/")[0] not in groups:
            continue
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing from the checkpoint of step {manifest['step']}; use another checkpoint")
        try:
            same = file.stat().st_size == expected["bytes"] and sha256_of(file) == expected["sha256"]
        except OSError as error:
            raise ValueError(f"{file}: damaged, it cannot be read ({error}); use another checkpoint") from None
        if not same:
            raise ValueError(f"{file}: damaged, it does not match its hash in {MANIFEST}; use another checkpoint")
    for file in folder.glob("*/*"):  # a reader takes every file of a group
        if file.relative_to(folder).as_posix() not in manifest["files"]:
            raise ValueError(f"{file}: damaged checkpoint, {MANIFEST} does not name this file; use another checkpoint")
    return manifest


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders under `root`, oldest first."""
    return sorted(folder for folder in root.glob(f"{PREFIX}*") if folder.is_dir())


def latest(root: Path) -> Path:
    """The newest checkpoint under `root`, or `root` where it is one itself; FileNotFoundError where there is none."""
    if (root / MANIFEST).is_file():
        return root
    found = checkpoints(root)
    if not found:
        raise FileNotFoundError(f"{root}: no checkpoint there; train one with `lct train` or name another folder")
    return found[-1]


def newest_whole(root: Path, *groups: str) -> tuple[Path, dict]:
    """The newest checkpoint under `root` that matches its hashes, or those of some groups, and its manifest.

    Newer ones that are damaged are told in a warning. Where `root` is a checkpoint itself no other is taken for it.
    ValueError where none is whole.
    """
    if (root / MANIFEST).is_file():
        return root, verify(root, *groups)
    latest(root)
    failure = None
    for folder in reversed(checkpoints(root)):
        try:
            manifest = verify(folder, *groups)
        except ValueError as error:
            failure = failure or error
            continue
        if failure is not None:
            warnings.warn(f"{failure}; going on with {folder.name}", stacklevel=2)
        return folder, manifest
    assert failure is not None  # there is a checkpoint, and it was not whole
    raise failure


def load_config(folder: Path) -> TrainConfig:
    """The configuration of a verified checkpoint."""
    return TrainConfig.from_dict(json.loads((folder / CONFIG).read_text()))


def stored(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of the tensors of a group."""
    return {key: tuple(entry.size) for key, entry in _entries(folder, name).items()}


def _entries(folder: Path, name: str) -> dict[str, TensorStorageMetadata]:
    found = HuggingFaceStorageReader(str(folder / name)).read_metadata().state_dict_metadata
    return {key: entry for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(folder: Path, name: str, tensors: Group, alone: bool = False) -> None:
    """Fill tensors, whole or sharded over any number of processes, with those of a group of a verified checkpoint.

    alone  do not wait for the other processes
    """
    reader = HuggingFaceStorageReader(str(folder / name))
    try:
        load(dict(tensors), storage_reader=reader, no_dist=alone or not dist.is_initialized())
    except CheckpointException as error:
        raise ValueError(f"{folder / name}: could not be read ({min(error.failures.items())[1][0]})") from error


def read_whole(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a group of a verified checkpoint, whole, on the CPU."""
    single = folder / f"{name}.safetensors"  # as checkpoints were before they were sharded
    if single.is_file():
        return load_file(single)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in _entries(folder, name).items()
    }
    read_into(folder, name, tensors, alone=True)
    return tensors


def _bytes(x: Tensor) -> int:
    """What this process writes of a tensor: of one that several hold, the first of them writes it."""
    if not isinstance(x, DTensor):
        return x.nbytes if not dist.is_initialized() or dist.get_rank() == 0 else 0
    place = zip(x.placements, x.device_mesh.get_coordinate() or (), strict=False)
    return 0 if any(p.is_replicate() and at for p, at in place) else x.to_local().nbytes


class DiskFull(OSError):
    """There is no room for a checkpoint."""


def _disk_full(root: Path, step: int, need: int) -> DiskFull:
    free = shutil.disk_usage(root).free
    stands = [folder.name for folder in checkpoints(root)]
    told = f"{stands[-1]} stands" if stands else "there is none yet"
    mib = [f"{n / 2**20:,.0f} MiB" for n in (need, free, max(0, need - free))]
    return DiskFull(
        f"{root}: no space left for the checkpoint of step {step}: it takes {mib[0]}, {mib[1]} are free, "
        f"{mib[2]} are missing; {told}",
    )


def _told(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _digest(body: dict) -> str:
    """Hash of a manifest's content, which guards it as it guards the files."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
