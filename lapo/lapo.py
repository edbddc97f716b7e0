"""How a script in this folder finds the package that it belongs to, installed or not.

`python lapo/stage1.py` makes this folder the first place in which Python looks for modules, so that
`import lapo` arrives here. This file puts the folder above in its place and hands over to the package there.
The script then runs the code beside it, even where another checkout is installed.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "lapo":
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]
    del sys.modules["lapo"]
    importlib.import_module("lapo")
