"""YAML files of settings, read as words that stay as they were written.

YAML reads some plain words as what they do not look like: 1.10 as 1.1, 0010 as 8, off as false, 1:30 as 90,
2024-01-15 as a date; and 1e-4, which looks like a number, as text. Here the types of the config decide, not
YAML: `exp: 1.10` is the name "1.10", `lr: 1e-4` a number, `compile: off` the word.
"""

import re
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


def nested(key: str, value: Any) -> dict:
    """`a.b` and its value as {"a": {"b": value}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def leaves(values: dict, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by their dotted keys: {"a": {"b": 1}} → {"a.b": 1}."""
    found = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def explanations(path: Path) -> dict[str, str]:
    """The comments behind the keys of a YAML file, by dotted key; "" for keys without one."""
    found, parents = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"( *)(\w+):(?:\s+[^#]*?)?(?:\s*#\s*(.*))?", line):
            indent, key, comment = match.groups()
            parents = [*parents[: len(indent) // 2], key]
            found[".".join(parents)] = comment or ""
    return found


def whole(value: Any) -> Any:
    """`4e6` as the whole number that it is; anything else as it came."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d[\d_]*(\.\d*)?[eE]\+?\d{1,2}\s*", value):
        number = float(value)
        return int(number) if number.is_integer() else value
    return value


def items(value: Any) -> Any:
    """The items of a list as a command line or a sweep may write it: `64 32`, `64,32`, `[64, 32]`."""
    words = [value] if isinstance(value, str) else value
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        return value
    text = " ".join(words).strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    return re.split(r"\s*,\s*|\s+", text) if text else []
