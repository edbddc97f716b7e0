"""Bottlenecks beside the EMA quantiser (test_quantizer.py): FSQ against a naive loop, normalisation, none."""

import math

import pytest
import torch

from lapo import stage1_idm_wm, stage2_bc
from lapo.bottleneck import Bottleneck, FiniteScalarQuantizer, VectorQuantizer, make_bottleneck
from lapo.config import load_config
from lapo.errors import UserError
from lapo.interface import load_stage1
from lapo.models import make_idm
from lapo.runs.checkpoints import load_checkpoint


@pytest.mark.parametrize("levels", [[8, 8], [5], [2, 3, 4]])
@torch.no_grad()
def test_fsq_rounds_every_dimension_to_its_levels(levels):
    """Against a loop over slots and dimensions, slots fastest in the latent action."""
    torch.manual_seed(0)
    num_codebooks, num_latents, size = 2, 3, len(levels)
    fsq = FiniteScalarQuantizer(num_codebooks, num_latents, levels)
    la = torch.randn(7, num_codebooks * num_latents * size) * 2
    found = fsq(la)
    for b in range(7):
        for n in range(num_codebooks):
            for slot in range(num_latents):
                code = 0
                for d in reversed(range(size)):
                    position = n * size * num_latents + d * num_latents + slot
                    half = (levels[d] - 1) * 1.001 / 2
                    offset = 0.5 if levels[d] % 2 == 0 else 0.0
                    x = math.tanh(la[b, position].item() + math.atanh(offset / half)) * half - offset
                    assert found.la_q[b, position].item() == pytest.approx(round(x) / (levels[d] // 2))
                    code = code * levels[d] + round(x) + levels[d] // 2
                assert found.indices[b, n, slot] == code
    assert 0 <= found.indices.min() <= found.indices.max() < math.prod(levels) == fsq.num_codes
    torch.testing.assert_close(fsq.decode(found.indices), found.la_q)
    assert found.loss == 0


def test_every_code_of_fsq_can_be_reached_and_is_counted():
    fsq = FiniteScalarQuantizer(1, 1, [4, 3])
    grid = torch.cartesian_prod(torch.linspace(-4, 4, 40), torch.linspace(-4, 4, 40))
    found = fsq(grid)
    assert set(found.indices.flatten().tolist()) == set(range(12))
    usage = found.indices.flatten().bincount() / len(grid)
    assert found.perplexity.item() == pytest.approx(math.exp(-(usage * usage.log()).sum().item()))


def test_gradients_pass_the_rounding_as_if_latents_were_only_bounded():
    fsq = FiniteScalarQuantizer(1, 1, [5])
    la = torch.tensor([[0.3]], requires_grad=True)
    fsq(la).la_q.sum().backward()
    half = 4 * 1.001 / 2
    assert la.grad.item() == pytest.approx(half * (1 - math.tanh(0.3) ** 2) / 2, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1, 100])
@pytest.mark.parametrize(
    ("bottleneck", "epsilon"),
    [(Bottleneck(6, normalize=True), 1e-5), (FiniteScalarQuantizer(1, 3, [5, 5]), 1e-10)],
)
def test_latents_are_standardised_but_for_an_epsilon(bottleneck, epsilon, scale):
    """Those of FSQ whatever their scale; EMA codebooks keep tiny latents small."""
    torch.manual_seed(0)
    output = torch.randn(500, 6) * scale + 7 * scale
    la = bottleneck.train().project(output)
    variance = output.var(0, correction=0)
    torch.testing.assert_close(la.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(la.var(0, correction=0), variance / (variance + epsilon), atol=1e-3, rtol=0)


def test_in_eval_mode_a_latent_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    cfg = load_config(["--vq.normalize", "true", "--preset", "demo"])
    idm = make_idm(cfg)
    windows = torch.randn(6, 9, cfg.data.image_size, cfg.data.image_size)
    idm.train()(windows)
    idm.eval()
    torch.testing.assert_close(
        idm.infer_latents(windows)[:2], idm.infer_latents(windows[:2]), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("options", "kind", "la_dim"),
    [
        ("", VectorQuantizer, 128),
        ("--vq.kind fsq", FiniteScalarQuantizer, 16),
        ("--vq.kind fsq --vq.levels 5,4,3", FiniteScalarQuantizer, 24),
        ("--vq.enabled false", Bottleneck, 128),
    ],
)
def test_the_config_chooses_the_bottleneck(options, kind, la_dim):
    cfg = load_config(options.split())
    bottleneck = make_bottleneck(cfg)
    assert (type(bottleneck), cfg.vq.la_dim) == (kind, la_dim)
    assert (bottleneck.norm is not None) == (kind is FiniteScalarQuantizer)
    assert bottleneck(torch.randn(4, la_dim)).la_q.shape == (4, la_dim)


def test_without_normalisation_checkpoints_have_the_keys_of_old_ones():
    keys = {"codebook", "ema_weight", "ema_count", "started"}
    assert make_bottleneck(load_config([])).state_dict().keys() == keys
    assert not make_bottleneck(load_config(["--vq.enabled", "false"])).state_dict()


def test_one_level_is_refused():
    with pytest.raises(
        UserError, match=r"'vq\.levels\.1' is '1': input should be greater than or equal to 2"
    ):
        load_config(["--vq.levels", "8,1"])


@pytest.mark.parametrize("options", ["--vq.kind fsq --vq.levels 4,3", "--vq.normalize true"])
def test_the_stages_train_with_it_and_the_interface_reads_it(workplace, options):
    """Stage 2 takes it from stage 1's checkpoint."""
    stage1_idm_wm.train(workplace.config(*options.split()))
    stage2_bc.train(workplace.config(*options.split()))
    checkpoint = load_checkpoint(workplace.run_dir("stage1") / "checkpoint.pt")
    state = checkpoint["state"]["idm"]
    assert state["vq.norm.num_batches_tracked"] == 8
    model = load_stage1(workplace.run_dir("stage1"), "cpu")
    frames = torch.randint(256, (9, 64, 64, 3), dtype=torch.uint8)
    found = model.infer(frames)
    torch.testing.assert_close(model.decode(found.codes[found.valid]), found.la_q[found.valid])
    with pytest.raises(UserError, match=r"was trained with other settings \(vq\."):
        stage1_idm_wm.train(workplace.config())
