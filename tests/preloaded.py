"""Imported once by a fork server, so that its processes need not: the stages, and the simulator's images."""

import threading

from tqdm import tqdm

import support
from lapo import stage1_idm_wm, stage2_bc, stage3_decode
from lapo.games.vec_env import VecEnv

__all__ = ["stage1_idm_wm", "stage2_bc", "stage3_decode", "support"]

VecEnv("bossfight", 1, seed=0, num_threads=0).close()
tqdm.set_lock(threading.RLock())  # the usual one is shared by processes, and a killed one leaves it behind
