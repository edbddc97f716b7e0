"""Device, precision and compilation; seeds and random states."""

import contextlib
import ctypes
import os
import random
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lapo.config import Config
from lapo.errors import UserError, say
from lapo.runs.graphs import Replayed
from lapo.runs.ranks import launched, local_processes, local_rank, shard


@dataclass(frozen=True)
class Compute:
    """Where and how tensors are computed."""

    device: torch.device
    bf16: bool
    """Convolutions and matrix products in bfloat16; quantiser, losses and optimiser stay in fp32."""
    compile: bool
    """Compile training steps."""
    graphs: bool = False
    """Launch training steps and steps of rollouts as CUDA graphs."""

    def __post_init__(self) -> None:
        # fp32 means fp32: PyTorch would round the inputs of convolutions to TF32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    @classmethod
    def from_config(cls, cfg: Config) -> "Compute":
        """Choose device, precision and compilation.

        On a CPU, the process keeps its memory from now on, see `keep_freed_memory`. Of several processes on a
        machine, each takes the GPU of its own number. Where there is nothing to compile with, a line on
        stderr says so. Raises `UserError` for a device that is not there, and for a GPU that cannot be used
        though nobody chose to do without it.
        """
        name = cfg.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
            if name == "cpu" and _has_unusable_gpu():
                raise UserError(
                    f"this machine has an NVIDIA GPU, but PyTorch (built for CUDA {torch.version.cuda})"
                    " cannot use it, often because the driver is too old; update it, or choose --device cpu"
                )
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
        else:
            torch.cuda.set_device(device)  # whose streams CUDA graphs take
        bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and _has_bf16(device))
        gpu = device.type == "cuda"
        if cfg.compile == "graphs" and not gpu:
            raise UserError(
                f"compile is graphs, which needs a CUDA device, not {device}; choose auto, on or off"
            )
        wanted = cfg.compile in ("on", "graphs") or (cfg.compile == "auto" and gpu)
        lacking = _compiling_lacks(device) if wanted else None
        if lacking:
            say(f"training steps are not compiled, and slower for it: {lacking} is missing")
        # Between processes, collectives come in between the kernels of a step.
        graphs = gpu and cfg.compile in ("auto", "graphs") and launched() == 1
        return cls(device, bf16, wanted and not lacking, graphs)

    def autocast(self) -> AbstractContextManager:
        """The context in which networks run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, its convolutions in channels-last format; returns the module."""
        return module.to(self.device, memory_format=torch.channels_last)

    def compiled(self, function: Callable) -> Callable:
        """A training step, compiled if asked for."""
        return torch.compile(function) if self.compile else function

    def replayed(self, function: Callable) -> Callable:
        """A function of tensors, replayed as a CUDA graph if asked for, see `graphs.Replayed`."""
        return Replayed(function) if self.graphs else function

    def __str__(self) -> str:
        gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if gpu else f"{torch.get_num_threads()} threads"
        precision = "bf16" if self.bf16 else "fp32"
        graphs = ", CUDA graphs" if self.graphs else ""
        processes = f", {shard().world_size} processes" if shard().world_size > 1 else ""
        return f"{self.device} ({name}), {precision}{', compiled' if self.compile else ''}{graphs}{processes}"


def _has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 natively, not by way of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _has_unusable_gpu() -> bool:
    """Whether PyTorch was built for CUDA and there is a GPU, though none that it can use or was told to."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return torch.version.cuda is not None and not hidden and Path("/dev/nvidia0").exists()


def _compiling_lacks(device: torch.device) -> str | None:
    """What `torch.compile` needs for `device` and does not find; None if all is there."""
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if not (os.environ.get(variable) or any(map(shutil.which, names))):
        return f"a compiler ({' or '.join(names)})"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"{header} (of Python's development files)"


class HostLink:
    """Arrays of one shape and type on their way to a device and back, through memory made once.

    For CUDA that is pinned memory, from which and to which copies do not wait for each other. On a CPU arrays
    and tensors share their memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.host: Tensor | None = None
        self.there: Tensor | None = None

    def up(self, array: np.ndarray) -> Tensor:
        """The array on the device: valid until the next call, before which the copy must have been made."""
        x = torch.from_numpy(array)
        if self.device.type != "cuda":
            return x.to(self.device)
        if self.there is None:
            self.host, self.there = (
                torch.empty_like(x, pin_memory=True),
                torch.empty_like(x, device=self.device),
            )
        self.host.copy_(x)
        return self.there.copy_(self.host, non_blocking=True)

    def down(self, x: Tensor) -> np.ndarray:
        """The tensor on the host, valid until the next call; waits until it has been computed."""
        if self.device.type != "cuda":
            return x.cpu().numpy()
        if self.host is None:
            self.host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.host.copy_(x, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return self.host.numpy()


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


def rng_state(device: torch.device) -> dict:
    """States of PyTorch's global generators, as tensors: the CPU's and, if `device` is a GPU, its own."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict, device: torch.device) -> None:
    """Continue on `device` from what `rng_state` gave, on a GPU of whatever number."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"]:
        # Older checkpoints hold a state for every GPU of the machine.
        number = min(device.index or 0, len(state["cuda"]) - 1)
        torch.cuda.set_rng_state(state["cuda"][number], device)


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
