"""A short name for stage1_idm_wm.py: `python stage1.py --env bigfish`."""

from lapo.errors import run_main
from lapo.stage1_idm_wm import main

if __name__ == "__main__":
    run_main(main)
