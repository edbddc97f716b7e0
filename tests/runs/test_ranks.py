"""Data-parallel training equals training in one process: two ranks on this machine, over Gloo."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapo import data_loader, evaluate, report, stage1_idm_wm, stage2_bc, stage3_decode, train_expert
from lapo.bottleneck import VectorQuantizer
from lapo.config import Config, load_config
from lapo.data_loader import RollingWindows, Windows
from lapo.errors import UserError, run_main
from lapo.models import make_idm, make_latent_policy, make_world_model
from lapo.runs import ranks
from lapo.runs.checkpoints import load_checkpoint
from lapo.runs.compute import Compute, seed_everything
from lapo.runs.ranks import Shard, all_max, average, check_equal, distributed, is_main, per_rank_batch, shard
from support import LAPO, PATIENCE, ROOT, Workplace, numbered_frames, read_numbers, write_chunk, write_game

CPU = torch.device("cpu")
PLAIN = Compute(CPU, bf16=False, compile=False)


# ---------------------------------------------------------------- shards of the data


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """Five chunks of different sizes, their frames numbered: chunk k's from 100·k on."""
    for k, size in enumerate((20, 30, 25, 40, 10)):
        write_chunk(tmp_path / "train" / f"{k}.npz", numbered_frames(100 * k + np.arange(size)))
    return tmp_path / "train"


def shards_of(folder: Path, kind: Callable[..., Windows], **options: int) -> list[Windows]:
    return [kind(folder, device=CPU, shard=Shard(rank, 2), **options) for rank in range(2)]


def test_shards_are_a_partition_of_all_windows(counted):
    everything, shards = Windows(counted, device=CPU), shards_of(counted, Windows)
    first, second = ([int(x) for x in read_numbers(w.gather(w.all()))[:, 0]] for w in shards)
    assert sorted(first + second) == read_numbers(everything.gather(everything.all()))[:, 0].tolist()
    assert {number // 100 for number in first} == {0, 2, 4}


def test_an_epoch_of_a_shard_visits_each_of_its_windows_once(counted):
    rolling = shards_of(counted, RollingWindows, pool_chunks=1)
    for windows in shards_of(counted, Windows) + rolling:
        batches = [windows.batch(step, 1, seed=3) for step in range(len(windows))]
        assert sorted(torch.cat(batches).tolist()) == list(range(len(windows)))


def test_shards_of_equal_size_have_different_orders(tmp_path):
    for k in range(2):
        write_chunk(tmp_path / f"{k}.npz", numbered_frames(np.arange(40)))
    orders = [Windows(tmp_path, device=CPU, shard=Shard(rank, 2)).batch(0, 38, seed=0) for rank in range(2)]
    assert orders[0].tolist() != orders[1].tolist()


def test_fewer_chunks_than_processes_are_refused(counted):
    with pytest.raises(UserError, match=r"4 processes need a chunk each, but 3 are in use; start"):
        Windows(counted, device=CPU, limit=3, shard=Shard(0, 4))


def test_a_run_does_not_resume_with_another_number_of_processes(counted):
    alone, shared = Windows(counted, device=CPU), Windows(counted, device=CPU, shard=Shard(0, 2))
    with pytest.raises(UserError, match=r"chunks: 3 → 5; processes: 2 → 1"):
        alone.check_data_order(shared.data_order)


@pytest.mark.parametrize(
    ("resident", "room", "rolling"),
    # The largest shard has 85 frames, all chunks 125.
    [("auto", 1000, False), ("always", 1000, False), ("always", 130, True), ("never", 1000, True)],
)
def test_without_held_out_frames_every_process_evaluates_on_all_shards(
    counted, monkeypatch, capsys, resident, room, rolling
):
    """On the windows of a single process; if they do not fit beside the shard, they are loaded in turns."""
    monkeypatch.setattr(data_loader, "free_bytes", lambda device: room * 64 * 64 * 3)
    place, game = counted.parent.parent, counted.parent.name
    cfg = load_config(["--env", game, "--data_dir", str(place), "--resident", resident])
    monkeypatch.setattr(data_loader, "shard", lambda: Shard(0, 1))
    alone, measured = data_loader.read_splits(cfg, CPU)
    assert measured is alone
    expected = numbers_of(measured, measured.evenly_spaced(20))
    for rank in range(2):
        monkeypatch.setattr(data_loader, "shard", partial(Shard, rank, 2))
        mine, measured = data_loader.read_splits(cfg, CPU)
        assert numbers_of(measured, measured.evenly_spaced(20)) == expected
        assert isinstance(measured, RollingWindows) == rolling
        assert {number // 100 for number in numbers_of(mine, mine.all())} == [{0, 2, 4}, {1, 3}][rank]
    assert capsys.readouterr().out.count("test: no such folder; evaluation uses the training windows") == 3


def numbers_of(windows: Windows, ids: Tensor) -> list[int]:
    batches = [windows.gather(part) for part in windows.iter_batches(ids, 7)]
    return np.concatenate([read_numbers(x)[:, 0] for x in batches]).tolist()


# ---------------------------------------------------------------- two ranks


def variables(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells the processes of a pair."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_rank(rank: int, port: int, function: Callable[..., Any], file: Path, arguments: tuple) -> None:
    os.environ.update(variables(rank, port))
    torch.set_num_threads(1)
    with distributed():
        torch.save(function(*arguments), file)


def start_ranks(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[BaseProcess]:
    """Start two ranks; each calls `function` and saves what it returns as `<rank>.pt`."""
    port = free_port()
    fork = multiprocessing.get_context("fork")  # for they have everything imported
    ranks = [
        fork.Process(target=as_rank, args=(rank, port, function, folder / f"{rank}.pt", arguments))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    return ranks


def on_two_ranks(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function` returns on each of two ranks."""
    ranks = start_ranks(function, folder, *arguments)
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def collectives() -> dict[str, Any]:
    mine = shard().rank
    x, y = torch.full((2, 3), float(mine)), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T * (mine + 1)
    average([x, y])
    try:
        check_equal(mine, "they differ")
        refused = ""
    except UserError as error:
        refused = str(error)
    check_equal(7, "unreachable")
    return {"x": x, "y": y, "max": all_max(mine, 5 - mine), "first": is_main(), "refused": refused}


def test_collectives(tmp_path):
    for rank, result in enumerate(on_two_ranks(collectives, tmp_path)):
        assert torch.equal(result["x"], torch.full((2, 3), 0.5))
        assert torch.equal(result["y"], torch.tensor([[1.5, 4.5], [3.0, 6.0]]))
        assert result["max"] == (1, 5)
        assert result["first"] == (rank == 0)
        assert result["refused"] == "they differ (0 for one, 1 for another)"


def quantise(start: str, batches: Tensor) -> dict[str, Tensor]:
    seed_everything(0)
    vq = VectorQuantizer(2, 2, 8, 4, decay=0.9, start=start)
    perplexities = [vq(part_of(la)).perplexity for la in batches]
    return vq.state_dict() | {"perplexities": torch.stack(perplexities)}


def part_of(batch: Tensor) -> Tensor:
    """This rank's part of a batch: every second row of it, or everything in a single process."""
    return batch[shard().rank :: shard().world_size]


def test_the_ema_update_on_two_ranks_equals_that_of_one_process(tmp_path):
    batches = torch.randn(6, 32, 16, generator=torch.Generator().manual_seed(1))
    alone = quantise("published", batches)
    for result in on_two_ranks(quantise, tmp_path, "published", batches):
        torch.testing.assert_close(result, alone, rtol=1e-5, atol=1e-6)


def test_a_codebook_that_starts_from_data_is_the_same_on_all_ranks(tmp_path):
    batches = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(1))
    first, second = on_two_ranks(quantise, tmp_path, "data", batches)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["codebook"].abs().max() < 5


def train_stage1(cfg: Config, batches: Tensor, frozen_norm: bool) -> dict[str, Any]:
    """Steps on given frames (S, B, T, H, W, C)."""
    seed_everything(0)
    idm, world_model = make_idm(cfg), make_world_model(cfg)
    if frozen_norm:
        for module in world_model.modules():
            module.train(not isinstance(module, nn.BatchNorm2d))
    trainer = stage1_idm_wm.Trainer(cfg, PLAIN, None, idm, world_model)
    trainer.set_lr(0)
    metrics = [trainer.backward(part_of(frames)) | trainer.apply() for frames in batches]
    return {"idm": idm.state_dict(), "world_model": world_model.state_dict(), "metrics": metrics}


def random_windows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (*shape, 64, 64, 3), generator=generator, dtype=torch.uint8)


def test_stage_1_on_two_ranks_equals_stage_1_on_one(workplace, tmp_path):
    """All weights, the codebook and the metrics, with BatchNorm that does not depend on the batch."""
    cfg, batches = workplace.config("--stage1.batch_size", "8"), random_windows(3, 8, 3)
    alone = train_stage1(cfg, batches, True)
    for result in on_two_ranks(train_stage1, tmp_path, cfg, batches, True):
        torch.testing.assert_close(result, alone, rtol=1e-4, atol=2e-5)


def test_running_statistics_of_batchnorm_are_averages_over_the_ranks(workplace, tmp_path):
    cfg, batches = workplace.config("--stage1.batch_size", "8"), random_windows(1, 8, 3)
    first, second = on_two_ranks(train_stage1, tmp_path, cfg, batches, False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    parts = [train_stage1(cfg, batches[:, rank::2], False)["world_model"] for rank in range(2)]
    for name, value in first["world_model"].items():
        if "running" in name:
            torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6)


def train_stage2(cfg: Config, batches: Tensor, la: Tensor) -> dict[str, Any]:
    """Steps on given frames (S, B, H, W, C) and latent actions (S, B, la_dim)."""
    seed_everything(0)
    trainer = stage2_bc.Trainer(cfg, PLAIN, None, la[0], make_latent_policy(cfg))
    trainer.set_lr(0)
    metrics = []
    for frames, target in zip(batches, la, strict=True):
        metrics.append(trainer.backward(part_of(frames), part_of(target)))
        trainer.apply()
    return {"policy": trainer.policy.state_dict(), "metrics": metrics}


def test_stage_2_on_two_ranks_equals_stage_2_on_one(workplace, tmp_path):
    cfg, batches = workplace.config("--stage2.batch_size", "8"), random_windows(3, 8)
    la = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(3))
    alone = train_stage2(cfg, batches, la)
    for result in on_two_ranks(train_stage2, tmp_path, cfg, batches, la):
        torch.testing.assert_close(result, alone, rtol=1e-4, atol=2e-5)


def refuse_batch() -> str:
    try:
        return str(per_rank_batch(9))
    except UserError as error:
        return str(error)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    assert per_rank_batch(9) == 9
    for message in on_two_ranks(refuse_batch, tmp_path):
        assert message.startswith("a batch of 9 windows cannot be divided among 2 processes")


# ---------------------------------------------------------------- ranks that never join, or fail


def alone(environment: dict[str, str]) -> BaseProcess:
    """A script's process of which torchrun's variables say that there is another one."""

    def join() -> None:
        with distributed():
            raise AssertionError("there is no other process")

    def run() -> None:
        os.environ.update(environment)
        run_main(join)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_waiting_for_a_missing_rank_prints_a_notice_and_can_be_interrupted(
    monkeypatch, capfd, rank, number, code
):
    monkeypatch.setattr(ranks, "NOTICE_AFTER", 0.1)
    environment = variables(rank, free_port())
    process, said = alone(environment), ""
    while "\n" not in said:
        assert process.is_alive()
        time.sleep(0.01)
        said += capfd.readouterr().err
    place = f"127.0.0.1:{environment['MASTER_PORT']}"
    assert said.startswith(
        f"process {rank} waits at {place} for the others of 2 processes; if torchrun did not"
    )
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == code


@pytest.mark.parametrize("rendezvous", [dist.rendezvous, lambda *place, timeout: time.sleep(3600)])
def test_waiting_for_a_missing_rank_times_out(monkeypatch, capfd, rendezvous):
    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    monkeypatch.setattr(ranks, "NOTICE_AFTER", 0.1)
    monkeypatch.setattr(ranks, "JOIN_TIMEOUT", 0.3)
    process = alone(variables(1, free_port()))
    process.join(PATIENCE)
    assert process.exitcode == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: process 1 ")
    assert last.endswith(
        "why they did not start or, if torchrun did not start this process, unset TORCHELASTIC_RUN_ID"
    )


def test_a_port_that_is_taken_is_one_sentence(capfd):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        process = alone(variables(0, taken.getsockname()[1]))
        process.join(PATIENCE)
    assert process.exitcode == 2
    assert "error: process 0 could not wait at 127.0.0.1:" in capfd.readouterr().err


@pytest.mark.slow
def test_a_plain_run_with_torchruns_variables_does_not_hang():
    """A real process: at its end, a thread still waits in C++."""
    code = """if True:
        from lapo.errors import run_main
        from lapo.runs import ranks
        ranks.NOTICE_AFTER = 0.1
        def main():
            with ranks.distributed():
                pass
        run_main(main)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | variables(0, free_port()),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "waits at 127.0.0.1:" in process.stderr.readline()
    process.terminate()
    _, rest = process.communicate(timeout=PATIENCE)
    assert (process.returncode, rest) == (143, "terminated; the same command continues\n")


@pytest.mark.parametrize(("value", "found"), [(None, "is missing"), ("", "is missing"), ("two", "is 'two'")])
def test_half_of_torchruns_variables_are_a_mistake(monkeypatch, value, found):
    for name, number in variables(0, 1).items():
        monkeypatch.setenv(name, number)
    assert ranks.num_processes() == 2
    monkeypatch.delenv("WORLD_SIZE")
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(
        UserError, match=f"but WORLD_SIZE {found}; if torchrun did not start this process, un"
    ):
        ranks.num_processes()


def fail_alone() -> None:
    all_max(0)
    dist.destroy_process_group = partial(time.sleep, 3600)  # as with NCCL, where others have ended
    if shard().rank == 1:
        raise UserError("I alone cannot go on")
    all_max(0)


def test_after_one_rank_has_failed_alone_none_hangs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ranks, "LEAVE_TIMEOUT", 0.1)
    processes = start_ranks(fail_alone, tmp_path)
    for process in processes:
        process.join(PATIENCE)
    assert all(process.exitcode not in (None, 0) for process in processes)
    said = capfd.readouterr().err
    assert "UserError: I alone cannot go on" in said
    assert "UserError: another process of this run has ended; the same command continues" in said


# ---------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_uninterrupted_one(tmp_path, capfd):
    """Bit for bit. The signal reaches every rank twice, as it does where a whole process group gets it."""
    place = Workplace(tmp_path)
    write_game(place.data / place.GAME, chunks=3)
    options = ["--stage1.steps", "60", "--stage1.save_every", "1000", "--stage1.probe_every", "1000"]
    folders = {exp: place.run_dir("stage1", exp) for exp in ("stopped", "whole")}
    runs = {exp: partial(stage1_idm_wm.train, place.config(*options, "--exp", exp)) for exp in folders}

    ranks = start_ranks(runs["stopped"], tmp_path)
    metrics = folders["stopped"] / "metrics.jsonl"
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.01)
    for rank in ranks * 2:
        os.kill(rank.pid, signal.SIGTERM)
    for rank in ranks:
        rank.join(PATIENCE)
    assert [rank.exitcode for rank in ranks] == [143, 143]
    step = load_checkpoint(folders["stopped"] / "checkpoint.pt")["step"]
    assert 0 < step < 60
    assert f"stopped at step {step}; the same command continues" in capfd.readouterr().err

    states, lines = [], []
    for exp, folder in folders.items():
        on_two_ranks(runs[exp], tmp_path)
        assert (f"continues from step {step}" in capfd.readouterr().out) == (exp == "stopped")
        states.append(load_checkpoint(folder / "checkpoint.pt")["state"])
        lines.append([json.loads(line) | {"seconds": 0} for line in (folder / "metrics.jsonl").open()])
    assert lines[0] == lines[1]
    assert states[0].pop("order")["processes"] == states[1].pop("order")["processes"] == 2
    torch.testing.assert_close(*states, rtol=0, atol=0)


def torchrun(place: Workplace, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script's real command line in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(LAPO / script), "--config", str(place.config_file), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=place.folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_torchrun_trains_and_prints_once(trained):
    """On rolling data, which every rank reads for itself; stage 2 builds on a stage 1 of one process."""
    trained.branch("pair", "stage1")
    options = ["--exp", "pair", "--resident", "never", "--data.pool_chunks", "1"]
    stage2 = torchrun(trained, "stage2_bc.py", *options)
    assert stage2.returncode == 0, stage2.stderr
    assert stage2.stdout.count("2 processes\n") == stage2.stdout.count("stage2 done") == 1
    checkpoint = load_checkpoint(trained.run_dir("stage2", "pair") / "checkpoint.pt")
    assert checkpoint["finished"]
    order = {"windows": 35, "chunks": 1, "on the device": "pools of 1 chunks", "processes": 2}
    assert checkpoint["state"]["order"] == order


def test_a_mistake_is_reported_once(workplace):
    process = torchrun(workplace, "stage1_idm_wm.py", "--stage1.batch_size", "5")
    assert process.returncode != 0
    assert process.stderr.count("error: a batch of 5 windows cannot be divided among 2 processes") == 1


def test_stage_3_is_for_one_process(monkeypatch):
    monkeypatch.setattr(stage3_decode, "shard", lambda: Shard(0, 2))
    with pytest.raises(UserError, match="stage 3 runs in one process, not 2"):
        stage3_decode.main()


@pytest.mark.parametrize("script", [evaluate, report, train_expert])
def test_a_script_for_one_process_says_so_once(call_main, monkeypatch, script):
    name = script.__name__.rpartition(".")[2]
    sentence = f"error: {name}.py runs in one process, not 2; start it without torchrun\n"
    for rank, said in (("0", sentence), ("1", "")):
        for key, value in (("TORCHELASTIC_RUN_ID", "none"), ("WORLD_SIZE", "2"), ("RANK", rank)):
            monkeypatch.setenv(key, value)
        assert call_main(script.main) == (2, "", said)


def test_numbers_on_the_cpu_are_reduced_where_there_are_gpus(monkeypatch):
    """By default PyTorch would make NCCL alone there, which knows no tensors on the CPU."""
    chosen = []
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "x",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks.dist, "rendezvous", lambda *_, **__: iter([("store", 0, 2)]))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        ranks._init_process_group()
    assert chosen == ["cpu:gloo,cuda:nccl", "gloo"]
