"""The bottleneck between IDM and world model: vector or finite scalar quantisation, or none.

Dimensions
    B batch · N codebooks · L latent slots · K codes of a codebook · D size of a code

`la` (B, N·L·D) is a latent action before quantisation, `la_q` after it.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lapo.config import Config


class Quantized(NamedTuple):
    """Output of a bottleneck."""

    la_q: Tensor
    """(B, N·L·D), with a straight-through gradient."""
    loss: Tensor
    """Weighted commitment loss, a scalar; 0 without one."""
    perplexity: Tensor
    """exp(entropy of code usage), summed over codebooks: a scalar between N and N·K; 0 without codes."""
    indices: Tensor
    """(B, N, L) indices of the codes; (B, 0, 0) without codes."""


class Bottleneck(nn.Module):
    """The bottleneck without quantisation, and base class of the others.

    Attributes
        codes_shape  (N, L), or (0, 0) without codes
        num_codes    K
    """

    codes_shape = (0, 0)
    num_codes = 0

    def __init__(self, la_dim: int, normalize: bool = False, epsilon: float = 1e-5):
        """`normalize`: standardise every dimension of the latents (BatchNorm without affine parameters).

        `epsilon` is added to their variance, which may shrink to 1e-7 in training. EMA codebooks learn with
        1e-5 and hardly with 1e-10, see docs/differences.md.
        """
        super().__init__()
        self.norm = nn.BatchNorm1d(la_dim, eps=epsilon, affine=False) if normalize else None

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def project(self, la: Tensor) -> Tensor:
        """The IDM's output (B, N·L·D) → the latent action `la` (B, N·L·D), the target of stage 2."""
        return la if self.norm is None else self.norm(la.float())

    def forward(self, la: Tensor) -> Quantized:
        """Quantise `la` (B, N·L·D), an output of `project`."""
        zero = la.new_zeros((), dtype=torch.float32)
        return Quantized(la, zero, zero, la.new_zeros(len(la), 0, 0, dtype=torch.long))

    def decode(self, indices: Tensor) -> Tensor:
        """Codes (B, N, L), as `Quantized.indices` → quantised latent actions (B, N·L·D)."""
        raise NotImplementedError


class VectorQuantizer(Bottleneck):
    """Product quantiser with EMA codebooks (van den Oord et al. 2017, appendix A).

    A latent action (B, N·L·D) is laid out as (B, N, D, L), slots fastest, as in the published code. In
    training mode a forward pass quantises with the current codebooks, then updates them. EMA statistics are
    all-reduced over ranks.

    `start="published"`: codes are uniform, EMA counts zero; the first update then moves the codes far away.
    `start="data"`: codes are latents of the first training batch, and EMA counts are one.
    """

    ema_count: Tensor
    ema_weight: Tensor
    codebook: Tensor
    started: Tensor

    def __init__(
        self,
        num_codebooks: int,
        num_latents: int,
        num_embs: int,
        emb_dim: int,
        decay: float = 0.999,
        commitment_cost: float = 0.05,
        epsilon: float = 1e-5,
        start: str = "published",
        normalize: bool = False,
    ):
        super().__init__(num_codebooks * num_latents * emb_dim, normalize)
        self.codes_shape, self.num_codes = (num_codebooks, num_latents), num_embs
        self.num_latents, self.emb_dim = num_latents, emb_dim
        self.decay, self.commitment_cost, self.epsilon = decay, commitment_cost, epsilon
        self.start = start
        from_data = start == "data"
        codebook = torch.empty(num_codebooks, num_embs, emb_dim).uniform_(-5 / num_embs, 5 / num_embs)
        self.register_buffer("codebook", codebook)  # (N, K, D)
        self.register_buffer("ema_weight", codebook.clone())  # (N, K, D)
        self.register_buffer("ema_count", torch.full(codebook.shape[:2], float(from_data)))  # (N, K)
        self.register_buffer("started", torch.tensor(not from_data))

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, la: Tensor) -> Quantized:
        x = rearrange(la.float(), "b (n d l) -> n (b l) d", d=self.emb_dim, l=self.num_latents)
        if self.training and self.start == "data":
            self._init_codebook(x.detach())
        with torch.no_grad():
            # Squared distance to each code, without the term |x|², which does not change the argmin.
            distance = self.codebook.square().sum(-1)[:, None] - 2 * x @ self.codebook.mT  # (N, B·L, K)
            indices = distance.argmin(-1)
            one_hot = F.one_hot(indices, self.codebook.shape[1]).to(x.dtype)
            quantized = one_hot @ self.codebook
            count = one_hot.sum(1)  # (N, K) latents assigned to each code
            total = one_hot.mT @ x  # (N, K, D) their sum
            if self.training:
                count = self._update(count, total)
            usage = count / count.sum(-1, keepdim=True)
            perplexity = torch.special.entr(usage).sum(-1).exp().sum()
        loss = self.commitment_cost * F.mse_loss(x, quantized)
        straight_through = x + (quantized - x).detach()
        return Quantized(
            rearrange(straight_through, "n (b l) d -> b (n d l)", l=self.num_latents),
            loss,
            perplexity,
            rearrange(indices, "n (b l) -> b n l", l=self.num_latents),
        )

    def decode(self, indices: Tensor) -> Tensor:
        """See `Bottleneck`."""
        codebooks = torch.arange(len(self.codebook), device=indices.device)[:, None]  # (N, 1)
        return rearrange(self.codebook[codebooks, indices], "b n l d -> b (n d l)")

    @torch.no_grad()
    def _init_codebook(self, x: Tensor) -> None:
        """Initialise the codebooks with latents `x` (N, B·L, D), in the first training step only."""
        shuffled = x[:, torch.rand(x.shape[1], device=x.device).argsort()]
        repeats = -(-self.codebook.shape[1] // x.shape[1])
        codes = shuffled.repeat(1, repeats, 1)[:, : self.codebook.shape[1]].contiguous()
        if dist.is_initialized():  # broadcast the codes of rank 0
            codes.mul_(dist.get_rank() == 0)
            dist.all_reduce(codes)
        # `where` instead of `if`: reading the flag would synchronise with the device in every step.
        self.codebook.copy_(torch.where(self.started, self.codebook, codes))
        self.ema_weight.copy_(torch.where(self.started, self.ema_weight, codes))
        self.started.fill_(True)

    def _update(self, count: Tensor, total: Tensor) -> Tensor:
        """EMA update of the codebooks (van den Oord et al. 2017, appendix A).

        `count` (N, K) is the number of latents assigned to each code, `total` (N, K, D) their sum. Returns
        the counts of all ranks together (N, K).
        """
        if dist.is_initialized():
            statistics = torch.cat([count[..., None], total], -1)
            dist.all_reduce(statistics)
            count, total = statistics[..., 0], statistics[..., 1:]
        ema_count = self.ema_count.lerp_(count, 1 - self.decay)
        num_latents = ema_count.sum(-1, keepdim=True)
        # Laplace smoothing: no count is zero, and their sum does not change.
        ema_count.add_(self.epsilon).mul_(num_latents / (num_latents + count.shape[-1] * self.epsilon))
        self.ema_weight.lerp_(total, 1 - self.decay)
        self.codebook.copy_(self.ema_weight / ema_count[..., None])
        return count


class FiniteScalarQuantizer(Bottleneck):
    """Finite scalar quantisation (Mentzer et al. 2023): every dimension of a slot is rounded to a few levels.

    A slot has D = len(levels) dimensions and K = prod(levels) codes. Latents are normalised before they are
    bounded by tanh: otherwise tanh saturates, and few codes are used.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, num_codebooks: int, num_latents: int, levels: list[int]):
        # The levels are fixed, so latents of any variance must fill them.
        super().__init__(num_codebooks * num_latents * len(levels), normalize=True, epsilon=1e-10)
        self.codes_shape, self.num_codes = (num_codebooks, num_latents), math.prod(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:number]) for number in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, la: Tensor) -> Quantized:
        """See `Bottleneck`."""
        x = rearrange(la.float(), "b (n d l) -> b n l d", d=len(self.levels), l=self.codes_shape[1])
        # tanh covers slightly more than levels - 1 units. Even numbers of levels are shifted to include 0.
        half = (self.levels - 1) * 1.001 / 2
        offset = (self.levels % 2 == 0) / 2
        bounded = (x + (offset / half).atanh()).tanh() * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        indices = ((bounded.detach().round().long() + self.levels // 2) * self.basis).sum(-1)
        la_q = rearrange(rounded / (self.levels // 2), "b n l d -> b (n d l)")
        usage = F.one_hot(indices, self.num_codes).float().mean((0, 2))  # (N, K)
        return Quantized(la_q, la_q.new_zeros(()), torch.special.entr(usage).sum(-1).exp().sum(), indices)

    def decode(self, indices: Tensor) -> Tensor:
        """See `Bottleneck`."""
        digits = indices[..., None] // self.basis % self.levels
        return rearrange((digits - self.levels // 2) / (self.levels // 2), "b n l d -> b (n d l)")


def make_bottleneck(cfg: Config) -> Bottleneck:
    """The bottleneck that `cfg.vq` describes."""
    vq = cfg.vq
    if not vq.enabled:
        return Bottleneck(vq.la_dim, vq.normalize)
    if vq.kind == "fsq":
        return FiniteScalarQuantizer(vq.num_codebooks, vq.num_latents, vq.levels)
    sizes = vq.num_codebooks, vq.num_latents, vq.num_embs, vq.emb_dim
    return VectorQuantizer(*sizes, vq.decay, vq.commitment_cost, vq.epsilon, vq.start, vq.normalize)
