"""A short name for stage3_decode.py: `python stage3.py --env bigfish`."""

from lapo.errors import run_main
from lapo.stage3_decode import main

if __name__ == "__main__":
    run_main(main)
