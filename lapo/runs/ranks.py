"""Several processes that train one model: `torchrun --nproc-per-node N stage1_idm_wm.py …`.

Dimensions: W processes ("ranks"), one per GPU.

Every rank reads its own shard of the training chunks and computes 1/W of each batch. Gradients, metrics and
BatchNorm's running statistics are averaged over the ranks in every step, and the quantiser adds up its
statistics over them (see models.py), so that all of them hold the same numbers after it. Rank 0 alone writes
and prints. Every function here also serves the usual single process, at no cost.
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
QUIET, MEETING, PARTING = 10.0, 600.0, 30.0
"""Seconds: until who waits for the other processes says so, until it gives up, and for taking leave."""
NOT_TORCHRUN = "if torchrun did not start this process, unset TORCHELASTIC_RUN_ID"


class Shard(NamedTuple):
    """Which of the chunks a process reads: every `world_size`-th, from number `rank` on."""

    rank: int = 0
    world_size: int = 1


def shard() -> Shard:
    """This process's shard."""
    return Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Shard()


def is_main() -> bool:
    """Whether this is rank 0, the process that writes."""
    return shard().rank == 0


def by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched() -> int:
    """How many processes torchrun has started, 1 without it. Raises `UserError` if it does not say."""
    return _variable("WORLD_SIZE") if by_torchrun() else 1


def local_rank() -> int:
    """This process's number on its machine, which is also its GPU's."""
    return _variable("LOCAL_RANK") if launched() > 1 else 0


def local_processes() -> int:
    """How many of the processes share this machine's memory."""
    return _variable("LOCAL_WORLD_SIZE") if launched() > 1 else 1


def _variable(name: str) -> int:
    """A number that torchrun leaves in the environment."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        found = f"is {value!r}" if value else "is missing"
        raise UserError(f"TORCHELASTIC_RUN_ID is set, as torchrun does, but {name} {found}; {NOT_TORCHRUN}")
    return int(value)


def expect_one_process(script: str) -> None:
    """Raise `UserError`, once for all, if torchrun has started several processes of a script made for one."""
    if launched() > 1:
        if os.environ["RANK"] != "0":
            sys.exit(2)
        raise UserError(f"{script} runs in one process, not {launched()}; start it without torchrun")


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Meet the other processes that torchrun has started, and part from them at the end.

    All but the first print nothing on stdout, and a `UserError` that several of them raise is reported once.
    Raises `UserError` if the others do not come, and if one of them ends before its time.
    """
    if launched() == 1:
        yield
        return
    _take_gpu()
    store = _meet()
    rank = dist.get_rank()
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere if rank else sys.stdout),
        ):
            yield
    except SystemExit:  # all of them stop together, see `Run.loop`
        _part()
        raise
    except UserError as error:
        with contextlib.suppress(dist.DistError):  # who keeps the store may be gone
            if store.add(str(error), 1) > 1:
                sys.exit(2)
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError("another process of this run has ended; the same command continues") from None
    else:
        _part()


def _part() -> None:
    """Leave the others, who leave too: after an error of this process alone NCCL would wait for them."""
    with contextlib.suppress(RuntimeError, TimeoutError):
        _aside(dist.destroy_process_group).result(PARTING)


def _take_gpu() -> None:
    """Make this process's GPU the current one of this thread."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())


def _meet() -> dist.Store:
    """Wait for the other processes; returns what they share. Raises `UserError` if they do not come."""

    def meet() -> dist.Store:
        store, rank, of = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING)))
        # Numbers on the CPU are reduced too, see `all_max`: by default NCCL would be the only backend.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=of)
        return store

    rank, of = _variable("RANK"), launched()
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    others = f"at {place} for the others of {of} processes"
    coming = _aside(meet)
    try:
        with contextlib.suppress(TimeoutError):
            return coming.result(QUIET)
        print(f"process {rank} waits {others}; {NOT_TORCHRUN}", file=sys.stderr, flush=True)
        return coming.result(MEETING - QUIET)
    except TimeoutError:
        what = f"has waited {MEETING / 60:.0f} minutes {others}"
    except (RuntimeError, ValueError) as error:
        what = f"could not wait {others} ({str(error).strip().splitlines()[0]})"
    raise UserError(f"process {rank} {what}; see why they do not come or, {NOT_TORCHRUN}")


def _aside(function: Callable[[], T]) -> Future[T]:
    """Call `function` in a thread of its own, for which nobody waits at the end.

    What waits in C++ hears neither SIGTERM nor Ctrl-C; who waits for the thread does.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            _take_gpu()
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def per_rank_batch(batch_size: int) -> int:
    """Windows of a batch that this process computes. Raises `UserError` if they cannot be shared."""
    part, rest = divmod(batch_size, shard().world_size)
    if rest:
        raise UserError(
            f"a batch of {batch_size} windows cannot be shared by {shard().world_size} processes;"
            " choose a batch size that is a multiple of their number"
        )
    return part


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace fp32 `tensors` on one device by their means over the ranks, in place, in one collective."""
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
    """The maximum of each value over the ranks; a barrier for all of them."""
    if shard().world_size == 1:
        return values
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def expect_same(value: int, what: str) -> None:
    """Raise `UserError` unless `value` is the same number for all ranks; `what` says what may be wrong."""
    high, low = all_max(value, -value)
    if high != -low:
        raise UserError(f"{what} ({-low} for one, {high} for another)")
