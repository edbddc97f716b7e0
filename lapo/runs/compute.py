"""Device, precision and compilation; seeds and random states."""

import contextlib
import ctypes
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lapo.config import Config
from lapo.errors import UserError
from lapo.runs.ranks import launched, local_processes, local_rank, share


@dataclass(frozen=True)
class Compute:
    """Where and how tensors are computed."""

    device: torch.device
    bf16: bool
    """Convolutions and matrix products in bfloat16; quantiser, losses and optimiser stay in fp32."""
    compile: bool
    """Compile training steps."""

    @classmethod
    def from_config(cls, cfg: Config) -> "Compute":
        """Choose device, precision and compilation. Raises `UserError` for a device that is not there.

        On a CPU, the process keeps its memory from now on, see `keep_freed_memory`.
        Of several processes on a machine, each takes the GPU of its own number.
        """
        name = cfg.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if launched() > 1 and name.startswith("cuda"):
            if name != "cuda":
                raise UserError(f"device {name} cannot serve {launched()} processes; use cuda, one each")
            name = f"cuda:{local_rank()}"
        there = torch.cuda.device_count()
        # Compared as words: PyTorch knows no number above 127, and would raise an error of its own.
        if name.startswith("cuda") and (name.partition(":")[2] or "0") not in map(str, range(there)):
            raise UserError(f"device {name} is not there: {there} CUDA devices; use cpu")
        device = torch.device(name)
        if device.type == "cpu":
            keep_freed_memory()
        bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and _has_bf16(device))
        return cls(device, bf16, cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda"))

    def autocast(self) -> AbstractContextManager:
        """The context in which networks run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, its convolutions in channels-last format; returns the module."""
        return module.to(self.device, memory_format=torch.channels_last)

    def compiled(self, function: Callable) -> Callable:
        """A training step, compiled if asked for."""
        return torch.compile(function) if self.compile else function

    def __str__(self) -> str:
        gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if gpu else f"{torch.get_num_threads()} threads"
        precision = "bf16" if self.bf16 else "fp32"
        processes = f", {share().of} processes" if share().of > 1 else ""
        return f"{self.device} ({name}), {precision}{', compiled' if self.compile else ''}{processes}"


def _has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 natively, not by way of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""


def keep_freed_memory(keep: bool = True) -> None:
    """Let large tensors on the CPU reuse the memory of freed ones; `keep=False` gives it back and ends that.

    Usually glibc hands blocks of more than 32 MB back to the system as soon as they are freed. Every large
    activation then lies on fresh pages, and to have them made takes longer than most operations on them.
    Kept are up to 2 GB; blocks the size of a published chunk of frames (400 MB) still go back. Other C
    libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError):  # no such function
        libc = ctypes.CDLL(None)
        # Older versions refuse more than 32 MB, to which the size grows by itself as long as it is not set.
        if not keep or not libc.mallopt(M_MMAP_THRESHOLD, 300 << 20):
            libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 64 << 20)
        if not keep:
            libc.malloc_trim(0)


def seed_everything(seed: int) -> None:
    """Seed every random generator of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries may draw from the global generator
    torch.manual_seed(seed)


def rng_state() -> dict:
    """States of PyTorch's global generators, as tensors: all that our training draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict) -> None:
    """Continue from what `rng_state` gave. The number of GPUs may have changed: those in common are set."""
    torch.set_rng_state(state["cpu"])
    for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, device)


def to_floats(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    """Scalar tensors as numbers, fetched from the device in one go."""
    tensors = {key: value for key, value in metrics.items() if isinstance(value, Tensor)}
    if not tensors:
        return dict(metrics)
    values = torch.stack([value.detach().float().reshape(()) for value in tensors.values()]).tolist()
    return {**metrics, **dict(zip(tensors, values, strict=True))}


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may take on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return free and free // local_processes()
