"""The package: its layers, what it may import, and that a script runs the code that it lies beside."""

import ast
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from setuptools import find_namespace_packages
from setuptools.config.pyprojecttoml import read_configuration

from support import LAPO, PATIENCE, ROOT

LAYERS = (
    ("errors",),
    ("command_line", "frames", "modes", "sources"),
    ("config", "games"),
    ("runs",),
    ("data", "bottleneck"),
    ("models",),
    ("data_loader", "decoding", "policies"),
    ("probe", "acting", "imitation", "ilpo"),
    ("ppo", "sweep", "steering"),
    ("interface",),
    ("experts", "reporting"),
    ("stage1_idm_wm", "stage2_bc", "stage3_decode"),
    ("benchmarks",),
    (
        *("stage1", "stage2", "stage3", "evaluate", "report", "results", "benchmark", "same_learning"),
        *("expert_table", "record_expert", "train_expert", "import_video", "download_data", "get_frames"),
    ),
    ("grid",),
)
"""Modules at the top of lapo/ and packages, the lowest first: each imports from lower layers alone."""
MODULES = sorted(path for path in LAPO.rglob("*.py") if path != LAPO / "lapo.py")


def name_of(path: Path) -> str:
    """`lapo/runs/files.py` → `runs.files`; a package's `__init__.py` → its name, the top one's → "" ."""
    return ".".join(path.relative_to(LAPO).with_suffix("").parts).removesuffix("__init__").rstrip(".")


NAMES = {name_of(path): path for path in MODULES}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            # `from lapo.runs import compute` imports a module, `from lapo.config import Config` a name.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in whole if name.removeprefix("lapo.") in NAMES}
            found |= modules or {node.module}
    return {name.removeprefix("lapo.") for name in found if name.split(".")[0] == "lapo"}


def test_imports_run_downwards():
    layer = {unit: number for number, units in enumerate(LAYERS) for unit in units}
    assert {name.split(".")[0] for name in NAMES} - {""} == layer.keys()
    layer[""] = len(LAYERS)  # the package itself hands out the interface, when it is asked for it
    upwards = []
    for name, path in NAMES.items():
        unit = name.split(".")[0]
        for imported in sorted(imports(path)):
            other = imported.split(".")[0]
            if unit != other and not layer[other] < layer[unit]:
                upwards.append(f"{name} imports {imported}")
    assert upwards == []


def test_no_imports_in_a_circle():
    graph = {name: imports(path) for name, path in NAMES.items()}
    assert "games.table" in graph["games.vec_env"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_file_is_long():
    assert {
        name: lines for name, path in NAMES.items() if (lines := len(path.read_text().splitlines())) > 550
    } == {}


def test_text_files_are_utf8_in_every_locale():
    """`read_text` and `write_text` name it; what the system shows below /proc is ASCII."""
    unnamed = []
    for name, path in NAMES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node)
                named = any(keyword.arg == "encoding" for keyword in node.keywords)
                if node.func.attr in ("read_text", "write_text") and not named and "/proc/" not in call:
                    unnamed.append(f"{name}: {call}")
    assert unnamed == []


@pytest.mark.parametrize("package", sorted(path.parent.name for path in LAPO.glob("*/__init__.py")))
def test_packages_say_what_they_hold_and_what_not(package):
    tree = ast.parse((LAPO / package / "__init__.py").read_text())
    assert len(tree.body) == 1  # nothing happens at import
    assert len(re.findall(r"[.;](?=\s|$)", ast.get_docstring(tree))) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("models", "procgen gym gym3 matplotlib wandb lapo.games lapo.experts lapo.data"),
        ("data_loader", "procgen matplotlib lapo.models lapo.experts lapo.games.vec_env"),
        ("stage1_idm_wm", "procgen gym gym3 matplotlib wandb gdown av lapo.experts lapo.ppo"),
        ("stage3_decode", "procgen matplotlib wandb lapo.experts lapo.reporting"),
        ("interface", "procgen gym gym3 matplotlib wandb lapo.games.vec_env lapo.ppo lapo.experts"),
        ("reporting.summary", "matplotlib lapo.experts"),
        ("reporting.inspection", "matplotlib lapo.experts"),
        ("reporting.comparison", "matplotlib lapo.experts"),
        ("record_expert", "torch matplotlib"),
    ],
)
def test_importing_brings_only_what_it_needs(module, forbidden):
    """In a process of its own; a module that is imported late, in a function, does not count."""
    code = f"import sys, lapo.{module}; print(*(set({forbidden.split()}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# ---------------------------------------------------------------- which code runs


@pytest.fixture(scope="module")
def clones(tmp_path_factory) -> tuple[Path, Path]:
    """Two checkouts whose default experiments have different names, and links to the first one's files."""
    folder = tmp_path_factory.mktemp("clones")
    for name in ("here", "installed"):
        shutil.copytree(LAPO, folder / name / "lapo", ignore=shutil.ignore_patterns("__pycache__"))
        config = folder / name / "lapo" / "config.yaml"
        config.write_text(config.read_text().replace("exp: main ", f"exp: {name} "))
    (folder / "links").mkdir()
    for name in ("stage1.py", "launch.sh"):
        (folder / "links" / name).symlink_to(folder / "here" / "lapo" / name)
    (folder / "linked").symlink_to(folder / "here" / "lapo")
    return folder / "here", folder / "installed"


@pytest.mark.parametrize(
    ("cwd", "command"),
    [
        ("here/lapo", "{python} stage1.py"),
        ("here/lapo", "{python} -m lapo.stage1"),
        ("here", "{python} -m lapo.stage1"),
        ("here", "{python} -m lapo.stage1_idm_wm"),
        (".", "{python} here/lapo/stage1_idm_wm.py"),
        (".", "{python} links/stage1.py"),
        ("linked", "{python} stage1.py"),
        ("installed/lapo", "{python} ../../here/lapo/stage1.py"),
        (".", "bash here/lapo/launch.sh maze --stages 3 --modes bc"),
        ("installed", "bash ../links/launch.sh maze --stages 3 --modes bc"),
    ],
)
def test_a_script_runs_the_checkout_that_it_lies_in(clones, cwd, command):
    """Though another one is installed: it tells where it looks for data and where its results would lie."""
    here, installed = clones
    command = command.format(python=sys.executable).split()
    done = subprocess.run(
        [*command, "--env", "maze"] if command[0] != "bash" else command,
        cwd=here.parent / cwd,
        env=os.environ | {"PYTHONPATH": str(installed), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode != 0
    if command[0] == "bash":
        assert f"there are no frames of maze in {here}/expert_data;" in done.stderr
    else:
        assert f"the data folder {here}/expert_data/maze does not exist" in done.stderr
        assert f"{here}/exp_results/here/maze/seed0/stage1" in done.stdout


def test_only_the_package_is_installed():
    """Whoever installs it sees `lapo`, and no other folder of this repository as a module."""
    settings = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    found = find_namespace_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    assert {name.split(".")[0] for name in found} == {"lapo"}
    assert {"lapo.games", "lapo.runs"} <= set(found)
