"""Networks made from a config, and what a later stage inherits from an earlier one."""

from dataclasses import replace

from config import Config, ModelConfig, VQConfig, to_dict, validate
from models import (
    IDM,
    ActorCritic,
    DecodedPolicy,
    Decoder,
    Policy,
    TwoPathPolicy,
    VectorQuantizer,
    WorldModel,
)
from procgen_env import ACTIONS
from runs import diff


def make_idm(cfg: Config) -> IDM:
    """The inverse dynamics model, with the bottleneck that `cfg.vq` asks for."""
    vq = to_dict(cfg.vq)
    enabled = vq.pop("enabled")
    return IDM(cfg.model.idm_scale, cfg.vq.la_dim, VectorQuantizer(**vq) if enabled else None)


def make_world_model(cfg: Config) -> WorldModel:
    """The world model."""
    return WorldModel(cfg.vq.la_dim, cfg.model.wm_width)


def make_latent_policy(cfg: Config) -> Policy:
    """The latent policy: frame → latent action."""
    return Policy(cfg.vq.la_dim, cfg.model.policy_scale)


def make_decoder(cfg: Config, num_actions: int) -> Decoder:
    """The decoder: latent action → logits of `num_actions` true actions."""
    return Decoder(cfg.vq.la_dim, num_actions, tuple(cfg.decoder.hidden))


def make_acting_policy(
    cfg: Config, mode: str, latent_policy: dict | None = None
) -> Policy | DecodedPolicy | TwoPathPolicy:
    """The network that acts after stage 3 in `mode`; its `logits` maps frames to the logits of true actions.

    `latent_policy` are the weights to start from, in the modes that build on one.
    """
    if mode == "bc":
        return Policy(len(ACTIONS), cfg.model.policy_scale)
    if mode == "scratch":
        return ActorCritic(len(ACTIONS), cfg.model.policy_scale)
    policy, decoder = make_latent_policy(cfg), make_decoder(cfg, len(ACTIONS))
    if latent_policy:
        policy.load_state_dict(latent_policy)
    return (
        DecodedPolicy(policy, decoder) if mode == "offline" else TwoPathPolicy(policy, decoder, len(ACTIONS))
    )


def inherit(cfg: Config, checkpoint: dict, model_keys: tuple[str, ...]) -> Config:
    """`cfg` with the bottleneck and the named sizes of an earlier stage's checkpoint; prints what changes."""
    saved = checkpoint["config"]
    model = to_dict(cfg.model) | {key: saved["model"][key] for key in model_keys}
    changes = diff({"model": to_dict(cfg.model), "vq": to_dict(cfg.vq)}, {"model": model, "vq": saved["vq"]})
    print(f"inherits {', '.join(model_keys)}, vq" + (f" ({'; '.join(changes)})" if changes else ""))
    return replace(cfg, model=validate(model, ModelConfig), vq=validate(saved["vq"], VQConfig))
