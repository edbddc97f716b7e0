"""`import lapo`: the interface against the networks applied by hand, and as the README shows it."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import lapo
from finished_run import finished_run
from lapo.bottleneck import VectorQuantizer
from lapo.config import load_config
from lapo.frames import resize
from lapo.interface import ActingPolicy, LatentActionModel, load_policy, load_stage1
from lapo.models import make_acting_policy, make_idm, make_world_model, stack_frames
from lapo.runs.checkpoints import load_checkpoint, saved_config
from support import CPU, PATIENCE, ROOT, Workplace


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Workplace:
    """A run with all stages and modes, to be left as it is."""
    return finished_run(tmp_path_factory.getbasetemp() / "finished")


@pytest.fixture(scope="module")
def model(finished) -> LatentActionModel:
    return load_stage1(finished.run_dir("stage1").parent, "cpu")


@pytest.fixture(scope="module")
def chunk(finished) -> dict[str, np.ndarray]:
    return dict(np.load(finished.data / finished.GAME / "test" / "0.npz"))


def by_hand(finished: Workplace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """IDM and world model as the checkpoint has them."""
    checkpoint = load_checkpoint(finished.run_dir("stage1") / "checkpoint.pt")
    cfg, state = saved_config(checkpoint), checkpoint["state"]
    idm, world_model = make_idm(cfg).eval(), make_world_model(cfg).eval()
    idm.load_state_dict(state["idm"])
    world_model.load_state_dict(state["world_model"])
    return idm, world_model


@torch.no_grad()
def test_latents_are_the_idm_s_of_every_window_and_none_at_an_episode_s_end(finished, model, chunk):
    obs, done = chunk["obs"], np.zeros(len(chunk["obs"]), bool)
    done[[30, 31, 70]] = True
    found, everything = model.infer(obs, done), model.infer(torch.from_numpy(obs))
    idm, _ = by_hand(finished)
    for t in range(len(obs)):
        window = range(t - 1, t + 2)
        inside = t - 1 >= 0 and t + 1 < len(obs)
        assert everything.valid[t] == inside
        assert found.valid[t] == (inside and not any(done[frame] for frame in window if inside))
        if not found.valid[t]:
            assert found.la[t].isnan().all()
            assert found.la_q[t].isnan().all()
            assert (found.codes[t] == -1).all()
        if inside:
            la, quantized = idm(stack_frames(torch.from_numpy(obs[None, t - 1 : t + 2])))
            torch.testing.assert_close(everything.la[t], la[0])
            torch.testing.assert_close(everything.la_q[t], quantized.la_q[0])
            assert torch.equal(everything.codes[t], quantized.indices[0])
        if found.valid[t]:
            assert torch.equal(found.la[t], everything.la[t])
            assert torch.equal(found.codes[t], everything.codes[t])


def test_a_video_longer_than_a_batch_gives_the_same_latents(model, chunk, monkeypatch):
    expected = model.infer(chunk["obs"])
    monkeypatch.setattr("lapo.interface.INFERENCE_BATCH", 7)
    found = model.infer(chunk["obs"])
    torch.testing.assert_close(found.la, expected.la, equal_nan=True)
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("shape", [(2, 4, 16, 5), (1, 1, 3, 2), (3, 2, 8, 1)])
def test_codes_are_decoded_to_what_they_were_chosen_for(shape):
    """`decode` knows the order of slots and dimensions in a latent action."""
    num_codebooks, num_latents, num_embs, emb_dim = shape
    torch.manual_seed(0)
    vq = VectorQuantizer(num_codebooks, num_latents, num_embs, emb_dim).eval()
    quantized = vq(torch.randn(9, num_codebooks * num_latents * emb_dim) / 10)
    assert len(quantized.indices.unique()) > 1
    torch.testing.assert_close(vq.decode(quantized.indices), quantized.la_q)


def test_no_window_is_left_where_all_frames_end_an_episode(model, chunk):
    found = model.infer(chunk["obs"], np.ones(120, bool))
    assert not found.valid.any()
    assert found.codes.shape == (120, 2, 2)
    assert found.la.isnan().all()


def test_arrays_of_any_layout_are_read(model, chunk):
    """Reversed and read-only ones, and lists of frames."""
    obs = chunk["obs"]
    fixed = obs.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in (fixed, list(obs), obs[::-1].copy()[::-1]):
            assert torch.equal(model.infer(form).codes, model.infer(obs).codes)


def test_codes_of_a_video_are_decoded_to_its_quantised_latents(model, chunk):
    found = model.infer(chunk["obs"])
    torch.testing.assert_close(model.decode(found.codes[found.valid]), found.la_q[found.valid])
    quantized = model.quantize(found.la[found.valid].numpy())
    assert torch.equal(quantized.indices, found.codes[found.valid])


@torch.no_grad()
def test_predictions_are_the_world_model_s_and_a_rollout_feeds_them_back_unrounded(finished, model, chunk):
    _, world_model = by_hand(finished)
    frames = torch.from_numpy(np.stack([chunk["obs"][:4], chunk["obs"][1:5]], 1))
    la_q = torch.randn(4, 3, model.idm.head.out_features)
    past, expected = list(stack_frames(frames).split(3, 1)), []
    for step in range(3):
        past.append(world_model(torch.cat(past[-2:], 1), la_q[:, step]))
        image = ((past[-1] + 0.5) * 255).round().clamp(0, 255)
        expected.append(image.permute(0, 2, 3, 1))
    found = model.rollout(frames, la_q)
    assert found.dtype == torch.uint8
    assert (found.float() - torch.stack(expected, 1)).abs().max() <= 1  # at a rounding boundary
    torch.testing.assert_close(model.predict(frames.numpy(), la_q[:, 0].numpy()), found[:, 0])


class Brighten(torch.nn.Module):
    """A world model that repeats o[t], brighter by `la_q[:, 0]` of 255 levels."""

    def forward(self, images: torch.Tensor, la_q: torch.Tensor) -> torch.Tensor:
        return images[:, 3:] + la_q[:, :1, None, None] / 255


def test_a_rollout_feeds_back_what_is_not_rounded(model):
    """Three steps of 0.4 levels make one level, though each alone is rounded away."""
    stub = LatentActionModel(model.idm, Brighten(), CPU)
    frames = torch.full((2, 2, 64, 64, 3), 100, dtype=torch.uint8)
    la_q = torch.full((2, 3, stub.la_dim), 0.4)
    la_q[1] = 2
    assert stub.rollout(frames, la_q)[..., 0, 0, 0].tolist() == [[100, 101, 101], [102, 104, 106]]


def test_latent_actions_without_a_batch_hold_for_all_frames(model, chunk):
    frames = np.stack([chunk["obs"][:5], chunk["obs"][1:6]], 1)
    la_q = model.infer(chunk["obs"]).la_q[1:4]
    assert torch.equal(model.rollout(frames, la_q), model.rollout(frames, la_q.expand(5, -1, -1)))
    assert model.rollout(frames, la_q[:0]).shape == (5, 0, 64, 64, 3)


def test_many_frames_are_predicted_in_batches(finished, model, chunk, monkeypatch):
    frames = np.stack([chunk["obs"][:9], chunk["obs"][1:10]], 1)
    la_q = model.infer(chunk["obs"]).la_q[1:10, None].expand(-1, 2, -1)
    policy = load_policy(finished.run_dir("stage3_bc"), "cpu")
    expected, logits = model.rollout(frames, la_q), policy.logits(chunk["obs"])
    monkeypatch.setattr("lapo.interface.INFERENCE_BATCH", 4)
    assert (model.rollout(frames, la_q).int() - expected.int()).abs().max() <= 1
    torch.testing.assert_close(policy.logits(chunk["obs"]), logits)


def test_use_changes_nothing_and_nothing_can_be_trained(finished, model, chunk):
    networks = torch.nn.ModuleList([model.idm, model.world_model])
    before = {key: x.clone() for key, x in networks.state_dict().items()}
    assert any(key.endswith("running_mean") for key in before)
    assert any(key.endswith("codebook") for key in before)
    found = model.infer(chunk["obs"])
    model.quantize(found.la[found.valid])
    model.predict(np.stack([chunk["obs"][:9], chunk["obs"][:9]], 1), found.la_q[1:10])
    for key, x in networks.state_dict().items():
        assert torch.equal(x, before[key]), key
    assert not any(p.requires_grad for p in networks.parameters())
    policy = load_policy(finished.run_dir("stage3_scratch"), "cpu")
    assert not any(p.requires_grad for p in policy.network.parameters())


@pytest.mark.parametrize("mode", ["online", "offline", "scratch", "bc"])
def test_policies_act_as_their_networks_say(finished, chunk, mode):
    policy = load_policy(finished.run_dir(f"stage3_{mode}"), "cpu")
    checkpoint = load_checkpoint(finished.run_dir(f"stage3_{mode}") / "checkpoint.pt")
    network = make_acting_policy(saved_config(checkpoint), mode, 15).eval()
    network.load_state_dict(checkpoint["state"]["policy"])
    obs = chunk["obs"][:20]
    with torch.no_grad():
        expected = network.logits(torch.from_numpy(obs))
    torch.testing.assert_close(policy.logits(obs), expected)
    assert policy.act(obs, greedy=True).tolist() == expected.argmax(-1).tolist()
    assert policy.act(obs).dtype == np.int64
    torch.manual_seed(3)
    first = policy.act(obs)
    torch.manual_seed(3)
    assert policy.act(obs).tolist() == first.tolist()


class Uniform(torch.nn.Module):
    """All 15 actions are equally likely, the last one by a hair most."""

    def logits(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 1e-3, 15).expand(len(frames), -1)


def test_actions_are_sampled_unless_greedy_ones_are_asked_for(chunk):
    policy = ActingPolicy(Uniform(), CPU)
    assert set(policy.act(chunk["obs"], greedy=True)) == {14}
    assert len(set(policy.act(chunk["obs"]))) > 10


@pytest.mark.parametrize("form", ["run", "stage", "file", "relative"])
def test_a_run_is_named_by_its_folder_or_its_checkpoint(finished, monkeypatch, form):
    stage = finished.run_dir("stage1")
    monkeypatch.chdir(stage.parent.parent)
    path = {"run": stage.parent, "stage": stage, "file": stage / "checkpoint.pt", "relative": "seed0/stage1"}[
        form
    ]
    assert isinstance(load_stage1(path, "cpu"), LatentActionModel)


def test_a_model_without_quantiser_has_no_codes(finished, chunk):
    cfg = finished.config("--vq.enabled", "false")
    model = LatentActionModel(make_idm(cfg).eval(), make_world_model(cfg).eval(), CPU)
    found = model.infer(chunk["obs"])
    assert found.codes.shape == (120, 0, 0)
    torch.testing.assert_close(found.la_q, found.la, equal_nan=True)
    with pytest.raises(lapo.UserError, match=r"^this model has no codes: .* vq\.enabled false$"):
        model.decode(found.codes)


def test_mistakes_are_named(finished, model, chunk, tmp_path):
    obs, latents = chunk["obs"], model.infer(chunk["obs"])
    policy, pairs = load_policy(finished.run_dir("stage3_bc"), "cpu"), np.stack([obs[:4], obs[1:5]], 1)
    run, unfinished = finished.run_dir("stage1").parent, {}
    for stage in ("stage1", "stage3_bc"):
        checkpoint = torch.load(run / stage / "checkpoint.pt", weights_only=True) | {"finished": False}
        del checkpoint["checksum"]
        unfinished[stage] = tmp_path / f"{stage}.pt"
        torch.save(checkpoint, unfinished[stage])
    for call, sentence in (
        (
            lambda: model.infer(obs / 255),
            r"video must be uint8 \(T, 64, 64, 3\), found float64 \(120, 64, 64, 3\)",
        ),
        (lambda: model.infer(obs[:, :32]), r"video must be .*, found uint8 \(120, 32, 64, 3\)"),
        (lambda: model.infer("clip.mp4"), "video must be .*, found str$"),
        (lambda: model.infer(obs.astype(object)), r"video must be .*, found object \(120, 64, 64, 3\)"),
        (lambda: model.infer(obs[:2]), "the video has 2 frames; an action is inferred from 3"),
        (lambda: model.infer(obs, np.zeros(120)), r"done must be bool \(120,\), found float64 \(120,\)"),
        (lambda: model.quantize(latents.la[:, :3]), r"la must be float \(B, 16\), found float32 \(120, 3\)"),
        (lambda: model.quantize(latents.la), "la has NaN, as `infer` returns where not `valid`"),
        (lambda: model.infer(obs, np.zeros(9, bool)), r"done must be bool \(120,\), found bool \(9,\)"),
        (
            lambda: model.decode(latents.la),
            r"codes must be integer \(B, 2, 2\), found float32 \(120, 16\)",
        ),
        (lambda: model.decode(latents.codes), r"codes must lie in 0\.\.7, found -1\.\."),
        (lambda: model.predict(obs[:2], latents.la_q[:2]), r"frames must be uint8 \(B, 2, 64, 64, 3\)"),
        (
            lambda: model.predict(np.stack([obs, obs], 1), latents.la_q[:, :3]),
            r"la_q must be float \(120, 16\), found float32 \(120, 3\)",
        ),
        (lambda: model.predict(pairs, latents.codes[:4]), r"la_q must be float \(4, 16\), found int64"),
        (lambda: model.predict(pairs, latents.la_q[:4]), "la_q has NaN"),
        (
            lambda: model.rollout(pairs, latents.la_q[None, :3]),
            r"la_q must be float \(4, K, 16\), found float32 \(1, 3, 16\)",
        ),
        (lambda: model.rollout(pairs, latents.la_q[:3, :5]), r"la_q must be float \(K, 16\)"),
        (lambda: policy.act(obs[0]), r"obs must be uint8 \(B, 64, 64, 3\), found uint8 \(64, 64, 3\)"),
        (lambda: load_stage1("nowhere"), "^nowhere does not exist, neither in the working directory nor in"),
        (lambda: load_stage1(tmp_path), r"stage1/checkpoint\.pt does not exist; make it with `python stage1"),
        (lambda: load_stage1(unfinished["stage1"]), r"stage1\.pt is unfinished, at step 8; run the command"),
        (lambda: load_policy(unfinished["stage3_bc"]), r"stage3_bc\.pt is unfinished, at step"),
        (lambda: load_policy(run), "is the folder of a run; name one of its policies: stage3_bc, stage3_off"),
        (lambda: load_policy(tmp_path), r"checkpoint\.pt does not exist; make it with `python stage3\.py`"),
        (lambda: load_stage1(run, "gpu"), "'device' is 'gpu'"),
        (lambda: load_stage1(finished.run_dir("stage2")), "is a checkpoint of stage2, not of stage1"),
        (lambda: load_policy(finished.run_dir("stage1")), "is a checkpoint of stage1, which cannot act"),
    ):
        with pytest.raises(lapo.UserError, match=sentence):
            call()


def test_frames_larger_than_the_networks_are_averaged(chunk):
    """As stages and games do it: a model of 32×32 pixels takes chunks and observations of Procgen's 64×64."""
    cfg = load_config(["--preset", "demo", "--model.wm_width", "2"])
    model = LatentActionModel(make_idm(cfg).eval(), make_world_model(cfg).eval(), CPU, cfg.data.image_size)
    policy = ActingPolicy(make_acting_policy(cfg, "bc", 15).eval(), CPU, cfg.data.image_size)
    large, small = chunk["obs"], resize(chunk["obs"], 32)
    found, expected = model.infer(large), model.infer(small)
    assert torch.equal(found.la_q[1:-1], expected.la_q[1:-1])
    la_q, large_pairs, pairs = (
        x[1:5] for x in (found.la_q, np.stack([large] * 2, 1), np.stack([small] * 2, 1))
    )
    assert torch.equal(model.predict(large_pairs, la_q), model.predict(pairs, la_q))
    film = model.rollout(torch.from_numpy(large_pairs), la_q[:3])
    assert film.shape == (4, 3, 32, 32, 3)
    assert torch.equal(film, model.rollout(pairs, la_q[:3]))
    assert torch.equal(policy.logits(list(large[:4])), policy.logits(small[:4]))
    for wrong in (large[:, :48, :48], large[:, :, :32], large[:, :16, :16], large[..., :0, :0, :]):
        with pytest.raises(lapo.UserError, match=r"^obs must be uint8 \(B, 32, 32, 3\), found uint8 \("):
            policy.act(wrong)


def test_importing_the_package_brings_nothing_until_a_name_is_used():
    code = (
        "import sys, lapo; print('torch' in sys.modules, 'numpy' in sys.modules, 'load_stage1' in dir(lapo))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False True\n"


def test_unknown_names_are_no_attributes():
    assert all(hasattr(lapo, name) for name in lapo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lapo.nothing  # noqa: B018


def test_the_readme_s_example_runs_as_written_without_procgen(finished, tmp_path):
    """In a folder where its paths lead to a tiny run."""
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for name, target in (
        ("exp_results/demo/jumper/seed0", finished.run_dir("stage1").parent),
        ("expert_data/demo/jumper", finished.data / finished.GAME),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(target)
    # A chunk of the recorder's has marks; these ones have none.
    np.savez(
        Path(tmp_path / "chunk.npz"),
        **np.load(tmp_path / "expert_data/demo/jumper/test/0.npz"),
        done=np.zeros(120, bool),
    )
    example = example.replace("expert_data/demo/jumper/test/0.npz", "chunk.npz")
    blocked = "import sys; sys.modules |= {'procgen': None, 'gym': None, 'gym3': None}\n"
    checks = (
        "assert film.shape == (8, 5, *model.frame_shape) and predicted.shape == (8, *model.frame_shape)\n"
        "assert pairs.shape == (8, 2, 64, 64, 3) and len(actions) == 8"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}sys.path.insert(0, {str(ROOT)!r})\n{example}\n{checks}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
