"""Latent action policies: learning to act from videos without actions (Schmidt & Jiang, ICLR 2024).

For code of your own (NumPy or PyTorch; shapes and errors: `lapo.interface`; frames and windows are those of
the training, by default 64×64 pixels, uint8, and two frames before a prediction):

    model = lapo.load_stage1(run)            IDM and world model of a run, frozen and in eval mode
    model.infer(video, done=None)            (T, 64, 64, 3), bool (T,)
                                             → la, la_q (T, D), codes (T, N, L), valid (T,)
    model.quantize(la)                       (B, D) → la_q (B, D), indices (B, N, L)
    model.decode(codes)                      (B, N, L) → la_q (B, D)
    model.predict(frames, la_q)              (B, 2, 64, 64, 3), (B, D) → (B, 64, 64, 3)
    model.rollout(frames, la_q)              (B, 2, 64, 64, 3), (B, K, D) or (K, D) → (B, K, 64, 64, 3)
    policy = lapo.load_policy(folder)        a policy of stage 3, or an expert
    policy.act(obs, greedy=False)            (B, 64, 64, 3) → actions (B,); policy.logits(obs) → (B, 15)

The method lies at the top, in order: stage1_idm_wm, stage2_bc, stage3_decode, and what they share, models,
data_loader, ppo, decoding, probe and acting. What serves it lies in packages: games, runs, data, experts,
reporting, benchmarks.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors
    from lapo.interface import ActingPolicy, LatentActionModel, Latents, UserError, load_policy, load_stage1

__all__ = ["ActingPolicy", "LatentActionModel", "Latents", "UserError", "load_policy", "load_stage1"]


def __getattr__(name: str) -> Any:
    """The interface, imported when it is first used: scripts that do without PyTorch import `lapo`, too."""
    if name not in __all__:
        raise AttributeError(f"module 'lapo' has no attribute '{name}'")
    from lapo import interface

    return getattr(interface, name)


def __dir__() -> list[str]:
    """For completion and `help`."""
    return sorted([*globals(), *__all__])
