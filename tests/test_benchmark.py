"""benchmark.py, same_learning.py: command lines, what is counted, and that both paths compute the same."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lapo import benchmark, same_learning, stage1_idm_wm, stage2_bc
from lapo.benchmark import count_gflop, part_seconds
from lapo.benchmarks import workloads
from lapo.benchmarks.workloads import (
    Part,
    ReferencePolicy,
    TimedEnv,
    contiguous,
    load,
    random_windows,
    record_random_play,
    reference_stage1_networks,
    short_update,
    stage1_networks,
)
from lapo.data import chunks
from lapo.data.chunks import CHUNK_FRAMES, find_chunks, read_header
from lapo.data_loader import Windows
from lapo.errors import run_main
from lapo.games.table import ACTIONS
from lapo.models import TwoPathPolicy, make_decoder, make_latent_policy
from lapo.runs.compute import Compute
from lapo.same_learning import summary_table
from support import Workplace, write_game

CPU = torch.device("cpu")
PARTS = {
    ("1", "optimised"): {"load", "forward/backward", "update", "probe"},
    ("1", "reference"): {"load", "forward/backward", "update", "probe"},
    ("2", "optimised"): {"load", "infer latents", "forward/backward", "update"},
    ("2", "reference"): {"load", "forward/backward", "update"},
    ("3", "optimised"): {"policy", "env", "update", "infer latents", "decoder"},
    ("3", "reference"): {"policy", "env", "update", "infer latents"},
    ("load", "optimised"): {"load"},
    ("load", "reference"): {"load"},
}
SAMPLES = {"1": 4, "2": 4, "3": 32, "load": 64}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All stages measured by the real command line: what it printed, and the results by stage and path."""
    workplace = Workplace(tmp_path_factory.mktemp("benchmark"))
    options = ["--compare", "reference", "--repeats", "1", "--frames", "64", "--probe.windows", "16"]
    done = workplace.run("benchmark.py", *options, "--json", "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((workplace.folder / "out.json").read_text())
    assert not workplace.results.exists()
    return done.stdout, report, {(result["stage"], result["path"]): result for result in report["results"]}


def test_the_command_line_measures_every_stage_and_the_reference_path(measured):
    stdout, report, results = measured
    assert results.keys() == PARTS.keys()
    assert report["config"]["probe"]["windows"] == 16
    assert report["provenance"].keys() == {"revision", "python", "torch"}
    for (stage, path), result in results.items():
        assert any(
            [cell.strip() for cell in line.split("|")[1:3]] == [stage, path] for line in stdout.splitlines()
        )
        assert result["device"] == "cpu (1 threads), fp32"
        assert result["samples_per_step"] == SAMPLES[stage]
        assert result["seconds"].keys() == PARTS[stage, path]
        assert result["gflop"].keys() == PARTS[stage, path] - {"env"}
        assert result["host_bytes"] > 1e8
        assert 0 < result["cores"] < 2
        for key in ("device_bytes", "host_seconds_per_step", "device_seconds_per_step"):
            assert result[key] is None


def test_numbers_agree_with_each_other(measured):
    _, _, results = measured
    for (stage, path), result in results.items():
        assert result["steps_per_s"] > 0
        assert result["samples_per_s"] == pytest.approx(result["steps_per_s"] * SAMPLES[stage])
        assert all(seconds > 0 for seconds in result["seconds"].values())
        assert sum(result["seconds"].values()) == pytest.approx(1 / result["steps_per_s"])
        assert ("matmul_fraction" in result) == (stage != "load")
        if stage != "load":
            rate = sum(result["gflop"].values()) * result["steps_per_s"]
            assert result["gflop_per_s"] == pytest.approx(rate)
            assert result["matmul_fraction"] == pytest.approx(rate / result["matmul_gflop_per_s"])
        if path == "optimised":
            reference = results[stage, "reference"]["seconds_per_step"]
            assert result["speed_up"] == pytest.approx(reference / result["seconds_per_step"])


def test_the_published_code_does_more_work(measured):
    """Labels aside, stage 2 trains the same; the trunk's work in stage 3 shrinks to one pass per step."""
    _, _, results = measured
    gflop = {key: result["gflop"] for key, result in results.items()}
    assert gflop["1", "optimised"]["forward/backward"] < gflop["1", "reference"]["forward/backward"]
    assert gflop["2", "optimised"]["forward/backward"] < 0.6 * gflop["2", "reference"]["forward/backward"]
    # A rollout of 8 steps ends with a look at what follows.
    policy = gflop["3", "optimised"]["policy"]
    assert gflop["3", "reference"]["policy"] == pytest.approx(policy)
    # Forward and backward, less the first layer's gradient by the image, in each of two epochs.
    assert 5 < gflop["3", "reference"]["update"] / (policy * 8 / 9) < 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stage", "4"], "the command line: argument --stage: invalid choice: '4'"),
        (["--compare", "fancy"], "the command line: argument --compare: invalid choice: 'fancy'"),
        (["--repeats", "0"], "--repeats is 0; there must be at least 1"),
        (["--frames", "2"], "--frames is 2; there must be at least 3"),
        (["--frames", "few"], "the command line: argument --frames: invalid int value: 'few'"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: the folder nowhere does not exist"),
        (["--stage1.lrr", "1"], "the command line: unknown option --stage1.lrr"),
        (["--rep", "1"], "the command line: unknown option --rep; did you mean --repeats?"),
        (["--stage", "3", "--env", "bigfsh"], "'bigfsh' is not a Procgen game"),
    ],
)
def test_mistakes_are_told_in_a_sentence(monkeypatch, capsys, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_main(benchmark.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")


def test_flops_of_small_layers_equal_arithmetic():
    conv, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 11)
    image, x = torch.randn(2, 3, 8, 8), torch.randn(4, 7, requires_grad=True)

    def step():
        y = conv(image)
        yield Part("forward")
        y.sum().backward()
        yield Part("backward")
        linear(x).sum().backward()
        yield Part("env", 2, 1.0)
        yield Part("linear", 0.5)

    gflop = count_gflop(step())
    assert gflop.keys() == {"forward", "backward", "linear"}
    forward = 2 * (2 * 8 * 8) * 5 * (3 * 3 * 3) / 1e9
    assert gflop["forward"] == pytest.approx(forward)
    assert gflop["backward"] == pytest.approx(forward)  # by the weights alone: the image wants no gradient
    assert gflop["linear"] == pytest.approx(0.5 * 3 * 2 * 4 * 7 * 11 / 1e9)


def test_seconds_add_up_by_part(monkeypatch):
    """A clock that is asked at the start and after every part that does not bring its own time."""
    times = iter([0, 10, 14, 21])
    monkeypatch.setattr(benchmark, "now", lambda device: next(times))
    step = [Part("env", 4, 3.0), Part("policy"), Part("label", 0.5), Part("policy", 2)]
    assert part_seconds(step, CPU) == {"env": 12, "policy": 7 + 14, "label": 2}


def test_on_a_gpu_the_host_waits_twice_in_a_hundred_steps(monkeypatch):
    """Here a clock stands for the GPU: every wait takes it 50 seconds further, every step issued 0.1."""
    clock = {"time": 0.0}
    events = []

    def update(number: int) -> None:
        clock["time"] += 0.1
        events.append(number)

    def wait(device: torch.device) -> float:
        clock["time"] += 50
        events.append("wait")
        return clock["time"]

    monkeypatch.setattr(benchmark, "now", wait)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock["time"])
    host, device = benchmark.training_seconds(update, CPU, 5)
    issued = [event for number in range(10) for event in ("wait", number)]
    assert events == [*range(5), *issued, "wait", *range(100), "wait"]
    assert (host, device) == (pytest.approx(0.1), pytest.approx(0.6))


@pytest.mark.parametrize("stage", ["1", "2"])
def test_on_a_gpu_the_steps_of_the_stage_itself_are_timed(workplace, monkeypatch, capsys, stage):
    """A CPU is taken for a GPU: waits, graphs launched and weights updated are written down in order."""
    events, cudnn = [], torch.backends.cudnn
    trainer = {"1": stage1_idm_wm, "2": stage2_bc}[stage].Trainer

    def note(event: str, function: Callable) -> Callable:
        return watching(function, lambda *_: events.append(event))

    def trained(*_) -> None:
        assert not cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        events.append("trained")

    def replayed(compute: Compute, function: Callable) -> Callable:
        return note("graph", function) if compute.graphs else function

    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(benchmark, "asynchronous", lambda device: True)
    monkeypatch.setattr(benchmark, "matmul_gflop_per_s", lambda compute: 1000.0)
    monkeypatch.setattr(benchmark, "STEPS", 20)
    monkeypatch.setattr(workloads, "train_probe", lambda *_: None)  # it has an AdamW of its own
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(torch.optim.AdamW, "step", watching(torch.optim.AdamW.step, trained))
    monkeypatch.setattr(trainer, "update", note("update", trainer.update))
    monkeypatch.setattr(Compute, "replayed", replayed)
    computed = Compute(CPU, bf16=False, compile=False, graphs=True)
    monkeypatch.setattr(Compute, "from_config", lambda cfg: computed)
    options = ["--stage", stage, "--compare", "reference", "--repeats", "1", "--frames", "64"]
    json_file = workplace.folder / "out.json"
    benchmark.benchmark(
        *benchmark.parse([*options, "--json", str(json_file), "--config", str(workplace.config_file)])
    )

    between_waits = [0]
    for event in events:
        if event == "wait":
            between_waits.append(0)
        between_waits[-1] += event == "trained"
    # One step to count FLOPs and some to warm up, ten given to an idle device, twenty, then part by part.
    ones = [1] * 10
    assert [count for count in between_waits if count] == [6, *ones, 20, *ones[:6], 2, *ones, 20, *ones[:2]]
    # All but the first and those in parts are `Trainer.update`; stage 2 of the reference has no such trainer.
    assert events.count("graph") == 35
    assert events.count("update") == 35 + (31 if stage == "1" else 0)
    for result in json.loads(json_file.read_text())["results"]:
        host, device = result["host_seconds_per_step"], result["device_seconds_per_step"]
        assert host > 0
        beside = sum(result["seconds"][name] for name in result["seconds"].keys() - set(workloads.TRAINING))
        assert result["seconds_per_step"] == pytest.approx(device + beside)
    assert "| host ms | device ms |" in capsys.readouterr().out


def test_on_a_gpu_whole_updates_of_ppo_are_timed(workplace):
    cfg = workplace.config()
    assert short_update(cfg, torch.device("cuda")) == (cfg, 1.0)
    short, rollouts = short_update(cfg, CPU)
    assert short.ppo.rollout_steps * rollouts == cfg.ppo.rollout_steps
    assert (short.ppo.minibatches, short.ppo.epochs) == (1, 1)


@pytest.mark.parametrize(("gpu", "size", "count"), [(True, 8192, 10), (False, 2048, 1)])
def test_the_limit_is_the_rate_of_products_between_two_waits(monkeypatch, gpu, size, count):
    """Here a product takes a second, on a clock that the waits read."""
    events = []

    class Matrix:
        def to(self, dtype: torch.dtype) -> "Matrix":
            events.append(dtype)
            return self

        def __matmul__(self, other: "Matrix") -> None:
            events.append("product")

    def wait(device: torch.device) -> int:
        events.append("wait")
        return events.count("product")

    def randn(*shape: int, device: torch.device) -> Matrix:
        assert shape == (size, size)
        return Matrix()

    monkeypatch.setattr(benchmark, "asynchronous", lambda device: gpu)
    monkeypatch.setattr(benchmark, "now", wait)
    monkeypatch.setattr(torch, "randn", randn)
    rate = benchmark.matmul_gflop_per_s(Compute(CPU, bf16=True, compile=False))
    assert events == [torch.bfloat16] * 2 + ["product", "wait", *["product"] * count, "wait"]
    assert rate == pytest.approx(2 * size**3 / 1e9)


def test_steps_stay_in_an_epoch(workplace):
    """Batches of 4 of 11 windows: the third one would reach into the next epoch."""
    served = []
    update = workloads.within_epoch(served.append, range(11), 4)
    for number in range(5):
        update(number)
    assert served == [0, 1, 0, 1, 0]


def test_the_reference_computes_in_fp32_without_tf32(workplace):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    Compute(CPU, bf16=False, compile=False)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_older_name_of_the_reference_is_understood():
    assert benchmark.parse(["--compare", "plain"])[0].compare == "reference"


def test_results_of_older_versions_are_read(workplace, tmp_path):
    cfg = workplace.config()
    file = tmp_path / "old.json"
    report = same_learning.read(None, cfg) | {"runs": [{"path": "plain"}, {"path": "fast"}]}
    file.write_text(json.dumps(report))
    assert [run["path"] for run in same_learning.read(file, cfg)["runs"]] == ["reference", "optimised"]


def test_the_environment_counts_the_waiting_in_both_calls(workplace):
    env = TimedEnv.of(workplace.config())
    env.take_waited()
    env.step(torch.zeros(4, dtype=torch.int64).numpy())
    assert env.take_waited() > 0
    assert env.take_waited() == 0
    env.close()


def watching(function: Callable, watch: Callable) -> Callable:
    """`function`, which also tells `watch` its positional arguments."""

    def watched(*args, **options):
        watch(*args)
        return function(*args, **options)

    return watched


@pytest.mark.parametrize("resident", [True, False])
def test_loading_brings_every_frame_to_the_device(workplace, monkeypatch, resident):
    """Five chunks of 12 frames; where they take turns, all windows are served."""
    monkeypatch.setitem(CHUNK_FRAMES, "train", 14)
    cfg, folder, served = workplace.config(), workplace.folder / "load", []
    folder.mkdir()
    assert record_random_play(cfg, 60, folder) == 60
    assert [read_header(path) for path in find_chunks(folder)] == [12] * 5
    read = []
    read_chunk = watching(chunks.read_chunk, lambda path, *_: read.append(path))
    monkeypatch.setattr(chunks, "read_chunk", read_chunk)
    monkeypatch.setattr(
        Windows, "gather", watching(Windows.gather, lambda _, ids: served.extend(ids.tolist()))
    )
    workload = load(cfg, Compute(CPU, bf16=False, compile=False), folder, 60, resident)
    (part,) = workload.step(0)
    assert (part.name, part.per_step, workload.samples) == ("load", 1, 60)
    assert set(read) == set(find_chunks(folder))
    assert served == ([] if resident else Windows(folder, device=CPU).all().tolist())


def test_frames_that_the_reference_loader_has_no_room_for_are_refused_at_once(monkeypatch, call_main):
    monkeypatch.setattr(workloads, "free_bytes", lambda device: 10**9)
    arguments = ["--stage", "load", "--frames", "50000", "--compare", "reference"]
    status, stdout, stderr = call_main(benchmark.main, *arguments)
    assert (status, stdout) == (2, "")
    assert "50,000 frames as the reference does needs 1.2 GB of host memory, 1.0 GB are free" in stderr


# ---------------------------------------------------------------- the reference path computes the same


def test_reference_stage_1_equals_ours(workplace):
    cfg = workplace.config("--vq.start", "data")
    cfg = replace(cfg, stage1=replace(cfg.stage1, batch_size=8))
    compute, windows = Compute(CPU, bf16=False, compile=False), random_windows(32, CPU)
    torch.manual_seed(0)
    ours = stage1_idm_wm.Trainer(cfg, compute, windows, *stage1_networks(cfg, compute))
    torch.manual_seed(0)
    reference = stage1_idm_wm.Trainer(cfg, compute, windows, *reference_stage1_networks(cfg, compute))
    assert ours.world_model.fold_action != reference.world_model.fold_action
    torch.manual_seed(0)
    found = ours.update(0)
    torch.manual_seed(0)
    expected = reference.update(0)
    assert found.keys() == {"loss", "wm_loss", "vq_loss", "perplexity", "grad_norm"}
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value.item(), rel=1e-5), key


def test_both_paths_learn_and_are_compared_figure_by_figure(workplace, call_main):
    """A second seed is added to the first one's results."""
    options = ["--seed", "3", "--stage1.steps", "2", "--json", str(workplace.folder / "out.json")]
    done = workplace.run("same_learning.py", "--seeds", "1", *options)
    assert done.returncode == 0, done.stderr
    first = json.loads((workplace.folder / "out.json").read_text())["runs"]
    options += ["--config", str(workplace.config_file)]
    status, _, stderr = call_main(same_learning.main, *options, "--stage1.lr", "1e-4")
    assert status == 2
    assert "has other settings (stage1.lr: " in stderr
    status, stdout, stderr = call_main(same_learning.main, "--seeds", "2", *options)
    assert status == 0, stderr
    assert "seed 3" not in stdout
    runs = json.loads((workplace.folder / "out.json").read_text())["runs"]
    assert [(run["seed"], run["path"]) for run in runs] == [
        (3, "reference"),
        (3, "optimised"),
        (4, "reference"),
        (4, "optimised"),
    ]
    assert runs[:2] == first
    for reference, optimised in (runs[:2], runs[2:]):
        for key in ("wm_loss", "wm_loss_test"):  # in fp32 the paths differ by rounding alone
            assert optimised[key] == pytest.approx(reference[key], rel=1e-3)
    assert runs[0]["wm_loss"] != runs[2]["wm_loss"]
    assert not workplace.results.exists()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in stdout.splitlines() if "|" in line]
    assert [row[:2] for row in rows[2:6]] == [
        ["3", "reference"],
        ["3", "optimised"],
        ["4", "reference"],
        ["4", "optimised"],
    ]
    assert [row[0] for row in rows[8:]] == ["wm_loss", "wm_loss_test", "probe_acc_test"]


@pytest.mark.parametrize(("optimised", "inside"), [([0.3, 0.4], "yes"), ([0.1, 0.2], "no")])
def test_the_optimised_mean_is_compared_with_the_range_of_the_reference(optimised, inside):
    runs = [{"path": "reference", "wm_loss": x} for x in (0.2, 0.5)] + [
        {"path": "optimised", "wm_loss": x} for x in optimised
    ]
    (row,) = summary_table(runs).splitlines()[2:]
    mean = f"{sum(optimised) / 2:.4g}"
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["wm_loss", "0.35", "0.2 to 0.5", mean, inside]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "0"], "--seeds is 0; there must be at least 1"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: the folder nowhere does not exist"),
        (["--json", "."], "--json . is a folder; name a file in it"),
        (
            ["--json", "other.json", "--env", "mine"],
            "--json other.json holds no results of this script; name",
        ),
        (["--env", "bigfsh"], "'bigfsh' is"),
    ],
)
def test_mistakes_in_a_comparison_are_told_in_a_sentence(
    call_main, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("[1]")
    write_game(tmp_path / "mine")
    status, _, stderr = call_main(same_learning.main, "--data_dir", str(tmp_path), *arguments)
    assert status == 2
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: {sentence}")


def test_reference_networks_see_contiguous_images():
    conv = nn.Conv2d(3, 4, 3)
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert not conv(image).is_contiguous()
    assert contiguous(conv, CPU)(image).is_contiguous()


def test_the_reference_acting_policy_equals_ours_and_gives_its_trunk_gradients(workplace):
    cfg = workplace.config()

    def make(kind: type[TwoPathPolicy]) -> TwoPathPolicy:
        return kind(make_latent_policy(cfg), make_decoder(cfg, len(ACTIONS)), len(ACTIONS))

    ours, reference = make(TwoPathPolicy), make(ReferencePolicy)
    reference.load_state_dict(ours.state_dict())
    reference.requires_grad_(True)
    frames = torch.randint(256, (5, 64, 64, 3), dtype=torch.uint8)
    found, expected = reference(*reference.encode(frames)), ours(*ours.encode(frames))
    torch.testing.assert_close(found, expected)
    sum(x.sum() for x in found).backward()
    assert all(p.grad.any() for p in reference.trunk.parameters())
