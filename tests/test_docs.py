"""README and docs: short enough, and what they name exists: files, headings, commands, options."""

import io
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest

from lapo.config import load_config, to_dict
from support import LAPO, ROOT

PAGES = [ROOT / "README.md", ROOT / "expert_data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLURM = {"partition", "gpus", "cpus_per_task", "mem", "time", "signal"}
TORCHRUN = {"nproc_per_node"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """The prose of a page: code blocks, in which a # begins no heading, left out."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What links may name behind a #: the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ +(.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[str]:
    """The lines of the blocks marked bash, continued ones joined, comments left out."""
    for block in re.findall(
        r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition(" #")[0].strip()


def keys(values: dict, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


@cache
def options_of(script: str) -> set[str]:
    """What the help of a script names, with underscores; for those that read the config, all its keys."""
    if script.endswith(".sh"):
        text = (LAPO / script).read_text(encoding="utf-8")
    else:
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), suppress(SystemExit):
            patch.setattr(sys, "argv", [script, "--help"])
            runpy.run_path(str(LAPO / script), run_name="__main__")
        text = out.getvalue()
    options = {option.replace("-", "_") for option in re.findall(r"--([a-z][a-z_-]+)", text)}
    if "preset" in options or script in ("launch.sh", "slurm.sh"):
        options |= {"config", "preset", *keys(to_dict(load_config([])))}
    if script == "slurm.sh":
        options |= options_of("launch.sh") | SLURM
    return options | TORCHRUN


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_images_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_scripts_targets_and_options_that_exist(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    unknown = []
    for line in commands(page):
        unknown += [target for target in re.findall(r"\bmake (\w+)", line) if target not in targets]
        script = re.search(r"\b(?:python|bash|torchrun \S+ \S+) (\S+\.(?:py|sh))", line)
        if not script:
            continue
        name = Path(script[1]).name
        if not any((folder / name).exists() for folder in (LAPO, ROOT)):
            unknown.append(script[1])
        elif (LAPO / name).exists():
            options = {option.replace("-", "_") for option in re.findall(r"\s--([\w.-]+)", line)}
            unknown += sorted(options - options_of(name))
    assert unknown == []


def test_code_and_docs_point_to_files_that_exist():
    """Messages and comments say "see docs/data.md"."""
    missing = []
    for path in [*LAPO.rglob("*.py"), *LAPO.glob("*.sh"), *PAGES, ROOT / "setup_data.sh"]:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"(?<![\w/.])((?:docs|expert_data|tests)/[\w/]+\.(?:md|json|py|png))\b", text)
        missing += [f"{path.name}: {file}" for file in found if not (ROOT / file).exists()]
    assert missing == []
