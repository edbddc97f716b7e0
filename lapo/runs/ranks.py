"""Data-parallel training of one model: `torchrun --nproc-per-node N stage1_idm_wm.py …`.

Dimensions: W processes ("ranks"), one per GPU.

Each rank reads its own shard of the training chunks and computes 1/W of each batch. In every step, gradients,
metrics and BatchNorm's running statistics are averaged over ranks, and the quantiser's EMA statistics are
all-reduced (see models.py). So all ranks hold the same weights and codebook. Only rank 0 writes and prints.
In a single process these functions do nothing.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lapo.errors import UserError

T = TypeVar("T")
NOTICE_AFTER, JOIN_TIMEOUT, LEAVE_TIMEOUT = 10.0, 600.0, 30.0
"""Seconds until a waiting process prints a notice, until it gives up, and for `_destroy_process_group`."""
NOT_TORCHRUN = "if torchrun did not start this process, unset TORCHELASTIC_RUN_ID"


class Shard(NamedTuple):
    """The chunks that a process reads: every `world_size`-th one, beginning with number `rank`."""

    rank: int = 0
    world_size: int = 1


def shard() -> Shard:
    """This process's shard."""
    return Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Shard()


def is_main() -> bool:
    """Whether this process is rank 0, which writes and prints."""
    return shard().rank == 0


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def num_processes() -> int:
    """Number of processes, 1 without torchrun. Raises `UserError` if torchrun's variables are incomplete."""
    return _variable("WORLD_SIZE") if under_torchrun() else 1


def local_rank() -> int:
    """Rank of this process on its machine: the index of its GPU."""
    return _variable("LOCAL_RANK") if num_processes() > 1 else 0


def num_local_processes() -> int:
    """Number of processes on this machine, which share its memory."""
    return _variable("LOCAL_WORLD_SIZE") if num_processes() > 1 else 1


def _variable(name: str) -> int:
    """An integer environment variable of torchrun. Raises `UserError` if it is missing or no number."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        found = f"is {value!r}" if value else "is missing"
        raise UserError(f"TORCHELASTIC_RUN_ID is set, as torchrun does, but {name} {found}; {NOT_TORCHRUN}")
    return int(value)


def require_single_process(script: str) -> None:
    """Raise `UserError` (on rank 0; the others exit) if torchrun started several processes of `script`."""
    if num_processes() > 1:
        if os.environ["RANK"] != "0":
            sys.exit(2)
        raise UserError(f"{script} runs in one process, not {num_processes()}; start it without torchrun")


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Initialise the process group of torchrun's processes, and destroy it at the end.

    Only rank 0 prints on stdout. A `UserError` that several ranks raise is printed once. Raises `UserError`
    if the other processes do not join, or if one of them ends early.
    """
    if num_processes() == 1:
        yield
        return
    _set_gpu()
    store = _init_process_group()
    rank = dist.get_rank()
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as devnull,
            contextlib.redirect_stdout(devnull if rank else sys.stdout),
        ):
            yield
    except SystemExit:  # all ranks exit at the same step, see `Run.loop`
        _destroy_process_group()
        raise
    except UserError as error:
        with contextlib.suppress(dist.DistError):  # the process that hosts the store may have ended
            if store.add(str(error), 1) > 1:
                sys.exit(2)
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError("another process of this run has ended; the same command continues") from None
    else:
        _destroy_process_group()


def _destroy_process_group() -> None:
    """Destroy the process group. All ranks must call this; NCCL would hang if only some did."""
    with contextlib.suppress(RuntimeError, TimeoutError):
        _in_thread(dist.destroy_process_group).result(LEAVE_TIMEOUT)


def _set_gpu() -> None:
    """Make this process's GPU the current device of this thread."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())


def _init_process_group() -> dist.Store:
    """Initialise the process group; returns its store. Raises `UserError` if other processes do not join."""

    def join() -> dist.Store:
        store, rank, of = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT)))
        # `all_max` reduces CPU tensors. The default with GPUs would be NCCL alone, which reduces none.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=of)
        return store

    rank, of = _variable("RANK"), num_processes()
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    others = f"at {address} for the others of {of} processes"
    joining = _in_thread(join)
    try:
        with contextlib.suppress(TimeoutError):
            return joining.result(NOTICE_AFTER)
        print(f"process {rank} waits {others}; {NOT_TORCHRUN}", file=sys.stderr, flush=True)
        return joining.result(JOIN_TIMEOUT - NOTICE_AFTER)
    except TimeoutError:
        what = f"has waited {JOIN_TIMEOUT / 60:.0f} minutes {others}"
    except (RuntimeError, ValueError) as error:
        what = f"could not wait {others} ({str(error).strip().splitlines()[0]})"
    raise UserError(f"process {rank} {what}; check why they did not start or, {NOT_TORCHRUN}")


def _in_thread(function: Callable[[], T]) -> Future[T]:
    """Call `function` in a daemon thread.

    SIGTERM and Ctrl-C cannot interrupt a call that blocks in C++, but they interrupt waiting for a thread.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            _set_gpu()
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def per_rank_batch(batch_size: int) -> int:
    """Batch size of each rank. Raises `UserError` if the whole batch cannot be divided evenly."""
    size, rest = divmod(batch_size, shard().world_size)
    if rest:
        raise UserError(
            f"a batch of {batch_size} windows cannot be divided among {shard().world_size} processes;"
            " choose a batch size that is a multiple of their number"
        )
    return size


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Average fp32 `tensors` on one device over ranks, in place, by one all-reduce."""
    if shard().world_size == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= shard().world_size
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(
        list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    )


def all_max(*values: int) -> tuple[int, ...]:
    """Maximum of each value over ranks. Also a barrier."""
    if shard().world_size == 1:
        return values
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def check_equal(value: int, what: str) -> None:
    """Raise `UserError`, a message that begins with `what`, unless `value` is the same on all ranks."""
    high, low = all_max(value, -value)
    if high != -low:
        raise UserError(f"{what} ({-low} for one, {high} for another)")
