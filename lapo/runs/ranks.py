"""Several processes that train one model: `torchrun --nproc-per-node N stage1_idm_wm.py …`.

Dimensions: W processes ("ranks"), one per GPU.

Every rank reads its own share of the training chunks and computes 1/W of each batch. Gradients, metrics and
BatchNorm's running statistics are averaged over the ranks in every step, and the quantiser adds up its
statistics over them (see models.py), so that all of them hold the same numbers after it. Rank 0 alone writes
and prints. Every function here also serves the usual single process, at no cost.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lapo.errors import UserError


class Share(NamedTuple):
    """Which of the chunks a process reads: every `of`-th, from number `rank` on."""

    rank: int = 0
    of: int = 1


def share() -> Share:
    """This process's share."""
    return Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Share()


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return share().rank == 0


def by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched() -> int:
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if by_torchrun() else 1


def local_rank() -> int:
    """This process's number on its machine, which is also its GPU's."""
    return int(os.environ["LOCAL_RANK"]) if launched() > 1 else 0


def local_processes() -> int:
    """How many of the processes share this machine's memory."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() > 1 else 1


def expect_one_process(script: str) -> None:
    """Raise `UserError`, once for all, if torchrun has started several processes of a script made for one."""
    if launched() > 1:
        if os.environ["RANK"] != "0":
            sys.exit(2)
        raise UserError(f"{script} runs in one process, not {launched()}; start it without torchrun")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that torchrun has started, and part from them at the end.

    All but the first print nothing on stdout, and a `UserError` that several of them raise is reported once.
    """
    if launched() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    store, rank, of = next(dist.rendezvous("env://"))
    dist.init_process_group(store=store, rank=rank, world_size=of)  # NCCL between GPUs, Gloo between CPUs
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere if rank else sys.stdout),
        ):
            yield
    except UserError as error:
        if store.add(str(error), 1) > 1:
            sys.exit(2)
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError("another process of this run has ended; the same command continues") from None
    finally:
        dist.destroy_process_group()


def part_of_batch(batch_size: int) -> int:
    """How many of a batch's windows this process computes. Raises `UserError` if they cannot be shared."""
    part, rest = divmod(batch_size, share().of)
    if rest:
        raise UserError(
            f"a batch of {batch_size} windows cannot be shared by {share().of} processes;"
            " choose a batch size that is a multiple of their number"
        )
    return part


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace fp32 `tensors` on one device by their means over the ranks, in place, in one collective."""
    if share().of == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= share().of
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(
        list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    )


def greatest(*values: int) -> tuple[int, ...]:
    """The greatest of every value over the ranks; returns when all of them have asked."""
    if share().of == 1:
        return values
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def expect_same(value: int, what: str) -> None:
    """Raise `UserError` unless `value` is the same number for all ranks; `what` says what may be wrong."""
    high, low = greatest(value, -value)
    if high != -low:
        raise UserError(f"{what} ({-low} for one, {high} for another)")
