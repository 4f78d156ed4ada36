"""The processes of a run: who they are, what they agree on, and how the model is spread over them (FSDP2, HSDP)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lct.layout import Geometry
from lct.model.config import ModelConfig
from lct.model.mmdit import MMDiT
from lct.model.shared import share_rows
from lct.train.execution import Execution
from lct.train.weights import available

PATIENCE = timedelta(minutes=30)  # with which processes wait for one another while they work
FAREWELL = 20.0  # seconds, and when one has come to its end


def check_heads(config: ModelConfig, context: int) -> None:
    """ValueError where so many processes cannot share a scene's rows: each has its part of the heads by turns."""
    if config.heads % context or config.kv_heads % context:
        raise ValueError(
            f"context: expected a divisor of {config.heads} heads and {config.kv_heads} key heads, got {context}"
        )


class Processes:
    """This process among those of a run. Started without torchrun it is the only one.

    rank, count   of this process, and of all
    data, datas   which batch of a step it has a part of, and how many there are
    context       which part of the rows of that batch

    ValueError where the processes do not divide as `execution` asks.
    """

    def __init__(self, execution: Execution, device: str = "cpu"):
        self.execution = execution
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        alone = not dist.is_initialized()
        self.rank, self.count = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        if device == "cuda" and not alone:
            device = f"cuda:{dist.distributed_c10d.get_node_local_rank()}"
            torch.cuda.set_device(device)
        self.device = available(device)
        e = execution
        if self.count % (e.replicate * e.context):
            raise ValueError(
                f"replicate, context: expected a product that divides {self.count} processes, "
                f"got {e.replicate} · {e.context}"
            )
        self.datas, (self.data, self.context) = self.count // e.context, divmod(self.rank, e.context)
        self.group = self.mesh = self.cpu_mesh = None
        self._farewell: Any = None
        if not alone:
            self._farewell = dist.new_group(backend="gloo")
            self.mesh, self.cpu_mesh = (self._mesh(kind) for kind in (self.device.type, "cpu"))
            by_batch = init_device_mesh(self.device.type, (self.datas, e.context), mesh_dim_names=("data", "context"))
            self.group = by_batch["context"].get_group().group_name

    def _mesh(self, kind: str):
        e = self.execution
        if e.replicate > 1:
            shape, names = (e.replicate, self.count // e.replicate), ("replicate", "shard")
            return init_device_mesh(kind, shape, mesh_dim_names=names)
        return init_device_mesh(kind, (self.count,), mesh_dim_names=("shard",))

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in fp64 on the CPU."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process raised it."""
        return [value > 0 for value in self.sum([float(flag) for flag in flags])]

    def told(self, value: Any = None) -> Any:
        """The first process's value, on all."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, on all."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def once(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first process, which alone does it; what it raises is raised on all."""
        outcome: Any = None
        mine: Exception | None = None
        if self.first:
            try:
                outcome = (work(), None)
            except Exception as error:
                mine = error
                # others may not be made again from their words
                plain = isinstance(error, (ValueError, OSError))
                outcome = (None, error if plain else RuntimeError(f"the first process: {error!r}"))
        result, failure = self.told(outcome)
        if failure is not None:
            raise mine or failure
        return result

    def leave(self) -> None:
        """Part from the others in order, if all come to it: a process that just ends may abort those that still wait.
        Where one does not come, as when an error is this process's alone, others may wait for what it no longer
        computes, and to leave would be to wait for them: the program has to end, see `lct.cli.main`."""
        if self._farewell is not None and dist.is_initialized():
            here = cast(dist.Work, dist.barrier(self._farewell, async_op=True))
            end = time.monotonic() + FAREWELL
            while not here.is_completed() and time.monotonic() < end:
                time.sleep(0.01)
            with suppress(RuntimeError):  # of one that is gone
                if here.is_completed() and here.wait():
                    dist.destroy_process_group()

    def together(self, geometry: Geometry) -> Geometry:
        """The rows of a pass that this process computes."""
        if self.execution.context == 1:
            return geometry
        return share_rows(geometry, self.context, self.execution.context, cast(str, self.group))

    def spread(self, model: MMDiT, dtype: torch.dtype) -> None:
        """Recompute, compile and shard a model as the execution says, in this order; changed in place.

        dtype  of the streams: on GPUs gathered weights have it, and gradients are summed in fp32
        """
        e = self.execution
        check_heads(model.config, e.context)
        for block in model.blocks:
            recomputed(block, e.recompute)
        if e.compile:
            # one for the first sizes, one for all others, and one for each kind of size that happens to be 1
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            for block in model.blocks:
                block.compile(fullgraph=True)
        if self.mesh is None:
            return
        half = dtype if self.device.type == "cuda" and dtype.itemsize == 2 else None
        # compiled blocks return views, on which nothing works in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", module="torch.distributed.fsdp")
        policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
        shard = partial(fully_shard, mesh=self.mesh, mp_policy=policy)
        if isinstance(model.text_encoder, nn.Module):
            shard(model.text_encoder)
        for block in model.blocks:
            shard(block, reshard_after_forward=e.gather_again)
        shard([model.last_modulation, model.video_out], reshard_after_forward=False)
        shard(model, reshard_after_forward=e.gather_again)

    def fill(self, model: MMDiT, weights: dict[str, Tensor]) -> None:
        """Give a model without values, once it is spread, those that the first process has, a weight at a time, and let
        go of them; where it has none, memory alone. A model with values is left as it is."""
        if not any(weight.is_meta for weight in model.parameters()):
            return
        model.to_empty(device=self.device)
        if self.told(bool(weights)):
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, cast(dict[str, Any], weights), options=options)
            weights.clear()

    def begin_pass(self, model: nn.Module, last: bool) -> None:
        """Before each pass of a step: whether gradients are summed, and weights given back, behind it."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or self.execution.gather_again)
            model.set_reshard_after_backward(last or self.execution.gather_again)

    def give_back(self, model: nn.Module) -> None:
        """Let go of gathered weights, which a pass without a backward leaves behind: they may no longer be right."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def is_lost(error: RuntimeError) -> bool:
    """Whether an error is what is left of a process that ended."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in words for word in ("gloo", "nccl", "connection closed"))


def own(x: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def recomputed(block: nn.Module, mode: str) -> None:
    """Let a block be computed again in the backward pass: "none" of it, "all", or all but "attention"."""
    if mode == "none":
        return

    def kept(context, operation, *args, **kwargs):
        attention = operation == torch.ops.lct.attention_forward.default
        return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, kept)} if mode == "attention" else {}
    )

    def forward(self: nn.Module, *arguments):  # as a method, which torch.compile can see through
        return checkpoint(type(self).forward, self, *arguments, use_reentrant=False, **contexts)

    block.forward = MethodType(forward, block)
