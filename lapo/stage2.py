"""A short name for stage2_bc.py: `python stage2.py --env bigfish`."""

from lapo.errors import run_main
from lapo.stage2_bc import main

if __name__ == "__main__":
    run_main(main)
