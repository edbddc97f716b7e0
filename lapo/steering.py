"""How well latent actions steer the world model, measured once, at the end of stage 1.

Dimensions
    S sequences of K steps, or states · B batch of them · A actions · D size of a latent action
    P frames that the world model sees · C, H, W image

Three measures, on held-out frames:

- Open loop: PSNR of a rollout under the latent actions inferred from the true frames, each prediction an
  input of the next, beside the PSNR of repeating o[t].
- ΔPSNR (Bruce et al. 2024, "Genie"): by how much the PSNR of such a rollout exceeds that under the latent
  actions of other sequences.
- Action read-back: the world model predicts o[t+1] under a typical latent action of each true action; IDM and
  probe predict from o[t-1], o[t] and the prediction which action was taken.
"""

import torch
from torch import Tensor

from lapo.config import ProbeConfig
from lapo.data_loader import Windows
from lapo.frames import CHANNELS
from lapo.models import IDM, WorldModel, eval_mode, split_window, stack_frames
from lapo.probe import fit_probe
from lapo.runs.compute import Compute

HORIZONS = (1, 2, 4, 8, 16)
"""Steps after which the PSNR of a rollout is measured."""
SHUFFLED_HORIZONS = (1, 4)
"""Steps after which the ΔPSNR is measured."""
MAX_SAMPLES = 1024
WINDOWS_PER_SAMPLE = 32
"""There are as many sequences, and states, as fit into a fraction of the probe's windows: the measures then
take at most 2 % of the published and the demo's stage 1."""
BATCH = 128
MIN_ERROR = (1 / 255) ** 2 / 12
"""Mean squared error of rounding to uint8. Smaller errors count as this one: the PSNR is at most 58.9 dB."""
MIN_WINDOWS = 8
"""Rarer actions among the probe's training half, and those missing in its other half, are not read back."""


@torch.no_grad()
def measure_steering(
    idm: IDM,
    world_model: WorldModel,
    windows: Windows,
    compute: Compute,
    cfg: ProbeConfig,
    seed: int,
    probed: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor | float]:
    """All three measures on `windows`: metrics by name, see `open_loop` and `read_back`.

    `probed` are the windows (M,) that the probe takes, which ascend, and their latent actions (M, D); None
    without true actions.
    """
    count = max(2, min(MAX_SAMPLES, cfg.windows // WINDOWS_PER_SAMPLE))
    with eval_mode(idm, world_model):
        with compute.autocast():
            metrics = open_loop(idm, world_model, windows, count, seed)
        if probed is not None:
            metrics |= read_back(idm, world_model, windows, compute, *probed, count, cfg, seed)
    return metrics


def open_loop(
    idm: IDM, world_model: WorldModel, windows: Windows, count: int, seed: int
) -> dict[str, Tensor | float]:
    """Open-loop PSNR and ΔPSNR, in dB, means over at most `count` sequences within episodes.

    Returns `psnr_<t>` and `copy_psnr_<t>` (of repeating o[t]) for t in `HORIZONS`, and `delta_psnr_<t>` for t
    in `SHUFFLED_HORIZONS`, all at most the longest horizon for which the data has two sequences. Every step
    of a sequence gets, for the ΔPSNR, the latent action of the same step of another one in the batch, drawn
    anew at each step. Returns {} if there are no two sequences of one step.
    """
    starts, horizon = sequences(windows, count)
    generator = torch.Generator().manual_seed(seed)
    totals, measured = 0.0, 0
    for batch in windows.iter_batches(starts, BATCH):
        if len(batch) < 2:  # no other sequence
            continue
        past, latents, following = None, [], []
        for step in range(horizon):
            images = stack_frames(windows.gather(batch + step))
            before, after = split_window(images)
            past = before if past is None else past
            latents.append(idm(images)[1].la_q)
            following.append(after)
        others = torch.randint(1, len(batch), (horizon,), generator=generator).tolist()
        shuffled = [la.roll(shift, 0) for la, shift in zip(latents, others, strict=True)]
        rows = [
            rollout_psnr(world_model, past, latents, following),
            torch.stack([psnr(past[:, -CHANNELS:], image) for image in following]),
            rollout_psnr(world_model, past, shuffled[: max(SHUFFLED_HORIZONS)], following),
        ]
        totals = totals + torch.cat([row.sum(1) for row in rows])
        measured += len(batch)
    if not measured:
        return {}
    mean = totals / measured
    own, copied, other = mean[:horizon], mean[horizon : 2 * horizon], mean[2 * horizon :]
    steps = [t for t in HORIZONS if t <= horizon]
    return {
        **{f"psnr_{t}": own[t - 1] for t in steps},
        **{f"copy_psnr_{t}": copied[t - 1] for t in steps},
        **{f"delta_psnr_{t}": own[t - 1] - other[t - 1] for t in SHUFFLED_HORIZONS if t <= horizon},
    }


def sequences(windows: Windows, count: int) -> tuple[Tensor, int]:
    """Windows (S,) that begin sequences of consecutive windows, at most `count`, and the sequences' length.

    The length is the longest of `HORIZONS` for which there are two, otherwise the shortest. Windows are
    consecutive if each begins a frame after the one before. So no sequence reaches into another episode,
    unless windows do (`data.skip_resets` false).
    """
    for horizon in reversed(HORIZONS):
        first = windows.all()[: max(0, len(windows) - horizon + 1)]
        last = first + horizon - 1
        unbroken = windows.starts[last] - windows.starts[first] == horizon - 1
        if unbroken.sum() >= 2:
            break
    return windows.evenly_spaced(count, first[unbroken]), horizon


def rollout_psnr(
    world_model: WorldModel, past: Tensor, latents: list[Tensor], following: list[Tensor]
) -> Tensor:
    """PSNR (K, B) of each step of a rollout from `past` (B, P·C, H, W) under K `latents` (B, D).

    `following` are the true images (B, C, H, W), at least K.
    """
    rows = []
    for la_q, image in zip(latents, following, strict=False):
        predicted = world_model(past, la_q)
        rows.append(psnr(predicted, image))
        past = torch.cat([past[:, CHANNELS:], predicted], 1)
    return torch.stack(rows)


def psnr(predicted: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) of images (B, C, H, W) whose values span 1, in dB."""
    error = (predicted.float() - image).square().mean((1, 2, 3))
    return -10 * error.clamp_min(MIN_ERROR).log10()


def read_back(
    idm: IDM,
    world_model: WorldModel,
    windows: Windows,
    compute: Compute,
    ids: Tensor,
    la: Tensor,
    count: int,
    cfg: ProbeConfig,
    seed: int,
) -> dict[str, Tensor | float]:
    """Action read-back from at most `count` states of the half of windows `ids` (M,) not shown to the probe.

    `la` (M, D) are the windows' latent actions. The typical latent action of a true action is the quantised
    one of the window in the probe's training half whose `la` is closest to the mean of that action.

    Returns `readback_acc_<action>`, the fraction of states from which the action is predicted correctly, and
    `readback_ceiling_<action>`, the same on true frames o[t+1] after that action; their means over actions,
    `readback_acc` and `readback_ceiling`; and `readback_chance`, 1/A. Returns {} for fewer than two actions.
    """
    ta, half = windows.actions(ids), len(ids) // 2
    if not half:
        return {}
    size = int(ta.max()) + 1
    frequent = (ta[:half].bincount(minlength=size) >= MIN_WINDOWS) & (ta[half:].bincount(minlength=size) > 0)
    actions = frequent.nonzero().flatten().tolist()
    if len(actions) < 2:
        return {}
    # Not under autocast, which would go on using the first bf16 copy of the weights that are trained.
    probe = fit_probe(la, ta, cfg, seed)
    right = probe(la[half:]).argmax(-1) == ta[half:]
    ceiling = [right[ta[half:] == action].float().mean() for action in actions]
    typical = torch.stack([most_typical(la[:half][ta[:half] == action]) for action in actions])
    typical = idm.quantize(typical).la_q

    states = windows.evenly_spaced(count, ids[half:])
    found = torch.zeros(len(actions), device=la.device)
    for batch in windows.iter_batches(states, BATCH):
        past = split_window(stack_frames(windows.gather(batch)))[0]
        for row, action in enumerate(actions):
            with compute.autocast():
                predicted = world_model(past, typical[row].expand(len(batch), -1))
                inferred = idm.infer_latents(torch.cat([past, predicted], 1))
            found[row] += (probe(inferred.float()).argmax(-1) == action).sum()
    accuracy = found / len(states)
    return {
        "readback_acc": accuracy.mean(),
        "readback_ceiling": torch.stack(ceiling).mean(),
        "readback_chance": 1 / len(actions),
        **{f"readback_acc_{action}": value for action, value in zip(actions, accuracy, strict=True)},
        **{f"readback_ceiling_{action}": value for action, value in zip(actions, ceiling, strict=True)},
    }


def most_typical(la: Tensor) -> Tensor:
    """Of latent actions (M, D) the one closest to their mean: (D,)."""
    return la[(la - la.mean(0)).square().sum(1).argmin()]
