"""The networks of LAPO.

Dimensions
    B batch · T frames of a window (3) · C, H, W image channels, height, width (64×64) · A true actions (15)

A window holds `context` frames (1), then o[t] and o[t+1]: T = context + 2. `la` is the latent action between
o[t] and o[t+1] before quantisation, `la_q` after it, and `ta` is the true action at o[t]. Images enter the
networks as x/255 - 0.5, see `normalize`.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lapo.bottleneck import Bottleneck, Quantized, make_bottleneck
from lapo.config import Config
from lapo.frames import CHANNELS
from lapo.modes import MODES
from lapo.runs.compute import Compute

NetworkT = TypeVar("NetworkT", bound=nn.Module)
HIDDEN = 256


def normalize(obs: Tensor) -> Tensor:
    """uint8 frames (..., H, W, C) as stored → float frames (..., C, H, W) in [-0.5, 0.5].

    The memory layout does not change: a batch of frames is then in PyTorch's channels-last format.
    """
    return obs.movedim(-1, -3).float().div_(255).sub_(0.5)


def to_frames(images: Tensor) -> Tensor:
    """Float images (..., C, H, W) in [-0.5, 0.5] → uint8 frames (..., H, W, C)."""
    return ((images + 0.5) * 255).round().clamp(0, 255).byte().movedim(-3, -1)


def stack_frames(frames: Tensor) -> Tensor:
    """Stack a window's frames on the channels: (B, T, H, W, C) uint8 → (B, T·C, H, W) float, normalised."""
    return normalize(rearrange(frames, "b t h w c -> b h w (t c)"))


def split_window(images: Tensor) -> tuple[Tensor, Tensor]:
    """Stacked frames (B, T·C, H, W) → those up to o[t] (B, (T-1)·C, H, W), and o[t+1] (B, C, H, W)."""
    return images[:, :-CHANNELS], images[:, -CHANNELS:]


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Put networks into eval mode, and afterwards back into the mode that they were in."""
    training = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, mode in zip(networks, training, strict=True):
            network.train(mode)


class Head(nn.Linear):
    """A network's last layer, computed in the precision of its weights even under autocast.

    bf16 resolves logits around 4 only to 1/32, which is too coarse for PPO's probability ratios.
    """

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


# ---------------------------------------------------------------- IMPALA


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), convolutions 3×3, `hidden` channels between (default: `channels`)."""

    def __init__(self, channels: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or channels
        self.conv0 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv1 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # In place where autograd does not need the old value: this saves a pass over memory.
        return self.conv1(F.relu(self.conv0(F.relu(x)), inplace=True)).add_(x)


class ImpalaTrunk(nn.Sequential):
    """IMPALA ResNet (Espeholt et al. 2018): images (B, C, H, W) → features (B, `out_dim`), after a ReLU."""

    def __init__(self, in_channels: int, scale: int, image_size: int = 64):
        layers: list[nn.Module] = []
        for out_channels in (16 * scale, 32 * scale, 32 * scale):
            layers += [
                nn.Conv2d(in_channels, out_channels, 3, padding=1),
                nn.MaxPool2d(3, stride=2, padding=1),
                ResidualBlock(out_channels),
                ResidualBlock(out_channels),
            ]
            in_channels = out_channels
        super().__init__(*layers, nn.Flatten(), nn.ReLU())
        self.image_size = image_size
        self.out_dim = 32 * scale * (image_size // 8) ** 2


# ---------------------------------------------------------------- inverse dynamics model


class IDM(nn.Module):
    """Inverse dynamics model: a window → the latent action between o[t] and o[t+1].

    With `vq=None`, latents are neither normalised nor quantised.
    """

    def __init__(
        self, scale: int, la_dim: int, vq: Bottleneck | None = None, context: int = 1, image_size: int = 64
    ):
        super().__init__()
        self.window = context + 2
        self.trunk = ImpalaTrunk(self.window * CHANNELS, scale, image_size)
        self.fc = nn.Linear(self.trunk.out_dim, HIDDEN)
        self.head = nn.Linear(HIDDEN, la_dim)
        self.vq = vq or Bottleneck(la_dim)

    def infer_latents(self, window: Tensor) -> Tensor:
        """Window (B, T·C, H, W) → latent action before quantisation `la` (B, la_dim)."""
        return self.vq.project(self.head(F.relu(self.fc(self.trunk(window)))))

    def quantize(self, la: Tensor) -> Quantized:
        """Quantise `la` (B, la_dim)."""
        return self.vq(la)

    def forward(self, window: Tensor) -> tuple[Tensor, Quantized]:
        """Window (B, T·C, H, W) → `la` (B, la_dim) and its quantisation."""
        la = self.infer_latents(window)
        return la, self.quantize(la)


@torch.no_grad()
def infer_latents(idm: IDM, batches: Iterable[Tensor], compute: Compute) -> Tensor:
    """Infer the latent actions `la` (M, la_dim), fp32, of M windows with the IDM in eval mode.

    `batches` yields the windows' frames, (B, T, H, W, C) uint8.
    """
    with eval_mode(idm), compute.autocast():
        return torch.cat([idm.infer_latents(stack_frames(frames)).float() for frames in batches])


# ---------------------------------------------------------------- world model


class DownBlock(nn.Module):
    """conv → BatchNorm → residual block → max-pool by 2 → ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = ResidualBlock(out_channels, out_channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.conv(x))

    def finish(self, x: Tensor) -> Tensor:
        """All layers after the first convolution."""
        return F.relu(F.max_pool2d(self.residual(self.norm(x)), 2), inplace=True)


class UpBlock(nn.Module):
    """Concatenate the skip connection → transposed conv by 2 → BatchNorm → residual block → ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = ResidualBlock(out_channels, out_channels // 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([x, skip], 1)
        x = (
            pixel_to_square(x, self.conv)
            if torch.compiler.is_compiling() and x.shape[-1] == 1
            else self.conv(x)
        )
        return F.relu(self.residual(self.norm(x)), inplace=True)


# Convolutions between 2×2 pixels and one pixel, written as matrix products. Compiled steps use these, because
# torch.compile (2.11) fails on CUDA on the memory layout of such convolutions' weight gradients.


def square_to_pixel(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(B, I, 2, 2) → (B, O, 1, 1), by a 2×2 convolution."""
    return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)[..., None, None]


def pixel_to_square(x: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
    """(B, I, 1, 1) → (B, O, 2, 2), by a transposed 2×2 convolution of stride 2."""
    square = F.linear(x.flatten(1), conv.weight.flatten(1).T, conv.bias.repeat_interleave(4))
    return square.unflatten(1, (-1, 2, 2))


class UNet(nn.Module):
    """The U-Net (Ronneberger et al. 2015) of `WorldModel` and `Generator`.

    Each level halves the image and doubles the width; the bottleneck makes one pixel of the last 2×2, which
    is concatenated with `la_dim` numbers.
    """

    def __init__(self, in_channels: int, image_channels: int, la_dim: int, width: int, image_size: int):
        """`in_channels` of the first convolution; `image_channels` are concatenated to the last level."""
        super().__init__()
        levels = image_size.bit_length() - 2
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(
            DownBlock(i, o) for i, o in zip((in_channels, *widths[:-1]), widths, strict=True)
        )
        self.bottleneck = nn.Conv2d(widths[-1], 2 * widths[-1], 2)
        inputs = (2 * widths[-1] + la_dim, *(2 * w for w in reversed(widths)))
        outputs = (*reversed(widths), width)
        self.up = nn.ModuleList(UpBlock(i, o) for i, o in zip(inputs, outputs, strict=True))
        self.out = nn.Sequential(
            nn.Conv2d(width + image_channels, width, 3, padding=1),
            ResidualBlock(width, width // 2),
            nn.ReLU(),
            nn.Conv2d(width, CHANNELS, 1),
        )

    def ascend(self, skips: list[Tensor], action: Tensor, images: Tensor) -> Tensor:
        """All levels' outputs (B, b, h, w), action (B, la_dim), images (B, I, H, W) → (B, C, H, W)."""
        compiled = torch.compiler.is_compiling()
        x = square_to_pixel(skips[-1], self.bottleneck) if compiled else self.bottleneck(skips[-1])
        for block, skip in zip(self.up, [action[:, :, None, None], *reversed(skips)], strict=True):
            x = block(x, skip.to(x.dtype))
        return self.out(torch.cat([x, images.to(x.dtype)], 1)).float()


class WorldModel(UNet):
    """A U-Net that predicts o[t+1] from the frames before it and the latent action.

    The latent action enters twice: as constant input channels, and at the 1×1 bottleneck. With
    `fold_action=True` the first convolution over the constant channels is computed in a cheaper, equal form
    (see `action_map`). With False the channels are concatenated, as published.
    """

    edge_taps: Tensor

    def __init__(
        self, la_dim: int, width: int, fold_action: bool = True, context: int = 1, image_size: int = 64
    ):
        past_channels = (context + 1) * CHANNELS
        super().__init__(past_channels + la_dim, past_channels, la_dim, width, image_size)
        self.fold_action, self.past_channels = fold_action, past_channels
        # edge_taps[y, k]: 1 if tap k of a 3-tap kernel at position y reads a pixel, 0 if it reads padding.
        source = torch.arange(image_size)[:, None] + torch.arange(-1, 2)
        self.register_buffer("edge_taps", ((source >= 0) & (source < image_size)).float(), persistent=False)

    def action_map(self, la_q: Tensor) -> Tensor:
        """The first convolution, without bias, over la_q (B, la_dim) as constant channels: (B, b, H, W).

        At each pixel a constant channel contributes its value times the sum of the kernel's taps inside the
        image. So latent and kernel are multiplied first, (B, b, 3, 3), and then summed over these taps.
        """
        kernel = self.down[0].conv.weight[:, self.past_channels :]  # (b, la_dim, 3, 3)
        taps = torch.einsum("bd,odij->bijo", la_q, kernel)
        edge = self.edge_taps.to(taps.dtype)
        return torch.einsum("hi,wj,bijo->bhwo", edge, edge, taps).permute(0, 3, 1, 2)

    def forward(self, images: Tensor, la_q: Tensor) -> Tensor:
        """Frames up to o[t] (B, (T-1)·C, H, W), la_q (B, la_dim) → predicted o[t+1] (B, C, H, W)."""
        if self.fold_action:
            first = self.down[0].conv
            x = F.conv2d(
                images, first.weight[:, : self.past_channels], first.bias, padding=1
            ) + self.action_map(la_q)
            x = self.down[0].finish(x)
        else:
            action = la_q[:, :, None, None].expand(-1, -1, *images.shape[2:])
            x = self.down[0](torch.cat([images, action], 1))
        skips = [x]
        for block in self.down[1:]:
            x = block(x)
            skips.append(x)
        return self.ascend(skips, la_q, images).tanh() / 2


class Generator(UNet):
    """ILPO's generator (Edwards et al. 2019): the change o[t+1] - o[t] under each of Z latent actions.

    The latent action enters at the bottleneck, as a one-hot vector, so that the way down is computed once.
    The output is linear: changes span ±1.
    """

    def __init__(self, num_actions: int, width: int, image_size: int = 64):
        super().__init__(CHANNELS, CHANNELS, num_actions, width, image_size)
        self.num_actions = num_actions

    def forward(self, images: Tensor) -> Tensor:
        """o[t] (B, C, H, W) → changes (B, Z, C, H, W)."""
        x, skips = images, []
        for block in self.down:
            x = block(x)
            skips.append(x)
        one_hot = torch.eye(self.num_actions, device=images.device).repeat(len(images), 1)  # (B·Z, Z)
        skips, (images,) = (
            [level.repeat_interleave(self.num_actions, 0) for level in levels] for levels in (skips, [images])
        )
        return self.ascend(skips, one_hot, images).unflatten(0, (-1, self.num_actions))


# ---------------------------------------------------------------- policies


class Policy(nn.Module):
    """One frame → a latent action (stage 2) or action logits (behaviour cloning), of size `action_dim`."""

    def __init__(self, action_dim: int, scale: int, image_size: int = 64):
        super().__init__()
        self.trunk = ImpalaTrunk(CHANNELS, scale, image_size)
        self.fc = nn.Linear(self.trunk.out_dim, HIDDEN)
        self.policy_head = Head(HIDDEN, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        """obs (B, C, H, W) → (B, action_dim)."""
        return self.policy_head(F.relu(self.fc(self.trunk(obs))))

    def logits(self, frames: Tensor) -> Tensor:
        """Frames (B, H, W, C) uint8 → logits (B, A) in fp32, if the outputs are action logits."""
        return self(normalize(frames))


def make_value_head() -> Head:
    """The value head, 256 → 1: orthogonal initialisation with gain √2, zero bias."""
    head = Head(HIDDEN, 1)
    nn.init.orthogonal_(head.weight, 2**0.5)
    nn.init.zeros_(head.bias)
    return head


class ActorCritic(Policy):
    """Policy and value for PPO. `encode` runs once per env step; `forward` runs in every minibatch, too."""

    def __init__(self, action_dim: int, scale: int, image_size: int = 64):
        super().__init__(action_dim, scale, image_size)
        self.value_head = make_value_head()

    def encode(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Frames (B, H, W, C) uint8 → what a rollout stores: the frames, because all layers are trained."""
        return (frames,)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames (B, H, W, C) uint8 → logits (B, A), value (B,)."""
        hidden = F.relu(self.fc(self.trunk(normalize(frames))))
        return self.policy_head(hidden), self.value_head(hidden).squeeze(-1)

    def logits(self, frames: Tensor) -> Tensor:
        """Frames (B, H, W, C) uint8 → logits (B, A)."""
        return self(frames)[0]


class Decoder(nn.Sequential):
    """Latent action (B, la_dim) → logits of the true action (B, A)."""

    def __init__(self, la_dim: int, num_actions: int, hidden: tuple[int, ...]):
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(la_dim, width), nn.ReLU()]
            la_dim = width
        super().__init__(*layers, Head(la_dim, num_actions))


class DecodedPolicy(nn.Module):
    """A latent policy that acts through a decoder: frames → latent action → true action."""

    def __init__(self, latent_policy: Policy, decoder: Decoder):
        super().__init__()
        self.latent_policy, self.decoder = latent_policy, decoder

    def logits(self, frames: Tensor) -> Tensor:
        """Frames (B, H, W, C) uint8 → logits (B, A) in fp32."""
        return self.decoder(self.latent_policy(normalize(frames)))


def make_policy_head(num_actions: int) -> Head:
    """The RL path's head, 256 → A: zero, so that it prefers no action."""
    head = Head(HIDDEN, num_actions)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class FrozenTrunkPolicy(nn.Module):
    """PPO's policy on a frozen trunk: the RL path of `TwoPathPolicy` alone, whose logits are not halved."""

    def __init__(self, pretrained: Policy, num_actions: int):
        super().__init__()
        self.trunk = pretrained.trunk.requires_grad_(False)
        self.fc = pretrained.fc
        self.policy_head = make_policy_head(num_actions)
        self.value_head = make_value_head()

    @torch.no_grad()
    def encode(self, frames: Tensor) -> tuple[Tensor]:
        """Frames (B, H, W, C) uint8 → what a rollout stores: features (B, out_dim)."""
        return (self.trunk(normalize(frames)),)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, out_dim) → logits (B, A), value (B,)."""
        hidden = F.relu(self.fc(features))
        return self.policy_head(hidden), self.value_head(hidden).squeeze(-1)

    def logits(self, frames: Tensor) -> Tensor:
        """Frames (B, H, W, C) uint8 → logits (B, A)."""
        return self(*self.encode(frames))[0]


class TwoPathPolicy(nn.Module):
    """The acting policy of online mode, on the frozen trunk of a latent policy.

    SL path: the latent policy's frozen layers, then the decoder. RL path: a hidden layer initialised from the
    latent policy's, then a head initialised to zero. The logits are the mean of both paths, so at first they
    are half the decoder's. The input of the value head is the RL path's hidden layer.
    """

    def __init__(self, latent_policy: Policy, decoder: Decoder, num_actions: int):
        super().__init__()
        self.trunk = latent_policy.trunk.requires_grad_(False)
        self.sl_fc = latent_policy.fc.requires_grad_(False)
        self.sl_head = latent_policy.policy_head.requires_grad_(False)
        self.decoder = decoder.requires_grad_(False)
        self.fc = copy.deepcopy(self.sl_fc).requires_grad_(True)
        self.policy_head = make_policy_head(num_actions)
        self.value_head = make_value_head()

    @torch.no_grad()
    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, H, W, C) uint8 → what a rollout stores: features (B, out_dim), SL logits (B, A).

        Their layers are frozen, so both are computed once per env step, not in every epoch of PPO.
        """
        features = self.trunk(normalize(frames))
        return features, self.decoder(self.sl_head(F.relu(self.sl_fc(features))))

    def forward(self, features: Tensor, logits_sl: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, out_dim), SL logits (B, A) → logits (B, A), value (B,)."""
        hidden = F.relu(self.fc(features))
        logits = (self.policy_head(hidden) + logits_sl) / 2
        return logits, self.value_head(hidden).squeeze(-1)

    def logits(self, frames: Tensor) -> Tensor:
        """Frames (B, H, W, C) uint8 → logits (B, A)."""
        return self(*self.encode(frames))[0]


# ---------------------------------------------------------------- from a config


def make_idm(cfg: Config) -> IDM:
    """The inverse dynamics model, with the bottleneck of `cfg.vq`."""
    return IDM(
        cfg.model.idm_scale, cfg.vq.la_dim, make_bottleneck(cfg), cfg.data.context, cfg.data.image_size
    )


def make_world_model(cfg: Config, fold_action: bool = True) -> WorldModel:
    """The world model."""
    return WorldModel(cfg.vq.la_dim, cfg.model.wm_width, fold_action, cfg.data.context, cfg.data.image_size)


def image_size_of(network: nn.Module) -> int:
    """Pixels of the side of the frames that a network takes."""
    return next(part.image_size for part in network.modules() if isinstance(part, ImpalaTrunk))


def restore(network: NetworkT, state: dict, compute: Compute) -> NetworkT:
    """Load the weights `state`, move to the device, freeze, set to eval mode; returns the network."""
    network.load_state_dict(state)
    return compute.place(network).eval().requires_grad_(False)


def make_latent_policy(cfg: Config) -> Policy:
    """The latent policy: frame → latent action."""
    return Policy(cfg.vq.la_dim, cfg.model.policy_scale, cfg.data.image_size)


def make_decoder(cfg: Config, num_actions: int) -> Decoder:
    """The decoder: latent action → logits of `num_actions` true actions."""
    return Decoder(cfg.vq.la_dim, num_actions, tuple(cfg.decoder.hidden))


def make_supervised_idm(cfg: Config, num_actions: int) -> nn.Sequential:
    """An IDM without bottleneck, and a decoder: windows (B, T·C, H, W) → logits of true actions (B, A)."""
    idm = IDM(cfg.model.idm_scale, cfg.vq.la_dim, None, cfg.data.context, cfg.data.image_size)
    return nn.Sequential(idm.trunk, idm.fc, nn.ReLU(), idm.head, make_decoder(cfg, num_actions))


def make_ilpo_policy(cfg: Config) -> Policy:
    """ILPO's latent policy: frame → logits of its discrete latent actions."""
    return Policy(cfg.ilpo.num_actions, cfg.model.policy_scale, cfg.data.image_size)


def make_acting_policy(
    cfg: Config, mode: str, num_actions: int, pretrained: dict | None = None
) -> Policy | DecodedPolicy | FrozenTrunkPolicy | TwoPathPolicy:
    """Stage 3's acting policy in `mode`. Its `logits` maps frames to logits of `num_actions` true actions.

    `pretrained` holds the initial weights of the latent policy, in the modes that use one.
    """
    kind = MODES[mode].network
    if kind == "policy":
        return Policy(num_actions, cfg.model.policy_scale, cfg.data.image_size)
    if kind == "actor-critic":
        return ActorCritic(num_actions, cfg.model.policy_scale, cfg.data.image_size)
    policy = make_ilpo_policy(cfg) if mode == "ilpo" else make_latent_policy(cfg)
    decoder = None if kind == "frozen-trunk" else make_decoder(cfg, num_actions)
    if pretrained:
        policy.load_state_dict(pretrained)
    if kind == "frozen-trunk":
        return FrozenTrunkPolicy(policy, num_actions)
    return (
        DecodedPolicy(policy, decoder) if kind == "decoded" else TwoPathPolicy(policy, decoder, num_actions)
    )
