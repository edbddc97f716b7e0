"""Device, precision and compilation; seeds and random states."""

import contextlib
import ctypes
import os
import random
import shutil
import sysconfig
import warnings
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
from lapo.runs.ranks import local_rank, num_local_processes, num_processes, shard

# What is not bf16 is meant to be exact: TF32 stays off, although compiled steps recommend it.
TF32_WARNING = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled"
warnings.filterwarnings("ignore", TF32_WARNING, UserWarning)


@dataclass(frozen=True)
class Compute:
    """Device, precision and compilation of a run."""

    device: torch.device
    bf16: bool
    """Autocast to bfloat16; quantiser, policy heads, losses and optimiser stay in fp32."""
    compile: bool
    """Compile training steps."""
    graphs: bool = False
    """Launch training steps and env steps as CUDA graphs."""

    def __post_init__(self) -> None:
        # fp32 means fp32: by default PyTorch computes convolutions in TF32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    @classmethod
    def from_config(cls, cfg: Config) -> "Compute":
        """Resolve device, precision and compilation.

        Each process of a machine takes the GPU of its local rank. If a compiler is missing, steps are not
        compiled and a line on stderr says so. On a CPU, the process keeps freed memory from now on, see
        `keep_freed_memory`. Raises `UserError` for a missing device, and if `auto` finds a GPU that PyTorch
        cannot use.
        """
        name = cfg.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
            if name == "cpu" and _has_unusable_gpu():
                raise UserError(
                    f"this machine has an NVIDIA GPU, but PyTorch (built for CUDA {torch.version.cuda})"
                    " cannot use it, often because the driver is too old; update it, or choose --device cpu"
                )
        if num_processes() > 1 and name.startswith("cuda"):
            if name != "cuda":
                raise UserError(
                    f"device {name} cannot serve {num_processes()} processes; use cuda, one GPU each"
                )
            name = f"cuda:{local_rank()}"
        num_gpus = torch.cuda.device_count()
        # Compared as strings: torch.device raises an error of its own for numbers above 127.
        if name.startswith("cuda") and (name.partition(":")[2] or "0") not in map(str, range(num_gpus)):
            raise UserError(f"device {name} does not exist: {num_gpus} CUDA devices; use cpu")
        device = torch.device(name)
        if device.type == "cpu":
            keep_freed_memory()
        else:
            # CUDA graphs use the current device's streams. A device without an index would be refused.
            torch.cuda.set_device(device.index or 0)
        bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and _has_bf16(device))
        gpu = device.type == "cuda"
        if cfg.compile == "graphs" and not gpu:
            raise UserError(
                f"compile is graphs, which needs a CUDA device, not {device}; choose auto, on or off"
            )
        if cfg.compile == "graphs" and num_processes() > 1:
            raise UserError(
                f"compile is graphs, but the steps of {num_processes()} processes contain collectives, which"
                " are not captured; choose auto or on"
            )
        wanted = cfg.compile in ("on", "graphs") or (cfg.compile == "auto" and gpu)
        missing = _missing_for_compile(device) if wanted else None
        if missing:
            say(f"training steps are not compiled, and therefore slower: {missing} is missing")
        graphs = gpu and cfg.compile in ("auto", "graphs") and num_processes() == 1
        return cls(device, bf16, wanted and not missing, graphs)

    def autocast(self) -> AbstractContextManager:
        """Autocast context for forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, in channels-last format; returns the module."""
        return module.to(self.device, memory_format=torch.channels_last)

    def compiled(self, function: Callable) -> Callable:
        """`function`, compiled if so configured."""
        return torch.compile(function) if self.compile else function

    def replayed(self, function: Callable) -> Callable:
        """A function of tensors, replayed as a CUDA graph if so configured, see `graphs.Replayed`."""
        return Replayed(function) if self.graphs else function

    def __str__(self) -> str:
        gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if gpu else f"{torch.get_num_threads()} threads"
        precision = "bf16" if self.bf16 else "fp32"
        graphs = ", CUDA graphs" if self.graphs else ""
        processes = f", {shard().world_size} processes" if shard().world_size > 1 else ""
        return f"{self.device} ({name}), {precision}{', compiled' if self.compile else ''}{graphs}{processes}"


def _has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 natively, without emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _has_unusable_gpu() -> bool:
    """Whether PyTorch was built for CUDA but cannot use the GPU, although CUDA_VISIBLE_DEVICES allows it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return torch.version.cuda is not None and not hidden and Path("/dev/nvidia0").exists()


def _missing_for_compile(device: torch.device) -> str | None:
    """What `torch.compile` needs for `device` and is missing; None if nothing is."""
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if not (os.environ.get(variable) or any(map(shutil.which, names))):
        return f"a compiler ({' or '.join(names)})"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"{header} (of Python's development files)"


class TransferBuffer:
    """Copies arrays of one shape and dtype to a device or back, through buffers that are allocated once.

    For CUDA the host buffer is pinned, so copies are asynchronous. On a CPU, arrays and tensors share memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_host: Tensor | None = None
        self.on_device: Tensor | None = None

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copy an array to the device. The tensor is valid until the next call.

        The device must have finished the copy before the next call.
        """
        x = torch.from_numpy(array)
        if self.device.type != "cuda":
            return x.to(self.device)
        if self.on_device is None:
            self.on_host, self.on_device = (
                torch.empty_like(x, pin_memory=True),
                torch.empty_like(x, device=self.device),
            )
        self.on_host.copy_(x)
        return self.on_device.copy_(self.on_host, non_blocking=True)

    def to_host(self, x: Tensor) -> np.ndarray:
        """Copy a tensor to the host and synchronise. The array is valid until the next call."""
        if self.device.type != "cuda":
            return x.cpu().numpy()
        if self.on_host is None:
            self.on_host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.on_host.copy_(x, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return self.on_host.numpy()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Constants of malloc.h."""


def keep_freed_memory(keep: bool = True) -> None:
    """Let large CPU tensors reuse the memory of freed ones; `keep=False` returns it and restores the default.

    By default glibc returns freed blocks above 32 MB to the system at once. Every large activation then lies
    on new pages, and page faults take longer than most operations on it. Up to 2 GB are kept. Blocks as large
    as a published chunk of frames (400 MB) are still returned. Other C libraries are not affected.
    """
    with contextlib.suppress(AttributeError, OSError):  # no such function
        libc = ctypes.CDLL(None)
        # Older versions refuse more than 32 MB, the maximum of their dynamic threshold.
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
    """States of PyTorch's global generators as tensors: the CPU's and, for a GPU, that of `device`."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict, device: torch.device) -> None:
    """Restore a `rng_state`, also one that another GPU returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"]:
        # Older checkpoints hold the states of all GPUs of the machine.
        number = min(device.index or 0, len(state["cuda"]) - 1)
        torch.cuda.set_rng_state(state["cuda"][number], device)


def to_floats(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    """Convert scalar tensors to numbers, in one transfer from the device."""
    tensors = {key: value for key, value in metrics.items() if isinstance(value, Tensor)}
    if not tensors:
        return dict(metrics)
    values = torch.stack([value.detach().float().reshape(()) for value in tensors.values()]).tolist()
    return {**metrics, **dict(zip(tensors, values, strict=True))}


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on `device` for this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return free and free // num_local_processes()
