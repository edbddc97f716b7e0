"""The networks against the paper's description: naive loops, parameter counts, functional implementations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapo.bottleneck import VectorQuantizer
from lapo.config import load_config
from lapo.models import (
    IDM,
    ActorCritic,
    DecodedPolicy,
    Decoder,
    Policy,
    TwoPathPolicy,
    WorldModel,
    make_acting_policy,
    make_idm,
    make_latent_policy,
    make_value_head,
    normalize,
    split_window,
    stack_frames,
)

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def frames(*shape: int, seed: int = 0) -> Tensor:
    """Random uint8 frames (*shape, 64, 64, 3)."""
    return torch.randint(
        256, (*shape, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# ---------------------------------------------------------------- frames


def test_normalize_maps_bytes_to_plus_minus_a_half():
    pixel = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 64, 64, 3)
    for channel, value in enumerate((-0.5, -0.3, 0.5)):
        torch.testing.assert_close(normalize(pixel)[:, channel], torch.full((2, 64, 64), value))


def test_stack_frames_puts_the_windows_frames_in_order_on_the_channels():
    window = frames(2, 3)
    stacked = stack_frames(window)
    assert stacked.shape == (2, 9, 64, 64)
    for t in range(3):
        torch.testing.assert_close(stacked[:, 3 * t : 3 * t + 3], normalize(window[:, t]))


# ---------------------------------------------------------------- IMPALA


def impala(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The conv sequences of IMPALA, flattened, from the trunk's weights in their order of creation."""
    convs = iter(zip(*[iter(weights.values())] * 2, strict=True))  # (weight, bias) of each convolution

    def conv(x: Tensor) -> Tensor:
        weight, bias = next(convs)
        return F.conv2d(x, weight, bias, padding=1)

    for _ in range(3):
        x = F.max_pool2d(conv(x), 3, stride=2, padding=1)
        for _ in range(2):
            x = x + conv(conv(x.relu()).relu())
    return x.flatten(1)


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def hidden(weights: dict[str, Tensor], x: Tensor, fc: str = "fc") -> Tensor:
    """IMPALA's 256 hidden units: flatten, ReLU, linear, ReLU."""
    trunk = {key: value for key, value in weights.items() if key.startswith("trunk.")}
    return linear(weights, fc, impala(trunk, x).relu()).relu()


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def conv_params(i: int, o: int, size: int = 3) -> int:
    return o * i * size**2 + o


def impala_params(channels: int, scale: int) -> int:
    total = 0
    for width in (16 * scale, 32 * scale, 32 * scale):
        total += conv_params(channels, width) + 4 * conv_params(width, width)
        channels = width
    return total + (32 * scale * 8 * 8) * 256 + 256


def test_sizes_of_idm_and_policies_at_the_published_scale():
    vq = VectorQuantizer(2, 4, 64, 16)
    assert count(IDM(4, 128, vq)) == impala_params(9, 4) + 256 * 128 + 128
    assert count(Policy(128, 4)) == impala_params(3, 4) + 256 * 128 + 128
    assert count(ActorCritic(15, 4)) == impala_params(3, 4) + 256 * 15 + 15 + 256 + 1


def test_idm_equals_a_functional_implementation():
    torch.manual_seed(0)
    idm = IDM(1, 16, VectorQuantizer(2, 2, 8, 4)).eval()
    window = stack_frames(frames(3, 3))
    weights = dict(idm.named_parameters())
    expected = linear(weights, "head", hidden(weights, window))
    la, quantized = idm(window)
    torch.testing.assert_close(la, expected, **EXACT)
    torch.testing.assert_close(idm.infer_latents(window), la, rtol=0, atol=0)
    torch.testing.assert_close(quantized.la_q, idm.vq(la).la_q, rtol=0, atol=0)


def test_idm_without_quantiser_passes_its_latents_through():
    torch.manual_seed(0)
    idm = IDM(1, 16, None)
    la, quantized = idm(stack_frames(frames(3, 3)))
    assert quantized.la_q is la
    assert quantized.loss == 0
    quantized.la_q.sum().backward()
    assert all(p.grad is not None for p in idm.parameters())


def test_policies_equal_a_functional_implementation():
    torch.manual_seed(0)
    obs = frames(3)
    policy = Policy(16, 1)
    weights = dict(policy.named_parameters())
    expected = linear(weights, "policy_head", hidden(weights, normalize(obs)))
    torch.testing.assert_close(policy(normalize(obs)), expected, **EXACT)
    torch.testing.assert_close(policy.logits(obs), expected, **EXACT)

    actor = ActorCritic(15, 1)
    weights = dict(actor.named_parameters())
    h = hidden(weights, normalize(obs))
    logits, value = actor(*actor.encode(obs))
    torch.testing.assert_close(logits, linear(weights, "policy_head", h), **EXACT)
    torch.testing.assert_close(value, linear(weights, "value_head", h).squeeze(-1), **EXACT)
    torch.testing.assert_close(actor.logits(obs), logits, rtol=0, atol=0)


def test_layers_keep_pytorchs_default_initialisation():
    """Uniform within ±1/√fan_in, weights and biases alike: the default of linear layers and convolutions."""
    torch.manual_seed(0)
    networks = {
        "idm": IDM(4, 128, None),
        "policy": Policy(128, 4),
        "actor": ActorCritic(15, 4),
        "world model": WorldModel(128, 8),
        "decoder": Decoder(128, 15, (192, 128, 64)),
    }
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    for name, network in networks.items():
        for key, layer in network.named_modules():
            if isinstance(layer, layers) and key != "value_head":
                bound = layer.weight[0].numel() ** -0.5
                for param in (layer.weight, layer.bias):
                    assert param.abs().max() <= bound, (name, key)
                spread = layer.weight.detach().std()
                assert spread == pytest.approx(bound / 3**0.5, rel=4 / layer.weight.numel() ** 0.5), (
                    name,
                    key,
                )


def test_value_head_is_orthogonal_with_gain_root_two_and_no_bias():
    for head in (make_value_head(), ActorCritic(15, 1).value_head):
        assert head.weight.shape == (1, 256)
        assert head.weight.norm().item() ** 2 == pytest.approx(2.0, rel=1e-5)
        assert head.bias.item() == 0


def test_decoder_has_the_published_layers():
    decoder = Decoder(128, 15, (192, 128, 64))
    sizes = [(m.in_features, m.out_features) for m in decoder if isinstance(m, torch.nn.Linear)]
    assert sizes == [(128, 192), (192, 128), (128, 64), (64, 15)]
    torch.manual_seed(0)
    la = torch.randn(4, 128)
    x = la
    for index in (0, 2, 4):
        x = linear(dict(decoder.named_parameters()), str(index), x).relu()
    expected = linear(dict(decoder.named_parameters()), "6", x)
    torch.testing.assert_close(decoder(la), expected, **EXACT)


# ---------------------------------------------------------------- world model


def unet_shapes(la_dim: int, b: int) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the U-Net, from its description."""
    shapes = {}

    def residual(prefix: str, channels: int) -> None:
        shapes[f"{prefix}.conv0"] = (channels // 2, channels, 3, 3)
        shapes[f"{prefix}.conv1"] = (channels, channels // 2, 3, 3)

    down = [b, 2 * b, 4 * b, 8 * b, 16 * b]
    for k, (i, o) in enumerate(zip([6 + la_dim, *down], down, strict=False)):
        shapes[f"down.{k}.conv"] = (o, i, 3, 3)
        shapes[f"down.{k}.norm"] = (o,)
        residual(f"down.{k}.residual", o)
    shapes["bottleneck"] = (32 * b, 16 * b, 2, 2)
    skips = [la_dim, *reversed(down)]
    i = 32 * b
    for k, (skip, o) in enumerate(zip(skips, [16 * b, 8 * b, 4 * b, 2 * b, b, b], strict=True)):
        shapes[f"up.{k}.conv"] = (i + skip, o, 2, 2)  # transposed: inputs first
        shapes[f"up.{k}.norm"] = (o,)
        residual(f"up.{k}.residual", o)
        i = o
    shapes["out.0"] = (b, b + 6, 3, 3)
    residual("out.1", b)
    shapes["out.3"] = (3, b, 1, 1)
    return shapes


def unet(weights: dict[str, Tensor], images: Tensor, la_q: Tensor, training: bool) -> Tensor:
    """The U-Net's description, functionally; the action as constant channels.

    In training, the running statistics among the weights move.
    """

    def conv(name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def norm(name: str, x: Tensor) -> Tensor:
        w = [weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *w, training)

    def residual(name: str, x: Tensor) -> Tensor:
        inner = conv(f"{name}.conv0", x.relu(), padding=1)
        return x + conv(f"{name}.conv1", inner.relu(), padding=1)

    action = la_q[:, :, None, None]
    x = torch.cat([images, action.repeat(1, 1, *images.shape[2:])], 1)
    skips = []
    for k in range(round(math.log2(images.shape[2])) - 1):
        x = norm(f"down.{k}.norm", conv(f"down.{k}.conv", x, padding=1))
        x = F.max_pool2d(residual(f"down.{k}.residual", x), 2).relu()
        skips.append(x)
    x = conv("bottleneck", x)
    assert x.shape[2:] == (1, 1)
    for k, skip in enumerate([action, *skips[::-1]]):
        up = f"up.{k}"
        x = torch.cat([x, skip], 1)
        x = F.conv_transpose2d(x, weights[f"{up}.conv.weight"], weights[f"{up}.conv.bias"], stride=2)
        x = residual(f"{up}.residual", norm(f"{up}.norm", x)).relu()
    x = conv("out.0", torch.cat([x, images], 1), padding=1)
    return conv("out.3", residual("out.1", x).relu()).tanh() / 2


def example(batch: int, la_dim: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(batch, 6, 64, 64) - 0.5, torch.randn(batch, la_dim)


@pytest.mark.parametrize(("la_dim", "width"), [(128, 24), (16, 8), (5, 2)])
def test_world_model_has_the_described_layers(la_dim, width):
    with torch.device("meta"):
        model = WorldModel(la_dim, width)
    weights = {
        key.removesuffix(".weight"): tuple(value.shape)
        for key, value in model.named_parameters()
        if key.endswith(".weight")
    }
    assert weights == unet_shapes(la_dim, width)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fold_action", [True, False])
def test_world_model_equals_a_functional_implementation(fold_action, training):
    torch.manual_seed(0)
    model = WorldModel(10, 8, fold_action)
    images, la_q = example(3, 10)
    model(*example(4, 10))  # running statistics that are not the initial ones
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    weights = copy.deepcopy(before)
    expected = unet(weights, images, la_q, training)
    torch.testing.assert_close(model(images, la_q), expected, **EXACT)
    statistics = [key for key in before if "running" in key]
    assert len(statistics) == 2 * 11
    for key in statistics:
        torch.testing.assert_close(model.state_dict()[key], weights[key], **EXACT)
        assert torch.equal(weights[key], before[key]) != training, key


@pytest.mark.parametrize("fold_action", [True, False])
@pytest.mark.parametrize(("size", "context"), [(8, 0), (32, 3), (128, 1)])
def test_world_model_of_other_windows_equals_a_functional_implementation(size, context, fold_action):
    torch.manual_seed(0)
    model = WorldModel(4, 2, fold_action, context, size)
    images, la_q = torch.rand(3, 3 * (context + 1), size, size) - 0.5, torch.randn(3, 4)
    expected = unet(copy.deepcopy(model.state_dict()), images, la_q, training=True)
    assert expected.shape == (3, 3, size, size)
    torch.testing.assert_close(model(images, la_q), expected, **EXACT)


@pytest.mark.parametrize(("size", "context"), [(8, 0), (32, 3), (128, 1)])
def test_idm_and_policy_take_windows_and_frames_of_other_sizes(size, context):
    cfg = load_config(["--preset", "demo", f"--data.image_size={size}", f"--data.context={context}"])
    idm, policy = make_idm(cfg), make_latent_policy(cfg)
    windows = torch.zeros(2, cfg.data.window, size, size, 3, dtype=torch.uint8)
    assert idm.infer_latents(stack_frames(windows)).shape == (2, cfg.vq.la_dim)
    assert policy(normalize(windows[:, -2])).shape == (2, cfg.vq.la_dim)
    assert idm.trunk.out_dim == 32 * (size // 8) ** 2


def test_a_window_is_split_before_its_last_frame():
    window = frames(2, 4)
    past, following = split_window(stack_frames(window))
    torch.testing.assert_close(past, stack_frames(window[:, :3]))
    torch.testing.assert_close(following, normalize(window[:, 3]))


def test_world_models_output_is_an_image_within_plus_minus_a_half():
    torch.manual_seed(0)
    model = WorldModel(8, 2)
    images, la_q = example(2, 8)
    out = model(images, la_q)
    assert out.shape == (2, 3, 64, 64)
    assert out.abs().max() < 0.5
    with torch.no_grad():
        model.out[-1].weight.mul_(1e4)
        extreme = model(images, la_q)
    assert extreme.abs().max() == 0.5


@pytest.mark.parametrize("training", [True, False])
def test_folded_action_equals_constant_channels_in_outputs_and_gradients(training):
    """In fp64: in fp32, a rounding that depends on the processor may flip a ReLU."""
    torch.manual_seed(0)
    folded = WorldModel(12, 8, fold_action=True).train(training).double()
    plain = WorldModel(12, 8, fold_action=False).train(training).double()
    plain.load_state_dict(folded.state_dict())
    images, la_q = (x.double() for x in example(3, 12))
    upstream = torch.randn(3, 3, 64, 64) / 16
    results = []
    for model in (folded, plain):
        action = la_q.clone().requires_grad_()
        out = model(images, action)
        (out * upstream).sum().backward()
        grads = {key: p.grad for key, p in model.named_parameters()} | {"la_q": action.grad}
        results.append((out, grads, model.state_dict()))
    torch.testing.assert_close(results[0], results[1], **EXACT)
    grads = results[0][1]
    assert grads["la_q"].abs().max() > 0.01
    assert grads["down.0.conv.weight"][:, 6:].abs().max() > 0.01


def test_folded_first_layer_equals_a_loop_over_pixels_up_to_the_borders():
    torch.manual_seed(0)
    model = WorldModel(3, 2)
    _, la_q = example(2, 3)
    kernel = model.down[0].conv.weight[:, 6:]
    expected = torch.zeros(2, 2, 64, 64)
    for y in (0, 1, 31, 62, 63):
        for x in (0, 1, 31, 62, 63):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < 64 and 0 <= x + dx < 64:
                        expected[:, :, y, x] += la_q @ kernel[:, :, dy + 1, dx + 1].T
            torch.testing.assert_close(model.action_map(la_q)[:, :, y, x], expected[:, :, y, x], **EXACT)


def test_world_model_depends_on_the_action_of_each_sample():
    torch.manual_seed(0)
    model = WorldModel(8, 8).eval()
    images, la_q = example(2, 8)
    before, after = model(images, la_q), model(images, torch.stack([la_q[0], la_q[1] + 1]))
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-4


# ---------------------------------------------------------------- acting policies


def two_paths(seed: int = 0) -> tuple[TwoPathPolicy, Policy, Decoder]:
    """A two-path policy on a small latent policy and decoder, and copies of their initial states."""
    torch.manual_seed(seed)
    latent_policy, decoder = Policy(16, 1), Decoder(16, 15, (12, 8))
    before = copy.deepcopy(latent_policy), copy.deepcopy(decoder)
    return TwoPathPolicy(latent_policy, decoder, 15), *before


def test_decoded_policy_acts_with_decoder_of_latent_policy():
    torch.manual_seed(0)
    policy, decoder = Policy(16, 1), Decoder(16, 15, (8,))
    obs = frames(3)
    torch.testing.assert_close(DecodedPolicy(policy, decoder).logits(obs), decoder(policy(normalize(obs))))


def test_two_path_policy_starts_with_half_the_decoders_logits():
    policy, latent_policy, decoder = two_paths()
    obs = frames(3)
    torch.testing.assert_close(policy.logits(obs), decoder(latent_policy(normalize(obs))) / 2, **EXACT)


def test_two_path_policy_equals_a_full_forward_pass():
    """The mean of both paths' logits; the value reads the RL path, whose layers have moved on."""
    policy, latent_policy, decoder = two_paths()
    with torch.no_grad():
        for layer in (policy.fc, policy.policy_head):
            for param in layer.parameters():
                param.add_(0.1 * torch.randn_like(param))
    obs = frames(3)
    weights = dict(policy.named_parameters())
    h = hidden(weights, normalize(obs))
    logits_rl, value_rl = linear(weights, "policy_head", h), linear(weights, "value_head", h).squeeze(-1)
    logits_sl = decoder(latent_policy(normalize(obs)))
    logits, value = policy(*policy.encode(obs))
    torch.testing.assert_close(logits, (logits_rl + logits_sl) / 2, **EXACT)
    torch.testing.assert_close(value, value_rl, **EXACT)
    torch.testing.assert_close(policy.logits(obs), logits, rtol=0, atol=0)


def test_two_path_policy_trains_its_rl_path_alone():
    policy, latent_policy, _ = two_paths()
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable == {
        f"{layer}.{kind}" for layer in ("fc", "policy_head", "value_head") for kind in ("weight", "bias")
    }
    assert torch.equal(policy.fc.weight, latent_policy.fc.weight)
    assert torch.equal(policy.fc.bias, latent_policy.fc.bias)
    assert policy.fc.weight.data_ptr() != policy.sl_fc.weight.data_ptr()
    assert not policy.policy_head.weight.any()
    assert not policy.policy_head.bias.any()
    assert policy.policy_head.weight.shape == (15, 256)
    _, value = policy(*policy.encode(frames(2)))
    value.sum().backward()  # teaches the hidden layer as well
    assert policy.value_head.weight.grad.any()
    assert policy.fc.weight.grad.any()


def test_two_path_policys_rollout_encoding_carries_no_gradient():
    policy, _, _ = two_paths()
    features, logits_sl = policy.encode(frames(2))
    assert features.shape == (2, 2048)
    assert logits_sl.shape == (2, 15)
    assert not features.requires_grad
    assert not logits_sl.requires_grad


def test_two_path_policy_follows_a_new_decoder():
    policy, latent_policy, _ = two_paths()
    fresh = Decoder(16, 15, (12, 8))
    policy.decoder.load_state_dict(fresh.state_dict())
    obs = frames(3)
    torch.testing.assert_close(policy.logits(obs), fresh(latent_policy(normalize(obs))) / 2, **EXACT)


@pytest.mark.parametrize("kind", ["bc", "scratch", "offline", "online"])
def test_logits_and_values_are_in_fp32_under_autocast(kind):
    """In bf16, 256 logits would take a few dozen values, too coarse for PPO's ratios."""
    torch.manual_seed(0)
    network = make_acting_policy(load_config(["--preset", "demo", "--data.image_size", "64"]), kind, 15)
    for name in ("policy_head", "value_head"):
        if hasattr(network, name):
            nn.init.normal_(getattr(network, name).weight, std=0.1)
    obs = torch.randint(256, (256, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = [network.logits(obs)[:, 0]]
        if hasattr(network, "value_head"):
            outputs.append(network(*network.encode(obs))[1])
    for x in outputs:
        assert x.dtype == torch.float32
        assert len(x.unique()) > 200
