"""Summarise a run in tables and figures: `python report.py --env coinrun --exp demo`.

Reads `<results_dir>/<exp>/<env>/seed<k>/` and adds to it

    summary.md       the tables printed here
    summary.json     the same numbers
    learning.png     stage 1: world-model error and probe accuracy during training
    latents.png      latent actions by true action, after training and before
    predictions.png  the world model's predictions, also under other latent actions
    returns.png      stage 3: returns of the policies, beside the random policy and the expert
    rl_curves.png    stage 3: returns during training in the modes with rewards

Missing stages are shown as missing; run it again when there are more.
"""

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from lapo.config import Config, load_config
from lapo.data.checks import check_data, check_frames
from lapo.errors import UserError, run_main
from lapo.games.table import GAMES
from lapo.modes import COMPARISONS, MODES
from lapo.reporting import figures
from lapo.reporting.inspection import Inspection
from lapo.reporting.summary import DOWNLOADED, StageOutput, read_outputs, summarize
from lapo.reporting.tables import table
from lapo.runs.checkpoints import inherit, saved_config
from lapo.runs.compute import Compute
from lapo.runs.files import atomic_write, write_json
from lapo.runs.ranks import require_single_process

NAMES = {
    "random": "random",
    **{mode: MODES[mode].title for mode in MODES},
    "expert": "expert",
}
"""Names of the policies, in the order in which they are shown."""


def main() -> None:
    """Report on the run that the command line names."""
    require_single_process("report.py")
    report(load_config(description=__doc__))


def report(cfg: Config) -> dict:
    """Write summary and figures of a run, print its tables; returns the summary as plain data.

    Raises `UserError` if the run has no stage to report on.
    """
    check_data(cfg.env, cfg.game_data)
    outputs = read_outputs(cfg)
    cfg = replace(cfg, visuals=next(iter(outputs.values())).checkpoint["config"]["visuals"])
    summary = summarize(cfg, outputs)
    text = to_markdown(summary)
    atomic_write(cfg.run_dir / "summary.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_json(cfg.run_dir / "summary.json", summary)
    for name, figure in draw(cfg, outputs, summary).items():
        atomic_write(cfg.run_dir / name, lambda path, figure=figure: figure.savefig(path, format="png"))
    print(f"\n{text}\nsummary and figures: {cfg.run_dir}")
    return summary


# ---------------------------------------------------------------- tables


def to_markdown(summary: dict) -> str:
    """The summary as tables."""
    parts = [
        f"# {summary['env']}, experiment {summary['exp']}, seed {summary['seed']}",
        "## Stages 1 and 2, evaluated on held-out frames",
        table(["metric", "LAPO", "for comparison"], learnt_rows(summary["learnt"])),
    ]
    parts += [f"**Warning**: {warning}." for warning in summary["warnings"]]
    parts += steering_parts(summary["steering"])
    if summary["returns"]:
        parts += [
            "## Mean returns on held-out levels, ± standard error",
            table(
                ["policy", "trained on", "return", "relative", "episodes"], return_rows(summary["returns"])
            ),
            relative_note(summary["env"], summary["returns"]),
        ]
        if summary["returns"].get("expert", {}).get("source", "").startswith(DOWNLOADED):
            parts[-1] += " The expert of this run's frames is another one, which earns another return."
    stages = [
        stage_row(stage, progress)
        for stage, progress in summary["stages"].items()
        if progress or stage.removeprefix("stage3_") not in COMPARISONS
    ]
    parts += ["## Stages", table(["stage", "steps", "time", "state"], stages)]
    return "\n\n".join(parts) + "\n"


def relative_note(env: str, returns: dict[str, dict]) -> str:
    """What relative returns refer to."""
    if any(row["relative_return"] is None for row in returns.values()):
        return f"Relative returns are left out: {env} has no reference returns."
    expert = "the published expert frames" if env in GAMES else f"the expert that {env} names"
    return f"Relative: 0 is the random policy's mean return, 1 that of {expert}."


def learnt_rows(learnt: dict) -> list[list[str]]:
    """A row for each metric of stages 1 and 2."""

    def error(key: str) -> str:
        return f"{learnt[key]:#.3g}"

    rows = []
    if learnt["wm_loss_ratio"] is not None:
        ratio = f"{error('copy_loss')} repeating the last frame (ratio {learnt['wm_loss_ratio']:.2f})"
        rows.append(["world model's squared error", error("wm_loss"), ratio])
    if learnt["probe_acc"] is not None:
        majority, untrained = (f"{learnt[key]:.1%}" for key in ("majority_acc", "untrained_probe_acc"))
        chance = f"{majority} commonest action, {untrained} from the untrained IDM's"
        rows.append(["true action predicted from the latent one", f"{learnt['probe_acc']:.1%}", chance])
    if learnt["perplexity"] is not None:
        rows.append(["codes in use (perplexity)", f"{learnt['perplexity']:.1f}", f"{learnt['codes']} codes"])
    if learnt["policy_loss"] is not None:
        constant = f"{error('constant_loss')} predicting the mean latent action"
        rows.append(["latent policy's squared error", error("policy_loss"), constant])
    return rows or [["", "nothing measured yet", ""]]


def steering_parts(steering: dict) -> list[str]:
    """Tables of how well latent actions steer the world model; none if it was not measured."""
    if not steering:
        return []
    heads = ["steps", "inferred latents", "repeating o[t]", "ΔPSNR: lost under other latents"]
    keys = ("psnr", "copy_psnr", "delta_psnr")
    rows = [
        [str(row["steps"]), *("" if row[key] is None else f"{row[key]:.2f}" for key in keys)]
        for row in steering["open_loop"]
    ]
    parts = ["## Steering the world model: PSNR of its rollouts, in dB", table(heads, rows)]
    if steering["read_back"]:
        heads = ["true action", "read back from predictions", "from true frames"]
        rows = [
            [row["action"], f"{row['accuracy']:.1%}", f"{row['ceiling']:.1%}"]
            for row in steering["read_back"]
        ]
        chance = f"Chance: {steering['chance']:.1%}."
        parts += ["## Actions read back from its predictions under their latent actions"]
        parts += [table(heads, rows), chance]
    return parts


def return_rows(returns: dict[str, dict]) -> list[list[str]]:
    """A row for each policy, including missing ones."""
    rows = []
    for policy in NAMES:
        row = returns.get(policy)
        if row is None:
            rows += [] if policy in COMPARISONS else [[NAMES[policy], "", "missing", "", ""]]
            continue
        relative = row["relative_return"]
        error = "" if row["return_stderr"] is None else f" ± {row['return_stderr']:.2f}"
        rows.append(
            [
                NAMES[policy],
                row["source"],
                f"{row['return_mean']:.2f}{error}",
                "" if relative is None else f"{round(relative, 2) + 0.0:.2f}",  # no -0.00
                str(row["episodes"] or ""),
            ]
        )
    return rows


def stage_row(stage: str, progress: dict | None) -> list[str]:
    """The row of a stage; `progress` is None if it has no checkpoint."""
    if progress is None:
        return [stage, "", "", "missing"]
    minutes, seconds = divmod(progress["seconds"], 60)
    state = "finished" if progress["finished"] else "unfinished"
    if progress["stale"]:
        state += f", but trained on another {' and '.join(progress['stale'])}"
    return [stage, f"{progress['steps']:,}", f"{minutes} min {seconds:02} s", state]


# ---------------------------------------------------------------- figures


def draw(cfg: Config, outputs: dict[str, StageOutput], summary: dict) -> dict[str, Figure]:
    """The figures that the stages' outputs allow, by file name."""
    drawn = {}
    if stage1 := outputs.get("stage1"):
        title = learning_title(cfg.env, summary["learnt"])
        drawn["learning.png"] = figures.learning(stage1.lines, stage1.metrics, title)
        try:
            drawn |= draw_inspection(cfg, stage1)
        except UserError as error:  # the data may have gone since
            print(f"latents.png and predictions.png are left out: {error}")
    if rows := summary["returns"]:
        bars = [
            figures.Bar(policy, bar_label(policy, row), row["return_mean"], row["return_stderr"])
            for policy, row in rows.items()
        ]
        title = f"{cfg.env}: mean return on held-out levels, with its standard error"
        drawn["returns.png"] = figures.returns(bars, title)
    stages = {mode: outputs.get(f"stage3_{mode}") for mode in reversed(MODES) if MODES[mode].plays}
    curves = {mode: with_final_return(output) for mode, output in stages.items() if output}
    if any("train_return" in line for lines in curves.values() for line in lines):
        levels = {policy: rows[policy]["return_mean"] for policy in ("random", "expert") if rows}
        title = f"{cfg.env}: returns while learning from rewards"
        drawn["rl_curves.png"] = figures.rl_curves(curves, NAMES, levels, title)
    return drawn


def with_final_return(output: StageOutput) -> list[dict]:
    """A mode's lines of metrics and, if it was evaluated on the way, a line of its final evaluation."""
    if "eval_return_mean" not in output.metrics or "return_mean" not in output.metrics:
        return output.lines
    final = {"step": output.progress()["steps"], "eval_return_mean": output.metrics["return_mean"]}
    return [*output.lines, final]


def learning_title(env: str, learnt: dict) -> str:
    """Title of the figure of stage 1, with its final numbers."""
    title = f"{env}, stage 1"
    if learnt["wm_loss_ratio"] is not None:
        title += (
            f": the world model's error is {learnt['wm_loss_ratio']:.2f} of that of repeating the last frame"
        )
    if learnt["probe_acc"] is not None:
        title += (
            f"\na probe predicts {learnt['probe_acc']:.0%} of the true actions from the latent ones;"
            f" the commonest action alone makes up {learnt['majority_acc']:.0%}"
        )
    return title


def bar_label(policy: str, row: dict) -> str:
    """Name of a policy, and below it the data that it was trained on."""
    return NAMES[policy] + "\n" + row["source"].replace(", ", "\n")


def draw_inspection(cfg: Config, stage1: StageOutput) -> dict[str, Figure]:
    """The figures that need the networks of stage 1. Raises `UserError` if the data cannot be read."""
    cfg = inherit(cfg, stage1.checkpoint, ("idm_scale", "wm_width"))
    check_frames(cfg.env, cfg.game_data, cfg.visuals)
    compute = Compute.from_config(replace(cfg, precision=saved_config(stage1.checkpoint).precision))
    inspection = Inspection(cfg, stage1.checkpoint["state"], compute)
    drawn, counterfactuals = {}, []
    if len(inspection.actions) > 1:
        views, ta = inspection.latent_projections()
        title = (
            f"{cfg.env}: latent actions of held-out steps, and the true actions predicted from them"
            f"\n(the commonest action alone makes up {np.bincount(ta).max() / len(ta):.0%})"
        )
        drawn["latents.png"] = figures.latents(views, ta, inspection.names, title)
        counterfactuals = inspection.counterfactuals()
    title = f"{cfg.env}: predictions of the world model"
    if counterfactuals:
        title += ", also under other latent actions"
    drawn["predictions.png"] = figures.predictions(inspection.predictions(), counterfactuals, title)
    return drawn


if __name__ == "__main__":
    run_main(main)
