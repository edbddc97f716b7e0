"""A resumed run equals an uninterrupted one; a finished run is left as it is."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from functools import partial
from multiprocessing import forkserver
from typing import Any
from unittest.mock import Mock

import pytest

from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from lapo.errors import UserError, run_main
from support import INTERRUPTIONS, PATIENCE, ROOT, Workplace, contents, result, save_half

STAGES = {
    "stage1": (stage1_idm_wm, []),
    "stage2": (stage2_bc, []),
    "stage3_online": (stage3_decode, ["--stage3.mode", "online"]),
    "stage3_scratch": (stage3_decode, ["--stage3.mode", "scratch"]),
}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_finished_run_says_so_and_changes_nothing(trained, capsys, stage):
    before = contents(trained.results)
    STAGES[stage][0].train(trained.config())
    out = capsys.readouterr().out
    assert "finished already\n" in out
    assert out.endswith(f"{stage} done: {trained.run_dir(stage) / 'checkpoint.pt'}\n")
    assert contents(trained.results) == before


@pytest.mark.parametrize(
    ("stage", "change", "line"),
    [
        ("stage1", ["--stage1.lr", "0.5"], "stage1.lr: 0.0003 → 0.5"),
        ("stage1", ["--vq.start", "data"], "vq.start: published → data"),
        ("stage1", ["--data.skip_resets", "false"], "data.skip_resets: True → False"),
        ("stage2", ["--stage2.steps", "9"], "stage2.steps: 8 → 9"),
        ("stage2", ["--precision", "bf16"], "precision: fp32 → bf16"),
    ],
)
def test_a_run_with_other_settings_is_refused_with_the_difference_and_two_ways_out(
    trained, stage, change, line
):
    before = contents(trained.results)
    folder = trained.run_dir(stage)
    with pytest.raises(UserError) as error:
        STAGES[stage][0].train(trained.config(*change))
    message = f"{folder} was trained with other settings ({line}); choose another --exp, or delete {folder}"
    assert str(error.value) == message
    assert contents(trained.results) == before


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_finished_run_needs_no_data_any_more(trained, tmp_path, capsys, stage):
    STAGES[stage][0].train(trained.config("--data_dir", str(tmp_path / "gone")))
    assert "finished already" in capsys.readouterr().out


def test_settings_that_a_stage_does_not_read_and_the_place_of_the_data_may_change(trained, tmp_path, capsys):
    shutil.copytree(trained.data, tmp_path / "moved")
    arguments = ["--data_dir", str(tmp_path / "moved"), "--stage3.steps", "5", "--device", "auto"]
    stage1_idm_wm.train(trained.config(*arguments))
    assert "finished already" in capsys.readouterr().out


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.BaseContext:
    """Makes processes that have everything imported, so that many can be started and killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    process = context.Process(target=abs, args=(0,))
    process.start()
    process.join()  # now the server has imported what there is to import
    return context


LONGER = [
    *(f"--stage1.steps={4 * INTERRUPTIONS}", "--stage1.save_every=2"),
    *(f"--stage2.steps={4 * INTERRUPTIONS}", "--stage2.save_every=2"),
    *(f"--stage3.steps={64 * INTERRUPTIONS}", "--stage3.save_every=1"),
]


SAVE = "checkpoint.pt.part"
"""The file that is there during a save, and stays if the process is killed then."""


class Command:
    """A stage's command as experiment `exp`, run in processes of its own until it has finished."""

    def __init__(self, workplace: Workplace, stage: str, exp: str):
        module, arguments = STAGES[stage]
        self.main = partial(module.train, workplace.config("--exp", exp, *LONGER, *arguments))
        self.folder = workplace.run_dir(stage, exp)
        workplace.branch(exp, *(earlier for earlier in ("stage1", "stage2") if earlier < stage))

    def run(
        self,
        server: multiprocessing.context.BaseContext,
        stop: str = "",
        times: int = 0,
        duration: float = 0.0,
    ) -> tuple[list[int], int]:
        """Run again and again; the first `times` processes are stopped by `kill` or `terminate`: during a
        save, soon after one, or soon after the start of a run that takes `duration` seconds.

        A process that is killed during a save waits for it; any other may have finished before it is stopped,
        where the machine is busy. Returns the exit codes, and how many saves were broken off.
        """
        moments = random.Random(self.folder.name)
        files = [SAVE, "config.yaml", SAVE, "checkpoint.pt"]  # every start writes the configuration
        codes, broken = [], 0
        while 0 not in codes:
            before = self.written()
            file = files[len(codes) % len(files)] if len(codes) < times else None
            main = partial(save_half, self.main) if file == SAVE and stop == "kill" else self.main
            process = server.Process(target=run_main, args=(main,))
            process.start()
            if file:
                while process.is_alive() and self.written().get(file) in (None, before.get(file)):
                    time.sleep(0.001)
                if file != SAVE:
                    process.join(moments.uniform(0, duration / (2 * INTERRUPTIONS)))
                getattr(process, stop)()
            process.join(PATIENCE)
            assert process.exitcode is not None, "it takes too long"
            codes.append(process.exitcode)
            broken += self.written().get(SAVE) not in (None, before.get(SAVE))
        return codes, broken

    def written(self) -> dict[str, int]:
        """When each of the run's files was put in place."""
        with contextlib.suppress(FileNotFoundError):  # of a temporary file, between the listing and the look
            return {path.name: path.stat().st_mtime_ns for path in self.folder.glob("*")}
        return self.written()

    def result(self) -> dict[str, Any]:
        """See the function of this name."""
        return result(self.folder)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stopped_at_random_moments_ends_as_an_uninterrupted_one(trained, server, stage):
    """Bit for bit: all tensors of the final checkpoint, and all lines of metrics."""
    whole = Command(trained, stage, f"{stage}-whole")
    started = time.monotonic()
    assert whole.run(server) == ([0], 0)
    duration = time.monotonic() - started

    for stop, code, times in (
        ("kill", -signal.SIGKILL, INTERRUPTIONS),
        ("terminate", 128 + signal.SIGTERM, INTERRUPTIONS // 2 + 1),
    ):
        command = Command(trained, stage, f"{stage}-{stop}")
        codes, broken = command.run(server, stop, times, duration)
        print(f"{stage}: {len(codes) - 1} times {stop}, {broken} of them during a save")
        assert set(codes[:-1]) <= {code}
        assert broken or stop == "terminate"
        assert command.result() == whole.result()


@pytest.mark.parametrize("mode", ["bc", "scratch"])
def test_a_run_stopped_during_its_evaluation_ends_as_an_uninterrupted_one(trained, monkeypatch, mode):
    arguments = ["--stage3.mode", mode, "--stage3.steps", "64"]
    whole, stopped = f"evaluated-{mode}", f"stopped-{mode}"
    stage3_decode.train(trained.config("--exp", whole, *arguments))
    with monkeypatch.context() as patch:
        patch.setattr(stage3_decode, "evaluate_policy", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage3_decode.train(trained.config("--exp", stopped, *arguments))
    stage3_decode.train(trained.config("--exp", stopped, *arguments))
    stage = f"stage3_{mode}"
    assert result(trained.run_dir(stage, stopped)) == result(trained.run_dir(stage, whole))
