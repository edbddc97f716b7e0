"""Weights & Biases, or nothing in its place."""

import os
from pathlib import Path
from typing import Any

from lapo.config import Config, to_dict


class NoTracking:
    """Takes metrics and keeps none; stands in for a wandb run."""

    id = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


def start_wandb(cfg: Config, stage: str, folder: Path, run_id: str | None) -> Any:
    """A wandb run in project lapo_stage1..3 or lapo_expert, continued if `run_id` is known; or its stand-in.

    Without an account at hand, or without a connection, metrics are kept offline, with a notice: never a
    prompt, never a crash.
    """
    if cfg.wandb == "disabled":
        return NoTracking()
    import wandb

    mode = cfg.wandb
    if mode == "online" and not _has_account():
        print(
            "wandb: nobody is logged in here, so metrics are kept offline; `wandb login`, then `wandb sync`"
        )
        mode = "offline"
    options = {
        "project": f"lapo_{stage[:6]}",
        "name": f"{cfg.exp}/{cfg.env}/seed{cfg.seed}/{stage}",
        "group": cfg.exp,
        "dir": folder,
        "config": to_dict(cfg),
        "id": run_id,
        "resume": "allow",
    }
    try:
        return wandb.init(mode=mode, settings=wandb.Settings(silent=True, init_timeout=60), **options)
    except (wandb.Error, OSError) as error:
        print(f"wandb: no connection ({' '.join(str(error).split())}), so metrics are kept offline")
        return wandb.init(mode="offline", settings=wandb.Settings(silent=True), **options)


def _has_account() -> bool:
    """Whether wandb would find a key without asking: in the environment or in a netrc file."""
    import netrc
    from urllib.parse import urlparse

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
