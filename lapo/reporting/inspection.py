"""The networks of stage 1 on held-out windows: the numbers behind the report's figures.

Dimensions: M windows · K latent actions tried · A true actions · D size of a latent action · C, H, W image
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lapo.config import Config
from lapo.data.checks import name_action
from lapo.data.chunks import num_chunks_for
from lapo.data_loader import INFERENCE_BATCH, Windows
from lapo.models import (
    infer_latents,
    make_idm,
    make_world_model,
    normalize,
    restore,
    split_window,
    stack_frames,
    to_frames,
)
from lapo.runs.compute import Compute

MAX_WINDOWS = 4096
BLOCK = 64
"""Windows per block (fewer where there are few). A linear map is fitted to every other block and evaluated on
the others: both halves see all environments, and few windows have a neighbour in the other half."""
MIN_WINDOWS = 8
"""Actions with fewer windows among those that maps are fitted to are not shown."""
EXAMPLES = 5
MUCH_CHANGE = 0.95
"""Quantile of the frames' change at which examples are taken: large, but no outliers."""
STATES, CANDIDATES = 2, 24
"""Windows that counterfactuals are shown for, and candidates that they are chosen from."""


@dataclass(frozen=True)
class LatentProjection:
    """Latent actions of an IDM in a linear projection, and true actions predicted from them."""

    title: str
    xy: np.ndarray
    """(M, 2) projected latent actions."""
    confusion: np.ndarray
    """(A, A): the fraction of windows with true action `row` that is predicted as `column`."""


@dataclass(frozen=True)
class Predictions:
    """The world model's predictions on held-out windows."""

    frames: np.ndarray
    """(M, T, H, W, C) uint8."""
    predicted: np.ndarray
    """(M, H, W, C) uint8, of the last frame."""
    names: list[str]
    """(M) of the true actions; empty where unknown."""


@dataclass(frozen=True)
class Counterfactual:
    """The world model's predictions from the same frames under several latent actions."""

    frames: np.ndarray
    """(T-1, H, W, C) uint8, up to o[t]."""
    predicted: np.ndarray
    """(K, H, W, C) uint8."""
    names: list[str]
    """(K) the true actions of the windows that the latent actions come from."""


class Inspection:
    """The IDM and world model of a stage-1 checkpoint on up to `MAX_WINDOWS` held-out windows.

    Attributes
        ids      (M,) indices of the windows; if only some have true actions, of these
        la       (M, D) their latent actions
        ta       (M,) their true actions, or None where the data has none
        fitted   (M,) bool: windows that maps are fitted to; the others are shown
        actions  (A,) the true actions that are frequent enough to show, ascending
        names    (A) their names
    """

    def __init__(self, cfg: Config, state: dict, compute: Compute):
        """`cfg` has the sizes of the networks whose weights are in `state`.

        Raises `UserError` if the data cannot be read.
        """
        self.cfg, self.compute = cfg, compute
        # As in stage 1, training windows are used if nothing is held out.
        split = "test" if (cfg.game_data / "test").is_dir() else "train"
        limit = num_chunks_for(cfg.game_data / split, 4 * MAX_WINDOWS, cfg.data.skip_bad_chunks)
        self.windows = Windows.read(cfg, split, compute.device, limit=limit)
        gaps = self.windows.ta is not None and self.windows.has_gaps
        ids = self.windows.labelled() if gaps else self.windows.all()
        self.ids = ids[:: -(-len(ids) // MAX_WINDOWS)]
        self.ta = None if self.windows.ta is None else self.windows.actions(self.ids)
        block = max(1, min(BLOCK, len(self.ids) // 8))
        self.fitted = torch.arange(len(self.ids), device=self.ids.device) // block % 2 == 0

        self.idm = restore(make_idm(cfg), state["idm"], compute)
        self.world_model = restore(make_world_model(cfg), state["world_model"], compute)
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn on the CPU
            torch.manual_seed(cfg.seed)
            self.untrained_idm = compute.place(make_idm(cfg)).eval().requires_grad_(False)
        self.la = infer_latents(self.idm, self.windows.iter_frames(self.ids), compute)

        fitted = self.ids.new_empty(0) if self.ta is None else self.ta[self.fitted]
        self.actions = torch.nonzero(fitted.bincount() >= MIN_WINDOWS).flatten()
        self.names = self._names(self.actions)

    def _names(self, ta: Tensor) -> list[str]:
        return [name_action(self.cfg, action) for action in ta.tolist()]

    def latent_projections(self) -> tuple[list[LatentProjection], np.ndarray]:
        """Projections of latent actions after and before training; true actions as indices of `actions`.

        The projections are fitted to other windows than those shown, see `BLOCK`.
        """
        shown = torch.isin(self.ta, self.actions)
        ta = torch.searchsorted(self.actions, self.ta[shown])
        fitted = self.fitted[shown]
        ta_seen = ta[~fitted]
        untrained = infer_latents(self.untrained_idm, self.windows.iter_frames(self.ids[shown]), self.compute)
        views = []
        for when, la in (("After stage 1", self.la[shown]), ("Before training", untrained)):
            xy, read = fit_lda(la[fitted], ta[fitted], la[~fitted])
            confusion = torch.zeros(len(self.actions), len(self.actions), device=ta.device)
            confusion.index_put_((ta_seen, read), confusion.new_ones(()), accumulate=True)
            confusion /= confusion.sum(1, keepdim=True).clamp_min(1)
            right = (read == ta_seen).float().mean()
            title = f"{when}: a linear classifier predicts {right:.0%} of the actions"
            views.append(LatentProjection(title, xy.cpu().numpy(), confusion.cpu().numpy()))
        return views, ta_seen.cpu().numpy()

    def predictions(self) -> Predictions:
        """The world model's predictions for windows with large changes.

        One window for each of the commonest actions; without actions, windows spread over the data.
        """
        change = torch.cat([self._change(ids) for ids in self.ids.split(INFERENCE_BATCH)])
        if len(self.actions):
            commonest = self.actions[self.ta.bincount()[self.actions].argsort(descending=True)]
            groups = [torch.nonzero(self.ta == action).flatten() for action in commonest[:EXAMPLES]]
        else:
            groups = torch.arange(len(change)).tensor_split(min(EXAMPLES, len(change)))
        chosen = [group[change[group].argsort()[int(MUCH_CHANGE * len(group))]] for group in groups]
        ids = self.ids[torch.stack(chosen)]
        frames = self.windows.gather(ids)
        images = stack_frames(frames)
        with self.compute.autocast():
            predicted = self.world_model(split_window(images)[0], self.idm(images)[1].la_q)
        names = [""] * len(ids)
        if self.ta is not None:
            names = self._names(self.windows.actions(ids))
        return Predictions(frames.cpu().numpy(), to_frames(predicted).cpu().numpy(), names)

    def _change(self, ids: Tensor) -> Tensor:
        """Mean squared difference (B,) of o[t] and o[t+1] in windows (B,)."""
        images = normalize(self.windows.gather(ids)[:, -2:])
        return (images[:, 1] - images[:, 0]).square().mean((1, 2, 3))

    def counterfactuals(self) -> list[Counterfactual]:
        """Predictions under a typical latent action of each of `actions`, on frames where they differ most.

        The typical one is that closest to the mean latent action of all windows with the same true action.
        """
        typical = []
        for action in self.actions:
            mine = torch.nonzero(self.ta == action).flatten()
            distance = (self.la[mine] - self.la[mine].mean(0)).square().sum(1)
            typical.append(self.ids[mine[distance.argmin()]])
        candidates = torch.linspace(0, len(self.ids) - 1, CANDIDATES, device=self.ids.device).long()
        frames = self.windows.gather(self.ids[candidates])[:, :-1]
        images = stack_frames(frames)
        with self.compute.autocast():
            la_q = self.idm(stack_frames(self.windows.gather(torch.stack(typical))))[1].la_q
            tried = [self.world_model(images, la.expand(len(images), -1)) for la in la_q]
        predicted = torch.stack(tried, 1)  # (CANDIDATES, K, C, H, W)
        variance = predicted.var(1).mean((1, 2, 3))
        cases = []
        for part in torch.arange(CANDIDATES).tensor_split(STATES):
            best = part[variance[part].argmax()]
            cases.append(
                Counterfactual(
                    frames[best].cpu().numpy(), to_frames(predicted[best]).cpu().numpy(), self.names
                )
            )
        return cases


def fit_lda(fit: Tensor, ta: Tensor, la: Tensor) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis (Fisher 1936, Rao 1948), fitted to `fit` and applied to `la` (M, D).

    `fit` (B, D) has the classes `ta` (B,), each of 0 to A-1 among them. Returns the two directions in which
    the classes' means differ most, relative to the variance around them, (M, 2), and the likeliest class
    under normal distributions of equal covariance, (M,). Scaling or rotating the latents changes neither.
    """
    fit, la, one_hot = fit.double(), la.double(), F.one_hot(ta).double()
    prior = one_hot.mean(0)
    means = one_hot.T @ fit / len(fit) / prior[:, None]
    within = fit - means[ta]
    covariance = within.T @ within / len(fit)
    # Latent dimensions may be constant or copies of each other.
    ridge = 1e-3 * covariance.diagonal().mean() + 1e-12
    covariance.diagonal().add_(ridge)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    centre = prior @ means
    la, means = (la - centre) @ whiten, (means - centre) @ whiten
    directions = torch.linalg.svd(means * prior.sqrt()[:, None], full_matrices=False)[2][:2]
    likelihood = la @ means.T - means.square().sum(1) / 2 + prior.log()
    return la @ directions.T, likelihood.argmax(1)
