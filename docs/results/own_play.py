"""What latent actions tell of an agent's own actions: `python own_play.py exp_results/small/coinrun/seed1`.

The agent acts at random, each action for four steps. A classifier learns on half of the steps to name the
action's effect (left, jump, nothing, ...) from the latent action that the IDM infers. The same classifier is
then asked about the latent actions that the policy of stage 2 predicts for these frames.
"""

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import lapo
from lapo.acting import held_out_env
from lapo.frames import resize
from lapo.games.table import ACTIONS
from lapo.models import make_latent_policy, normalize
from lapo.runs.checkpoints import load_checkpoint, saved_config

STEPS = 300
EFFECTS = [name if name in ACTIONS[:9] and name not in ("DOWN", "NOOP") else "nothing" for name in ACTIONS]
EFFECTS = [name.removesuffix("-DOWN").lower() for name in EFFECTS]  # in these games, down does nothing


def main(run: Path) -> None:
    """Print the classifier's accuracy, and what it says of steps to the right and of the policy's latents."""
    model, checkpoint = lapo.load_stage1(run), load_checkpoint(run / "stage2" / "checkpoint.pt")
    cfg = saved_config(checkpoint)
    policy = make_latent_policy(cfg).eval()
    policy.load_state_dict(checkpoint["state"]["policy"])
    rng, la, predicted, effects = np.random.default_rng(0), [], [], []
    with closing(held_out_env(cfg.env, cfg.visuals, cfg.eval, seed=0)) as env:
        played, obs = [], env.observe()
        for step in range(STEPS):
            if step % 4 == 0:
                actions = rng.integers(len(ACTIONS), size=env.num_envs)
            following, _, done = env.step(actions)
            played.append((resize(obs, cfg.data.image_size), actions, done))
            obs = following
    frames, actions, done = (np.stack(parts, 1) for parts in zip(*played, strict=True))  # (N, T, …)
    for number in range(len(frames)):
        found = model.infer(frames[number], done[number])
        steps = found.valid.nonzero()[:, 0].cpu().numpy()
        la.append(found.la[steps].float().cpu())
        effects += [EFFECTS[action] for action in actions[number][steps]]
        with torch.no_grad():
            predicted.append(policy(normalize(torch.from_numpy(frames[number][steps]))).float())
    names, ta = np.unique(effects, return_inverse=True)
    la, predicted, ta = torch.cat(la), torch.cat(predicted), torch.from_numpy(ta)
    torch.manual_seed(0)
    train, test = torch.randperm(len(ta)).chunk(2)
    classifier = torch.nn.Sequential(
        torch.nn.Linear(la.shape[1], 128), torch.nn.ReLU(), torch.nn.Linear(128, len(names))
    )
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for _ in range(3000):
        ids = train[torch.randint(len(train), (256,))]
        optimizer.zero_grad()
        F.cross_entropy(classifier(la[ids]), ta[ids]).backward()
        optimizer.step()
    with torch.no_grad():
        own, asked = classifier(la[test]).softmax(-1), classifier(predicted).softmax(-1).mean(0)
    right = own[ta[test] == names.tolist().index("right")].mean(0)
    accuracy, commonest = (own.argmax(-1) == ta[test]).float().mean(), ta.bincount().max() / len(ta)
    print(f"accuracy {accuracy:.1%}, commonest {commonest:.1%}")
    for title, shares in (("steps to the right", right), ("the policy's latents", asked)):
        print(
            f"{title}:", ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares, strict=True))
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
