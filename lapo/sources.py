"""Where settings come from: YAML files and command lines, both as words that stay as they were written.

YAML reads some plain words as what they do not look like: 1.10 as 1.1, 0010 as 8, off as false, 1:30 as 90,
2024-01-15 as a date; and 1e-4, which looks like a number, as text. Here the types of the config decide, not
YAML: `exp: 1.10` is the name "1.10", `lr: 1e-4` a number, `compile: off` the word.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from lapo.errors import UserError

NULL, MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Reads plain words as text, except for null and `<<`; refuses a key that stands twice in a group."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (NULL, MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Like the base class's, checked before `<<` adds keys that may well stand twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    problem = f"'{key.value}' stands there twice, first in line {lines[key.value]}; keep one"
                    raise ConstructorError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
                if key.tag != MERGE:
                    key.tag = self.DEFAULT_SCALAR_TAG
        return node


def read_yaml(path: Path) -> dict:
    """The groups and words of a YAML file; {} if it is empty.

    Raises `UserError` for a file that is missing, no text, not valid YAML, or no `key: value` lines.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows marks the beginning of UTF-8
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from None
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{where} is not valid YAML: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, found a {type(values).__name__}")
    return values


def merge(base: dict, changes: Any, source: str) -> dict:
    """`base` with `changes`, which come from `source`, laid over it, group by group.

    A group of which nothing is left, as all its lines are commented out, changes nothing. Raises `UserError`
    if `changes` is no group.
    """
    if changes is None:
        return base
    if not isinstance(changes, dict):
        raise UserError(f"{source} must hold `key: value` lines, found {changes!r}")
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(merged.get(key), dict) and (value is None or isinstance(value, dict))
        merged[key] = merge(merged[key], value, source) if nested else value
    return merged


def read_options(
    argv: list[str], short: dict[str, str], several: Collection[str] = ()
) -> dict[str, list[str]]:
    """The words of a command line by option, the last ones of each: `--a.b-c 1 2` → {"a.b_c": ["1", "2"]}.

    `short` gives further names of options; those in `several` add up when repeated. Raises `UserError` for a
    word that belongs to no option, and an option without a word; "help" alone has none.
    """
    options: dict[str, list[str]] = {}
    words: list[str] | None = None
    for word in argv:
        if word in ("-h", "--help"):
            options["help"] = []
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            name = short.get(name, name)
            before = options.pop(name, [])
            words = options[name] = before if name in several else []
            words.extend([value] if equals else [])
        elif words is None:
            raise UserError(f"the command line: found '{word}' where an option such as --env was expected")
        else:
            words.append(word)
    empty = next((name for name, words in options.items() if not words and name != "help"), None)
    if empty:
        raise UserError(f"the command line: --{empty} needs a value")
    return options


def nested(key: str, words: list[str]) -> dict:
    """`a.b` and its words as {"a": {"b": words}}; validation turns words into numbers and lists."""
    value: Any = words[0] if len(words) == 1 else words
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
