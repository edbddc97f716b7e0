"""The vector quantiser against naive loops, and its invariants."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lapo.bottleneck import VectorQuantizer

EXACT = {"rtol": 1e-5, "atol": 1e-5}


class QuantizerByLoops:
    """The quantiser in loops over Python floats."""

    def __init__(self, vq: VectorQuantizer):
        self.codebook = vq.codebook.tolist()
        self.weight = vq.ema_weight.tolist()
        self.count = vq.ema_count.tolist()
        self.latents = vq.num_latents
        self.decay, self.cost, self.epsilon = vq.decay, vq.commitment_cost, vq.epsilon

    def view(self, row: list[float], codebook: int, slot: int) -> list[float]:
        """The vector of one slot: of (codebooks · emb_dim, latents), slots vary fastest."""
        dim = len(self.codebook[0][0])
        return [row[(codebook * dim + d) * self.latents + slot] for d in range(dim)]

    def distance(self, x: list[float], codebook: int, code: int) -> float:
        return sum((a - b) ** 2 for a, b in zip(x, self.codebook[codebook][code], strict=True))

    def quantize(self, la: Tensor, indices: Tensor) -> tuple[Tensor, float, float]:
        """Latents quantised by the chosen `indices`, the commitment loss, the perplexity."""
        la_q = torch.empty_like(la)
        square_error, perplexity = 0.0, 0.0
        dim, codes = len(self.codebook[0][0]), len(self.codebook[0])
        for n in range(len(self.codebook)):
            used = [0] * codes
            for b, row in enumerate(la.tolist()):
                for slot in range(self.latents):
                    code = int(indices[b, n, slot])
                    used[code] += 1
                    square_error += self.distance(self.view(row, n, slot), n, code)
                    for d in range(dim):
                        la_q[b, (n * dim + d) * self.latents + slot] = self.codebook[n][code][d]
            probabilities = [u / sum(used) for u in used if u]
            perplexity += math.exp(-sum(p * math.log(p) for p in probabilities))
        return la_q, self.cost * square_error / la.numel(), perplexity

    def update(self, la: Tensor, indices: Tensor) -> None:
        for n in range(len(self.codebook)):
            codes, dim = len(self.codebook[n]), len(self.codebook[n][0])
            number = [0] * codes
            total = [[0.0] * dim for _ in range(codes)]
            for b, row in enumerate(la.tolist()):
                for slot in range(self.latents):
                    code = int(indices[b, n, slot])
                    number[code] += 1
                    for d, value in enumerate(self.view(row, n, slot)):
                        total[code][d] += value
            count = [
                self.decay * c + (1 - self.decay) * k for c, k in zip(self.count[n], number, strict=True)
            ]
            mass = sum(count)
            self.count[n] = [(c + self.epsilon) / (mass + codes * self.epsilon) * mass for c in count]
            for code in range(codes):
                for d in range(dim):
                    moved = self.decay * self.weight[n][code][d] + (1 - self.decay) * total[code][d]
                    self.weight[n][code][d] = moved
                    self.codebook[n][code][d] = moved / self.count[n][code]

    def assert_nearest(self, la: Tensor, indices: Tensor) -> None:
        for b, row in enumerate(la.tolist()):
            for n in range(len(self.codebook)):
                for slot in range(self.latents):
                    x = self.view(row, n, slot)
                    distances = [self.distance(x, n, code) for code in range(len(self.codebook[n]))]
                    assert distances[indices[b, n, slot]] == pytest.approx(min(distances), rel=1e-5, abs=1e-5)

    def assert_state(self, vq: VectorQuantizer) -> None:
        for name in ("codebook", "weight", "count"):
            kept = vq.codebook if name == "codebook" else getattr(vq, f"ema_{name}")
            torch.testing.assert_close(kept, torch.tensor(getattr(self, name)), **EXACT)


@given(
    codebooks=st.integers(1, 3),
    latents=st.integers(1, 4),
    codes=st.integers(2, 9),
    dim=st.integers(1, 5),
    batch=st.integers(1, 12),
    decay=st.sampled_from([0.0, 0.9, 0.999]),
    seed=st.integers(0, 999),
)
def test_three_quantiser_steps_equal_loops(codebooks, latents, codes, dim, batch, decay, seed):
    torch.manual_seed(seed)
    vq = VectorQuantizer(codebooks, latents, codes, dim, decay=decay)
    loops = QuantizerByLoops(vq)
    for _ in range(3):
        la = torch.randn(batch, codebooks * latents * dim)
        out = vq(la)
        la_q, loss, perplexity = loops.quantize(la, out.indices)  # with the codes before this update
        loops.assert_nearest(la, out.indices)
        torch.testing.assert_close(out.la_q, la_q, **EXACT)
        assert float(out.loss) == pytest.approx(loss, rel=1e-5)
        assert float(out.perplexity) == pytest.approx(perplexity, rel=1e-5)
        loops.update(la, out.indices)
        loops.assert_state(vq)
        # Rounding must not add up in what the test compares against.
        loops = QuantizerByLoops(vq)


def test_published_start_is_uniform_codes_and_counts_of_zero():
    vq = VectorQuantizer(2, 4, 64, 16)
    assert vq.codebook.shape == (2, 64, 16)
    assert vq.codebook.abs().max() <= 5 / 64
    assert vq.codebook.abs().max() > 0.99 * 5 / 64
    assert vq.codebook.mean().abs() < 0.005
    assert torch.equal(vq.ema_weight, vq.codebook)
    assert torch.equal(vq.ema_count, torch.zeros(2, 64))


def test_published_start_moves_the_codes_far_away_with_the_first_update():
    torch.manual_seed(0)
    vq = VectorQuantizer(2, 4, 64, 16)
    vq(0.05 * torch.randn(128, 128))
    assert 1_000 < vq.codebook.abs().max() < 100_000
    assert vq(0.05 * torch.randn(128, 128)).perplexity < 4  # of 128: hardly any code is left in reach


def test_quantiser_in_eval_mode_never_changes():
    vq = VectorQuantizer(2, 2, 8, 4, start="data").eval()
    before = copy.deepcopy(vq.state_dict())
    vq(torch.randn(16, 16))
    assert all(torch.equal(value, before[key]) for key, value in vq.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_straight_through_gradient_is_identity_plus_commitment(training):
    torch.manual_seed(0)
    vq = VectorQuantizer(2, 4, 16, 8, commitment_cost=0.3).train(training)
    la = torch.randn(5, 64, requires_grad=True)
    upstream = torch.randn(5, 64)
    out = vq(la)
    ((out.la_q * upstream).sum() + out.loss).backward()
    commitment = 0.3 * 2 * (la - out.la_q).detach() / la.numel()
    torch.testing.assert_close(la.grad, upstream + commitment, **EXACT)


def test_perplexity_runs_from_one_to_the_number_of_codes_per_codebook():
    vq = VectorQuantizer(2, 1, 4, 1)
    vq.codebook.copy_(torch.tensor([0.0, 1, 2, 3])[None, :, None].expand(2, 4, 1))
    vq.eval()
    assert vq(torch.zeros(8, 2)).perplexity == pytest.approx(2.0)
    assert vq(torch.arange(8.0)[:, None].remainder(4).expand(8, 2)).perplexity == pytest.approx(8.0)


@given(batch=st.integers(1, 12), seed=st.integers(0, 999))
def test_data_start_takes_the_codes_from_the_first_batch_with_counts_of_one(batch, seed):
    torch.manual_seed(seed)
    vq = VectorQuantizer(2, 3, 8, 4, start="data", decay=0.9)
    assert torch.equal(vq.ema_count, torch.ones(2, 8))
    view = QuantizerByLoops(vq).view
    la = torch.randn(batch, 24)
    out = vq(la)
    for n in range(2):
        latents = [view(row, n, slot) for row in la.tolist() for slot in range(3)]
        codes = [view(row, n, slot) for row in out.la_q.tolist() for slot in range(3)]
        assert all(code in [pytest.approx(x, abs=1e-6) for x in latents] for code in codes)
        assert out.indices[:, n].unique().numel() == min(8, 3 * batch)


def test_data_start_happens_in_the_first_training_batch_only_and_its_codes_quantise_that_batch():
    torch.manual_seed(0)
    vq = VectorQuantizer(1, 1, 8, 4, start="data")
    first, second = torch.randn(8, 4), torch.randn(8, 4)
    out = vq(first)
    torch.testing.assert_close(out.la_q, first, **EXACT)  # as many codes as latents: each is its own code
    assert out.perplexity == pytest.approx(8.0)
    loops = QuantizerByLoops(vq)
    out = vq(second)
    loops.assert_nearest(second, out.indices)
    loops.update(second, out.indices)
    loops.assert_state(vq)


def test_a_restored_quantiser_is_not_initialised_from_data_again():
    torch.manual_seed(0)
    vq = VectorQuantizer(2, 2, 8, 4, start="data")
    vq(torch.randn(8, 16))
    restored = VectorQuantizer(2, 2, 8, 4, start="data")
    restored.load_state_dict(vq.state_dict())
    la = torch.randn(8, 16)
    torch.testing.assert_close(restored(la), vq(la), rtol=0, atol=0)
    torch.testing.assert_close(restored.state_dict(), vq.state_dict(), rtol=0, atol=0)


def test_quantiser_stays_in_fp32_under_autocast():
    torch.manual_seed(0)
    plain = VectorQuantizer(2, 2, 8, 4)
    mixed = copy.deepcopy(plain)
    la = torch.randn(8, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixed(la)
    assert {out.la_q.dtype, out.loss.dtype, out.perplexity.dtype, mixed.codebook.dtype} == {torch.float32}
    torch.testing.assert_close(out, plain(la.float()), rtol=0, atol=0)
    torch.testing.assert_close(mixed.state_dict(), plain.state_dict(), rtol=0, atol=0)
