"""YAML as plain data, strictly: keys are text and stand once, nothing contains itself, and errors name their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import LuthierError

_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        LuthierError: there is no such file, or it is no such YAML.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise LuthierError(
            f"this cannot be read as YAML: {problem}", where=where, fix="check indentation, quotes and keys"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        fix = "give the YAML file first, and KEY=VALUE after it" if "=" in path.name else "give a YAML file"
        raise LuthierError(f"the file cannot be read: {error}", where=str(path), fix=fix) from None
    except (ValueError, RecursionError) as error:
        fix = "shorten the number, date or nesting that YAML cannot hold"
        raise LuthierError(f"the file cannot be read: {error}", where=str(path), fix=fix) from None


def parse(text: str) -> Any:
    """A text's data. PyYAML itself lets the last of two equal keys win in silence, and reads the key `on` as true.

    Raises:
        yaml.YAMLError: the text is no YAML, or not as strict as this.
        ValueError: a date or a number that Python cannot hold.
        RecursionError: brackets some hundreds deep.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, ())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def on_one_line(value: Any) -> str:
    """A value as YAML on one line; texts that YAML breaks into lines are written as in JSON, which is YAML too."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    text = text.removesuffix("...\n").strip()
    return json.dumps(value) if "\n" in text else text


def _check(node: yaml.Node, outer: tuple[yaml.Node, ...]) -> None:
    if any(node is one for one in outer):
        raise _refused(node, "this contains itself")
    inner = (*outer, node)
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _check(one, inner)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag not in _KEYS:
                raise _refused(
                    key, f"the key `{key.value}` is not text" if isinstance(key, yaml.ScalarNode) else "a key is not text"
                )
            if key.value in seen:
                raise _refused(key, f"the key `{key.value}` stands twice")
            seen.add(key.value)
            _check(value, inner)


def _refused(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
