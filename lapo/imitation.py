"""The modes of stage 3 that learn from labelled frames, without rewards. All see the same N labels.

    offline        a decoder la → ta on the frozen latent policy
    bc             a policy from random weights, by behaviour cloning
    idm_labelling  the labels teach an IDM, which labels all frames, for behaviour cloning (Baker et al. 2022)
    lapo_plus      the same with a decoder on the latents of stage 1's IDM (LAPO+, arXiv 2602.02762)

Dimensions: N labelled windows · M windows · B batch · A actions
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lapo.config import Config
from lapo.data.checks import action_names, check_frames
from lapo.data.chunks import num_chunks_for
from lapo.data_loader import INFERENCE_BATCH, Shared, Windows, read_splits
from lapo.decoding import Fit
from lapo.errors import UserError
from lapo.games.make import can_be_played, env_spec
from lapo.models import (
    infer_latents,
    make_acting_policy,
    make_decoder,
    make_idm,
    make_supervised_idm,
    restore,
    stack_frames,
)
from lapo.runs.compute import Compute
from lapo.runs.run import Run


def offline(cfg: Config, compute: Compute, run: Run, earlier: dict, shared: Shared) -> nn.Module:
    """Train a decoder on the pairs (la, ta) of the labelled frames; it acts on the frozen latent policy."""
    windows, ids, ta = labelled(cfg, compute, shared)
    idm = restore(make_idm(cfg), earlier["stage1"]["idm"], compute)
    la = infer_latents(idm, windows.iter_frames(ids), compute)
    num_actions = choices(cfg)
    policy = compute.place(make_acting_policy(cfg, "offline", num_actions, earlier["stage2"]["policy"]))
    fit = Fit(lambda batch: policy.decoder(la[batch]), policy.decoder, ta, cfg.offline.lr)
    train_on_labels(cfg, compute, run, policy, fit, shared)
    return policy


def bc(cfg: Config, compute: Compute, run: Run, earlier: dict, shared: Shared) -> nn.Module:
    """Train the policy network from random weights on the pairs (frame, ta) of the labelled frames."""
    windows, ids, ta = labelled(cfg, compute, shared)
    policy = compute.place(make_acting_policy(cfg, "bc", choices(cfg)))

    def predict(batch: Tensor) -> Tensor:
        with compute.autocast():
            return policy.logits(windows.current_frames(ids[batch]))

    train_on_labels(cfg, compute, run, policy, Fit(predict, policy, ta, cfg.offline.lr), shared)
    return policy


def idm_labelling(cfg: Config, compute: Compute, run: Run, earlier: dict, shared: Shared) -> nn.Module:
    """Train an IDM on the labelled windows; clone the actions that it infers for all windows."""
    windows, ids, ta = labelled(cfg, compute, shared)
    idm = compute.place(make_supervised_idm(cfg, choices(cfg)))

    def predict(frames: Tensor) -> Tensor:
        with compute.autocast():
            return idm(stack_frames(frames))

    def label(windows: Windows) -> Tensor:
        return torch.cat([predict(frames).argmax(-1) for frames in windows.iter_frames(windows.all())])

    fit = Fit(lambda batch: predict(windows.gather(ids[batch])), idm, ta, cfg.relabel.lr)
    size = min(cfg.relabel.batch_size, len(ta))
    return clone_labels(cfg, compute, run, fit, cfg.relabel.idm_steps, size, label, shared)


def lapo_plus(cfg: Config, compute: Compute, run: Run, earlier: dict, shared: Shared) -> nn.Module:
    """Train a decoder on the latents of the labelled windows; clone what it decodes for all windows."""
    windows, ids, ta = labelled(cfg, compute, shared)
    idm = restore(make_idm(cfg), earlier["stage1"]["idm"], compute)
    la = infer_latents(idm, windows.iter_frames(ids), compute)
    decoder = compute.place(make_decoder(cfg, choices(cfg)))

    def label(windows: Windows) -> Tensor:
        frames = windows.iter_frames(windows.all())
        la = shared.get("latents", lambda: infer_latents(idm, frames, compute))
        return torch.cat([decoder(part).argmax(-1) for part in la.split(INFERENCE_BATCH)])

    fit = Fit(lambda batch: decoder(la[batch]), decoder, ta, cfg.offline.lr)
    size = min(cfg.offline.batch_size, len(ta))
    return clone_labels(cfg, compute, run, fit, cfg.offline.steps, size, label, shared)


def clone_labels(
    cfg: Config,
    compute: Compute,
    run: Run,
    teacher: Fit,
    teacher_steps: int,
    teacher_batch: int,
    label: Callable[[Windows], Tensor],
    shared: Shared,
) -> nn.Module:
    """Train `teacher` on the labels, then a policy on the actions (M,) that `label` gives to all windows.

    Logs the losses of both, the accuracy of these actions where true ones are known, and the policy's on
    held-out frames. Returns the policy.
    """
    policy = compute.place(make_acting_policy(cfg, cfg.stage3.mode, choices(cfg)))
    windows, _ = shared.get("splits", lambda: read_splits(cfg, compute.device))
    clone: Fit | None = None

    def predict(ids: Tensor) -> Tensor:
        with compute.autocast():
            return policy.logits(windows.current_frames(ids))

    def start() -> Fit:
        with torch.no_grad():
            return Fit(predict, policy, label(windows), cfg.relabel.lr)

    def state() -> dict:
        return {
            "order": windows.data_order,
            "policy": policy.state_dict(),
            "teacher": teacher.network.state_dict(),
            "fit": teacher.state_dict(),
            "clone": clone.state_dict() if clone else None,
        }

    if run.state:
        windows.check_data_order(run.state["order"])
        policy.load_state_dict(run.state["policy"])
        teacher.network.load_state_dict(run.state["teacher"])
        teacher.load_state_dict(run.state["fit"])
        if run.state["clone"]:
            clone = start()
            clone.load_state_dict(run.state["clone"])
    total = teacher_steps + cfg.relabel.policy_steps
    for step in run.loop(total, state, save_every=cfg.relabel.save_every, unit="step"):
        if step < teacher_steps:
            teacher.step(torch.randperm(len(teacher.ta), device=teacher.ta.device)[:teacher_batch])
        else:
            clone = clone or start()
            clone.step(windows.batch(step - teacher_steps, cfg.relabel.batch_size, cfg.seed))
    results = {"teacher_loss": teacher.loss, "loss": clone.loss}
    if windows.ta is not None:  # a chunk without true actions may lie behind those that the labels are of
        known = windows.labelled()
        results["label_acc"] = (clone.ta[known] == windows.actions(known)).float().mean()
    run.log(total, results | accuracy(policy, cfg, compute, shared))
    return policy


# ---------------------------------------------------------------- labels


def labelled(cfg: Config, compute: Compute, shared: Shared) -> tuple[Windows, Tensor, Tensor]:
    """Draw `cfg.offline.labels` labelled frames: all windows, indices (N,) of those drawn, true actions (N,).

    If it is 0, all are drawn. Only as many chunks are read as hold four times as many frames as labels.
    Raises `UserError` if the data has no true actions, too few windows, or actions outside the policy's
    action space.
    """
    folder, count = cfg.game_data / "train", cfg.offline.labels
    check_frames(cfg.env, cfg.game_data, cfg.visuals)
    limit = None  # labels made by hand may lie anywhere
    if action_names(cfg.game_data) is None:
        frames = 4 * count or sys.maxsize
        limit = num_chunks_for(folder, frames, cfg.data.skip_bad_chunks)
    windows = shared.get("train", lambda: Windows.read(cfg, "train", compute.device, limit=limit), key=limit)
    if windows.ta is None:
        lacking = f"{folder} holds no"
        if len(windows.unlabelled) < windows.num_chunks:
            lacking = f"{folder}: {windows.describe_unlabelled()} the"
        raise UserError(
            f"{lacking} true actions `ta`, which mode {cfg.stage3.mode} learns from; import them with"
            " `import_video.py --actions`, or add them to its chunks, see docs/data.md"
        )
    num_actions = choices(cfg)
    if windows.ta.max() >= num_actions:
        raise UserError(
            f"{folder} holds true actions up to {windows.ta.max()}, but policies of stage 3 choose among"
            f" {num_actions}; number them from 0 to {num_actions - 1}"
        )
    known = windows.labelled()
    if len(known) < count:
        what = "labelled windows" if windows.has_gaps else "windows"
        key = "a number in offline.sweep" if count in cfg.offline.sweep else "offline.labels"
        raise UserError(f"{key} is {count}, but {folder} has {len(known)} {what}; lower it")
    generator = torch.Generator().manual_seed(cfg.seed)
    ids = known[torch.randperm(len(known), generator=generator)[: count or None].to(compute.device)]
    return windows, ids, windows.actions(ids)


def choices(cfg: Config) -> int:
    """How many actions the policy chooses among: those named in the data set, or the game's."""
    names = None if can_be_played(cfg.env) else action_names(cfg.game_data)
    return len(names) if names else env_spec(cfg.env).num_actions


def train_on_labels(
    cfg: Config, compute: Compute, run: Run, policy: nn.Module, fit: Fit, shared: Shared
) -> None:
    """Train `policy` or a part of it with `fit` for `cfg.offline.steps` steps; log loss and accuracy."""
    if run.state:
        policy.load_state_dict(run.state["policy"])
        fit.load_state_dict(run.state["fit"])
    size, steps = min(cfg.offline.batch_size, len(fit.ta)), cfg.offline.steps

    def state() -> dict:
        return {"policy": policy.state_dict(), "fit": fit.state_dict()}

    for _ in run.loop(steps, state, save_every=steps, unit="step"):
        fit.step(torch.randperm(len(fit.ta), device=fit.ta.device)[:size])
    run.log(steps, {"loss": fit.loss} | accuracy(policy, cfg, compute, shared))


def accuracy(policy: nn.Module, cfg: Config, compute: Compute, shared: Shared) -> dict[str, Tensor]:
    """How often `policy`, and the commonest action, equal the expert's action on held-out frames.

    Returns {} if there are no held-out frames with actions.
    """
    if not (cfg.game_data / "test").is_dir():
        return {}
    test = shared.get("test", lambda: Windows.read(cfg, "test", compute.device))
    if test.ta is None:
        return {}
    known = test.labelled()
    with torch.no_grad(), compute.autocast():
        predicted = [
            policy.logits(test.current_frames(ids)).argmax(-1) for ids in known.split(INFERENCE_BATCH)
        ]
    ta = test.actions(known)
    return {
        "action_acc_test": (torch.cat(predicted) == ta).float().mean(),
        "majority_acc_test": (ta == ta.bincount().argmax()).float().mean(),
    }
