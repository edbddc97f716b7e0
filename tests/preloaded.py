"""Imported once by a fork server, so that its processes need not: the stages, and the simulator's images."""

import threading

from tqdm import tqdm

import conftest
import stage1_idm_wm
import stage2_bc
import stage3_decode
from procgen_env import VecEnv

__all__ = ["conftest", "stage1_idm_wm", "stage2_bc", "stage3_decode"]

VecEnv("bossfight", 1, seed=0, num_threads=0).close()
tqdm.set_lock(threading.RLock())  # the usual one is shared by processes, and a killed one leaves it behind
