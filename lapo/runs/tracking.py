"""Logging to Weights & Biases, or to nothing."""

from pathlib import Path
from typing import Any

from lapo.config import Config, to_dict
from lapo.errors import UserError


class NoTracking:
    """Stands in for a wandb run and discards all metrics."""

    id = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


def start_wandb(cfg: Config, stage: str, folder: Path, run_id: str | None) -> Any:
    """Start, or with `run_id` resume, a wandb run in project lapo_stage1..3 or lapo_expert; or `NoTracking`.

    Without an account or a connection, metrics are kept offline: with a notice, without a prompt. Raises
    `UserError` if wandb cannot start at all.
    """
    if cfg.wandb == "disabled":
        return NoTracking()
    import wandb

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
        if cfg.wandb == "online" and _has_account():
            try:
                return wandb.init(
                    mode="online", settings=wandb.Settings(silent=True, init_timeout=60), **options
                )
            except (wandb.Error, OSError) as error:
                print(f"wandb: no connection ({_flat(error)}), so metrics are kept offline")
        return wandb.init(mode="offline", settings=wandb.Settings(silent=True), **options)
    except Exception as error:  # an invalid server address, for instance
        raise UserError(
            f"wandb cannot start ({_flat(error)}); fix that, or choose --wandb disabled"
        ) from None


def _has_account() -> bool:
    """Whether wandb has an API key for its server; prints a notice if not. Neither prompts nor connects."""
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="online"))  # as --wandb says, whatever WANDB_MODE
    reason = "nobody is logged in here"
    try:
        if wandb.login(prompt=False, verify=False):
            return True
    except wandb.Error as error:
        reason = _flat(error)
    print(f"wandb: {reason}, so metrics are kept offline; `wandb login`, then `wandb sync`")
    return False


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
