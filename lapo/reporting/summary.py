"""Metrics and returns of a run, read from its folder, with those of the random policy and the expert."""

import contextlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from lapo.acting import evaluate_actor, random_actor
from lapo.config import Config, to_dict
from lapo.data.checks import name_action
from lapo.errors import UserError
from lapo.games.make import env_spec, relative_return
from lapo.games.table import GAMES
from lapo.modes import MODES
from lapo.probe import find_failures
from lapo.runs.checkpoints import changed_inputs, load_checkpoint, saved_config, weights_checksum
from lapo.runs.files import reading
from lapo.steering import HORIZONS

STAGES = ("stage1", "stage2", *(f"stage3_{mode}" for mode in MODES))
DOWNLOADED = "downloaded frames"
"""What `setup_data.sh --source huggingface` has made: frames of other experts than the published ones."""


def read_outputs(cfg: Config) -> dict[str, "StageOutput"]:
    """The outputs of all stages of a run that have a checkpoint.

    Raises `UserError` if there is none, or if one is damaged.
    """
    outputs = {stage: StageOutput.read(cfg.stage_dir(stage)) for stage in STAGES}
    outputs = {stage: output for stage, output in outputs.items() if output}
    if not outputs:
        raise UserError(
            f"{cfg.run_dir} has no stage to report on; the first is made with"
            f" `python stage1.py --env {cfg.env} --exp {cfg.exp} --seed {cfg.seed}`"
        )
    return outputs


def summarize(cfg: Config, outputs: dict[str, "StageOutput"]) -> dict:
    """All numbers of a report."""
    return {
        "env": cfg.env,
        "exp": cfg.exp,
        "seed": cfg.seed,
        "stages": stages(outputs),
        "learnt": stage_metrics(outputs),
        "steering": steering(cfg, outputs),
        "warnings": stage1_warnings(outputs),
        "returns": returns(cfg, outputs),
        "visuals": cfg.visuals,
        "eval": to_dict(cfg.eval),
    }


def stages(outputs: dict[str, "StageOutput"]) -> dict[str, dict | None]:
    """Progress of every stage, see `StageOutput.progress`, and which of the stages below it are `stale`."""
    weights = {stage: weights_checksum(outputs[stage].checkpoint) for stage in STAGES[:2] if stage in outputs}
    return {
        stage: output.progress() | {"stale": changed_inputs(output.checkpoint, weights)}
        if (output := outputs.get(stage))
        else None
        for stage in STAGES
    }


@dataclass(frozen=True)
class StageOutput:
    """The checkpoint and metrics of one stage."""

    checkpoint: dict
    lines: list[dict]
    """Of metrics.jsonl."""

    @classmethod
    def read(cls, folder: Path) -> "StageOutput | None":
        """The output of the stage in `folder`, None if there is no checkpoint.

        Raises `UserError` if something is damaged or unreadable.
        """
        path, lines = folder / "metrics.jsonl", []
        with reading(folder):
            if not (folder / "checkpoint.pt").exists():
                return None
        with reading(path):
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed run may be cut short
                lines.append(json.loads(line))
        return cls(load_checkpoint(folder / "checkpoint.pt"), lines)

    @property
    def metrics(self) -> dict[str, float]:
        """Latest value of every metric."""
        return self.checkpoint["metrics"]

    def progress(self) -> dict:
        """Steps so far (env steps in the modes with rewards), whether the stage is finished, and its time."""
        seconds, previous = 0.0, 0.0
        for line in self.lines:  # older versions counted from 0 again in a resumed run
            seconds += line["seconds"] - (previous if line["seconds"] >= previous else 0)
            previous = line["seconds"]
        # Those of the checkpoint include evaluations and sweeps; older ones have none.
        seconds = self.checkpoint.get("seconds", seconds)
        steps = self.lines[-1]["step"] if self.lines else 0
        return {"steps": steps, "finished": self.checkpoint["finished"], "seconds": round(seconds)}


def stage_metrics(outputs: dict[str, StageOutput]) -> dict[str, float | None]:
    """Metrics of stages 1 and 2 on held-out frames; None where there is none."""
    stage1, stage2 = (outputs[stage].metrics if stage in outputs else {} for stage in STAGES[:2])
    vq = saved_config(outputs["stage1"].checkpoint).vq if stage1 else None
    error, copying = stage1.get("wm_loss_test"), stage1.get("copy_loss_test")
    return {
        "wm_loss": error,
        "copy_loss": copying,
        "wm_loss_ratio": error / copying if copying else None,
        "probe_acc": stage1.get("probe_acc_test"),
        "majority_acc": stage1.get("majority_acc_test"),
        "untrained_probe_acc": stage1.get("untrained_probe_acc_test"),
        "perplexity": stage1.get("perplexity") if vq and vq.enabled else None,
        "codes": vq.num_codes if vq else None,
        "policy_loss": stage2.get("loss_test"),
        "constant_loss": stage2.get("constant_loss_test"),
    }


def steering(cfg: Config, outputs: dict[str, StageOutput]) -> dict:
    """How well latent actions steer the world model, see steering.py; {} if stage 1 has not measured it.

    `open_loop` has a row per horizon, PSNR in dB; `read_back` a row per true action and one of the mean.
    """
    metrics = outputs["stage1"].metrics if "stage1" in outputs else {}
    open_loop = [
        {
            "steps": steps,
            "psnr": metrics[f"psnr_{steps}"],
            "copy_psnr": metrics[f"copy_psnr_{steps}"],
            "delta_psnr": metrics.get(f"delta_psnr_{steps}"),
        }
        for steps in HORIZONS
        if f"psnr_{steps}" in metrics
    ]
    if not open_loop:
        return {}
    read = [int(key.rpartition("_")[2]) for key in metrics if re.fullmatch(r"readback_acc_\d+", key)]
    rows = [(name_action(cfg, action), f"_{action}") for action in sorted(read)] + [("mean", "")] * bool(read)
    read_back = [
        {
            "action": name,
            "accuracy": metrics[f"readback_acc{key}"],
            "ceiling": metrics[f"readback_ceiling{key}"],
        }
        for name, key in rows
    ]
    return {"open_loop": open_loop, "read_back": read_back, "chance": metrics.get("readback_chance")}


def stage1_warnings(outputs: dict[str, StageOutput]) -> list[str]:
    """Signs that stage 1 failed, see `probe.find_failures`; none before it is finished."""
    stage1 = outputs.get("stage1")
    if not stage1 or not stage1.checkpoint["finished"]:
        return []
    return find_failures(stage1.metrics, saved_config(stage1.checkpoint).vq)


def returns(cfg: Config, outputs: dict[str, StageOutput]) -> dict[str, dict]:
    """Returns on held-out levels of the policies evaluated so far, the random policy and the expert.

    Empty if no policy has been evaluated.
    """
    rows = {}
    for mode in MODES:
        output = outputs.get(f"stage3_{mode}")
        if output and "return_mean" in output.metrics:
            draws = draws_of_labels(output)
            source = training_source(mode, output) + (f", {len(draws)} draws" if len(draws) > 1 else "")
            rows[mode] = result(cfg, output.metrics | over_draws(draws), source)
    if not rows:
        return {}
    rows = {"random": random_return(cfg), **rows, "expert": expert_return(cfg)}
    return {policy: row for policy, row in rows.items() if row}


def draws_of_labels(output: StageOutput) -> list[dict]:
    """A sweep's results for the run's own number of labels, one per draw of labels; [] without a sweep."""
    labels = output.checkpoint["config"]["offline"]["labels"]
    sweep = output.metrics.get("sweep", ())
    return [
        found
        for found in sweep
        if found["labels"] == labels and not found.get("all") and "return_mean" in found
    ]


def over_draws(draws: list[dict]) -> dict:
    """Mean return of several draws of labels, with its error, see `error_of_draws`; {} for one draw."""
    if len(draws) < 2:
        return {}
    means = [found["return_mean"] for found in draws]
    return {
        "return_mean": mean(means),
        "return_stderr": error_of_draws(means, [found.get("return_stderr") for found in draws]),
        "episodes": sum(found["episodes"] for found in draws),
    }


def error_of_draws(means: list[float], errors: list[float | None]) -> float | None:
    """Standard error of a seed's mean over draws of labels: over its episodes or, if greater, over the draws.

    Takes the draws' mean returns and their standard errors over episodes, which may be unknown (None or NaN).
    """
    known = [error for error in map(number, errors) if error is not None]
    found = [math.hypot(*known) / len(known)] if len(known) == len(means) else []
    if len(means) > 1:
        found.append(stdev(means) / math.sqrt(len(means)))
    return max(found, default=None)


def number(value: float | None) -> float | None:
    """`value`, None if it is NaN."""
    return None if value is None or math.isnan(value) else value


def result(cfg: Config, metrics: dict, source: str) -> dict:
    """One policy's row: return, standard error, episodes, and the data that it was trained on."""
    value, stderr = metrics["return_mean"], metrics["return_stderr"]
    return {
        "source": source,
        "return_mean": value,
        "return_stderr": number(stderr),
        "relative_return": relative_return(cfg.env, value),
        "episodes": metrics["episodes"],
    }


def training_source(mode: str, output: StageOutput) -> str:
    """The data that the policy of a mode of stage 3 was trained on, in words."""
    labels = f"{output.checkpoint['config']['offline']['labels']:,} labels"
    rewards = f"{output.progress()['steps']:,} env steps"
    frames = "frames" in MODES[mode].learns_from
    return "frames, " * frames + (rewards if MODES[mode].plays else labels)


def random_return(cfg: Config) -> dict:
    """The random policy's row: that of the last summary if it has the same settings, else played now."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        last = json.loads((cfg.run_dir / "summary.json").read_text(encoding="utf-8"))
        if (last["eval"], last["visuals"]) == (to_dict(cfg.eval), cfg.visuals):
            return last["returns"]["random"]
    print(f"the random policy plays {cfg.eval.episodes} episodes")
    act = random_actor(cfg.seed, env_spec(cfg.env).num_actions)
    played = evaluate_actor(act, cfg.env, cfg.visuals, cfg.eval, cfg.seed)
    metrics = {"return_mean": played.mean, "return_stderr": played.stderr, "episodes": played.episodes}
    return result(cfg, metrics, source="uniform actions")


def expert_return(cfg: Config) -> dict | None:
    """The expert's row: that of recorded or downloaded frames, else that of the reference returns."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        recording = json.loads((cfg.game_data / "dataset.json").read_text(encoding="utf-8"))
        played = recording["train"]
        metrics = {
            "return_mean": float(played["mean_return"]),
            "return_stderr": played["standard_error"],
            "episodes": played["episodes"],
        }
        origin = DOWNLOADED if recording.get("source") == "huggingface" else "recorded frames"
        return result(cfg, metrics, source=f"{origin}, {recording['expert']}")
    references = env_spec(cfg.env).reference_returns
    if references is None:
        return None
    metrics = {"return_mean": references[1], "return_stderr": None, "episodes": None}
    return result(cfg, metrics, source="published frames" if cfg.env in GAMES else "reference")
