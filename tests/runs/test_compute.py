"""What every stage trains with: schedules, optimisers, seeds, devices and precision."""

import inspect
import platform
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.cuda._utils import _get_device_index

from lapo.config import Config, load_config
from lapo.errors import UserError
from lapo.models import make_idm, make_world_model, stack_frames
from lapo.runs import compute as training
from lapo.runs.compute import TF32_WARNING, Compute, rng_state, seed_everything, set_rng_state, to_floats
from support import CPU, ROOT


@pytest.fixture(scope="module")
def cfg() -> Config:
    """The published configuration."""
    return load_config([])


# Env steps and learning rates: 0 until the first, the peak at the second, 0 at the end (spec: lr = 1e-2).


# ---------------------------------------------------------------- seeds


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002 - as libraries do


def test_one_seed_gives_one_row_of_random_numbers():
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    assert not set(draws()) & set(first)


def test_pytorchs_random_numbers_continue_from_a_saved_state():
    seed_everything(0)
    torch.rand(5)
    state = rng_state(CPU.device)
    expected = torch.rand(5)
    seed_everything(9)
    set_rng_state(state, CPU.device)
    assert torch.equal(torch.rand(5), expected)


# ---------------------------------------------------------------- device and precision


def compute(monkeypatch, *arguments: str, native_bf16: bool = False, cuda: bool = False) -> Compute:
    """What is chosen on a machine with or without native bf16 on its CPU and one CUDA device."""
    monkeypatch.setattr(training, "_has_bf16", lambda device: native_bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    # With a GPU, PyTorch refuses a device without an index here, before it looks for one.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: _get_device_index(device))
    return Compute.from_config(load_config(list(arguments)))


def test_auto_chooses_the_device_precision_and_compilation_that_are_there(monkeypatch):
    assert compute(monkeypatch) == Compute(torch.device("cpu"), bf16=False, compile=False)
    assert compute(monkeypatch, native_bf16=True) == Compute(torch.device("cpu"), bf16=True, compile=False)
    gpu = compute(monkeypatch, native_bf16=True, cuda=True)
    assert gpu == Compute(torch.device("cuda"), bf16=True, compile=True, graphs=True)


def test_configured_values_override_auto(monkeypatch):
    fp32 = compute(monkeypatch, "--precision", "fp32", "--device", "cpu", native_bf16=True, cuda=True)
    assert fp32 == Compute(torch.device("cpu"), bf16=False, compile=False)
    bf16 = compute(monkeypatch, "--precision", "bf16", "--compile", "on")
    assert bf16 == Compute(torch.device("cpu"), bf16=True, compile=True)
    eager = compute(monkeypatch, "--compile", "off", "--device", "cuda:0", cuda=True)
    assert eager == Compute(torch.device("cuda:0"), bf16=False, compile=False)


def test_a_missing_device_is_named(monkeypatch):
    with pytest.raises(UserError, match="device cuda does not exist: 0 CUDA devices; use cpu"):
        compute(monkeypatch, "--device", "cuda")
    with pytest.raises(UserError, match="device cuda:1 does not exist: 1 CUDA devices"):
        compute(monkeypatch, "--device", "cuda:1", cuda=True)
    for number in ("128", "200", "99999999999999999999", "9" * 5000, "00"):
        with pytest.raises(UserError, match=f"^device cuda:{number} does not exist: 1 CUDA devices; use cpu"):
            compute(monkeypatch, "--device", f"cuda:{number}", cuda=True)
    with pytest.raises(UserError, match="'device' is 'cuda:٣'"):
        compute(monkeypatch, "--device", "cuda:٣", cuda=True)


def test_graphs_need_a_cuda_device(monkeypatch):
    with pytest.raises(UserError, match="compile is graphs, which needs a CUDA device, not cpu"):
        compute(monkeypatch, "--compile", "graphs")
    assert compute(monkeypatch, "--compile", "graphs", cuda=True).graphs
    assert not compute(monkeypatch, "--compile", "on", cuda=True).graphs


def test_several_processes_have_no_graphs_and_say_so_where_they_were_asked_for(monkeypatch):
    monkeypatch.setattr(training, "num_processes", lambda: 2)
    found = compute(monkeypatch, cuda=True)
    assert (found.compile, found.graphs) == (True, False)
    with pytest.raises(
        UserError, match="compile is graphs, but the steps of 2 processes contain collectives"
    ):
        compute(monkeypatch, "--compile", "graphs", cuda=True)


def test_without_a_compiler_a_line_says_so_and_steps_stay_uncompiled(monkeypatch, capsys):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(training.shutil, "which", lambda name: None)
    found = compute(monkeypatch, cuda=True)
    assert (found.compile, found.graphs) == (False, True)
    assert "training steps are not compiled" in capsys.readouterr().err
    assert not compute(monkeypatch, "--compile", "on").compile
    assert "a compiler (g++ or clang++) is missing" in capsys.readouterr().err
    compute(monkeypatch)
    assert capsys.readouterr().err == ""  # nothing was to be compiled


def test_without_pythons_headers_steps_stay_uncompiled(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(training.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert not compute(monkeypatch, cuda=True).compile
    assert f"{tmp_path}/Python.h" in capsys.readouterr().err


def test_a_gpu_that_pytorch_cannot_use_is_an_error_unless_it_was_hidden(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(training.Path, "exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"built for CUDA 13.0.* or choose --device cpu"):
        compute(monkeypatch)
    assert compute(monkeypatch, "--device", "cpu").device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compute(monkeypatch).device.type == "cpu"


def test_fp32_is_not_rounded_to_tf32():
    torch.backends.cudnn.allow_tf32 = True
    Compute(torch.device("cpu"), bf16=False, compile=False)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_random_state_of_a_gpu_of_an_older_checkpoint_is_found_by_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: taken.append((state, str(device))))
    state = {"cpu": torch.get_rng_state(), "cuda": ["of 0", "of 1"]}
    set_rng_state(state, torch.device("cuda:1"))
    set_rng_state(state | {"cuda": ["of the one"]}, torch.device("cuda:1"))
    set_rng_state(state, CPU.device)
    assert taken == [("of 1", "cuda:1"), ("of the one", "cuda:1")]


def test_placed_convolutions_are_channels_last():
    conv = CPU.place(nn.Conv2d(8, 8, 3))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_one_step_of_stage_1_in_bf16_is_close_to_fp32():
    cfg = load_config(
        ["--preset", "demo", "--data.image_size", "64", "--model.wm_width", "8", "--vq.normalize", "false"]
    )
    torch.manual_seed(0)
    idm, world_model = make_idm(cfg), make_world_model(cfg)
    images = stack_frames(torch.randint(256, (8, 3, 64, 64, 3), dtype=torch.uint8))
    results = []
    for bf16 in (False, True):
        with Compute(torch.device("cpu"), bf16, False).autocast():
            la = idm.infer_latents(images)
            predicted = world_model(images[:, :6], la)
        loss = F.mse_loss(predicted, images[:, 6:])
        idm.zero_grad(), world_model.zero_grad()
        loss.backward()
        results.append((la, predicted, loss, idm.fc.weight.grad.flatten().clone()))
        assert la.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert loss.dtype == predicted.dtype == torch.float32
    (*plain, plain_grad), (*mixed, mixed_grad) = results
    for exact, rounded in zip(plain, mixed, strict=True):
        assert (exact - rounded).norm() <= 0.03 * exact.norm()
    assert F.cosine_similarity(plain_grad, mixed_grad, 0) > 0.95


# ---------------------------------------------------------------- metrics


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_run_on_a_cpu_reuses_the_memory_of_freed_tensors():
    """Counts page faults, in a separate process: new pages fault at the first access."""
    script = f'''
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from lapo.config import load_config
from lapo.runs.compute import Compute, keep_freed_memory

def faults():
    """The fewest of three rounds: the system moves pages for reasons of its own, too."""
    counts = []
    for _ in range(3):
        torch.ones(16 << 20)  # 64 MB
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(16 << 20)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)

usual = faults()
Compute.from_config(load_config(["--device", "cpu"]))
kept = faults()
keep_freed_memory(False)
print(usual, kept, faults())
'''
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    usual, kept, given_back = map(int, done.stdout.split())
    assert min(usual, given_back) >= 10 * 32  # 2 MB a page at most
    assert kept < min(usual, given_back) / 10


def test_metrics_become_numbers():
    assert to_floats({"a": torch.tensor(1.5), "b": 2.0, "c": torch.tensor(3)}) == {
        "a": 1.5,
        "b": 2.0,
        "c": 3.0,
    }
    assert to_floats({}) == {}


def test_the_warning_that_is_silenced_is_pytorchs():
    from torch._inductor import compile_fx  # warns of itself, which only this test need suffer

    assert TF32_WARNING in inspect.getsource(compile_fx)
