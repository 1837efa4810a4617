"""From a YAML file and ``key=value`` overrides to a pydantic model, with errors that a user can act on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from clora.errors import CloraError, nearest
from clora.files import user_path

REMOVED = {"sampler.integer_timesteps": "no stock scheduler yields such timesteps"}
"""Settings of earlier versions, and why they went."""

ModelType = TypeVar("ModelType", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which reads ``1e-4`` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="expected a word as key", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_tree(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Reads a YAML file and applies overrides.

    Raises:
        CloraError: the file is missing, unreadable, malformed or no mapping, or an override does not fit.
    """
    path = user_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CloraError(f"{path} does not exist; expected a YAML config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CloraError(f"{path} cannot be read as text: {error}") from error
    tree = parse_tree(text, str(path))
    for override in overrides:
        _apply(tree, override)
    return tree


def parse_tree(text: str, where: str) -> dict[str, Any]:
    """Parses YAML to a mapping. Raises CloraError naming the line of a mistake."""
    tree = _parse(text, where)
    if not isinstance(tree, dict):
        raise CloraError(f"{where}: expected a mapping of keys to values, found {_kind(tree)}")
    return tree


def named_files(tree: Mapping[str, Any]) -> dict[str, str]:
    """The LoRA files and folders of pictures that a config's tree names, by setting: ``effects.0.lora``, ``data.sources``.

    The tree may be wrong elsewhere; what is no text is passed over.
    """
    effects = tree.get("effects")
    entries = list(effects) if isinstance(effects, list | tuple) else []
    sections = {"data": tree.get("data"), **{f"effects.{i}": entry for i, entry in enumerate(entries)}}
    return {
        f"{section}.{key}": values[key]
        for section, values in sections.items()
        for key in ("lora", "sources", "targets")
        if isinstance(values, dict) and isinstance(values.get(key), str)
    }


def validate(model: type[ModelType], tree: Mapping[str, Any], where: str, overrides: Iterable[str] = ()) -> ModelType:
    """Checks a tree strictly: a number written as text, or true for 1, is a wrong type.

    Args:
        model: the model at the root.
        tree: values as YAML gives them.
        where: the file, for messages.
        overrides: those that are in the tree; a problem with one's value is told as the override's, not the file's.

    Raises:
        CloraError: every problem, one on each line.
    """
    try:
        # Strict Python input would refuse a list for a tuple; strict JSON does not.
        return model.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        details = [detail for detail in error.errors() if not _follows_from_another(detail)]
        problems = _merge_alternatives(
            [_origin(detail, where, tuple(overrides)) + _describe(model, detail) for detail in details]
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise CloraError(f"{where}: not a plain tree of values ({error})") from error
    if len(problems) == 1:
        raise CloraError(problems[0])
    if all(problem.startswith(f"{where}: ") for problem in problems):
        lines = [f"{where}: {len(problems)} problems", *(problem.removeprefix(f"{where}: ") for problem in problems)]
    else:
        lines = [f"{len(problems)} problems", *problems]
    raise CloraError("\n  ".join(lines))


def _origin(detail: Mapping[str, Any], where: str, overrides: Sequence[str]) -> str:
    """Whose mistake it is: an override's that sets the value, or the file's, with the overrides that a check read."""
    location = [str(part) for part in detail["loc"]]
    paths = {override: override.partition("=")[0].strip().split(".") for override in overrides}
    own = [override for override, path in paths.items() if location[: len(path)] == path]
    if own:
        return f"override {own[-1]!r}: "
    read = [o for o, path in paths.items() if detail["type"] == "value_error" and path[: len(location)] == location]
    return f"{where} with {' '.join(read)}: " if read else f"{where}: "


def _follows_from_another(detail: Mapping[str, Any]) -> bool:
    """A default that depends on a wrong field, or a list that is too short because its entries are wrong."""
    return detail["type"] == "default_factory_not_called" or (detail["type"] == "too_short" and bool(detail["input"]))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a safe loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CloraError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CloraError(f"{where}: not valid YAML: {error}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets one ``key.sub=value``; missing sections are made, and checked with the rest."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise CloraError(f"override {override!r}: expected key=value or key.sub=value, as in train.updates=500")
    node: Any = tree
    for part in parts[:-1]:
        node = _enter(node, part, override)
    _enter(node, parts[-1], override, [_parse(value, f"override {override!r}")])


def _enter(node: Any, part: str, override: str, new: Sequence[Any] = ()) -> Any:
    """Steps from a mapping or list into one of its entries, setting it first where `new` holds a value."""
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise CloraError(f"override {override!r}: expected an entry from 0 to {len(node) - 1}, found {part!r}")
        entry: Any = int(part)
    elif isinstance(node, dict):
        entry = part
        if node.get(part) is None:
            node[part] = {}
    else:
        raise CloraError(f"override {override!r}: {part!r} is inside {_kind(node)}, which has no keys")
    if new:
        node[entry] = new[0]
    return node[entry]


def _describe(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    """One pydantic error as ``path: what is wrong``."""
    location = [part for part in detail["loc"] if isinstance(part, int) or part.isidentifier()]
    path = ".".join(str(part) for part in detail["loc"] if part in location) or "config"
    if path in REMOVED:
        return f"{path}: was removed, since {REMOVED[path]}; delete the key"
    if detail["type"] == "extra_forbidden":
        known = _fields(model, detail["loc"][:-1])
        hint = nearest(str(detail["loc"][-1]), known) or f"; expected one of {', '.join(known)}"
        return f"{'.'.join(map(str, detail['loc']))}: unknown key{hint}"
    if detail["type"] == "missing":
        return f"{path}: missing; expected {_expected_field(model, detail['loc'])}"
    if detail["type"] == "value_error":
        return f"{path}: {detail['ctx']['error']}" if detail["loc"] else str(detail["ctx"]["error"])
    expected = re.sub(r"^(Input should be|Value should have|\w+ should have|\w+ should match) ?", "", detail["msg"])
    return f"{path}: expected {_plain(expected)}, found {_shown(detail['input'])}"


def _merge_alternatives(problems: Iterable[str]) -> list[str]:
    """One message for a key of several types, where pydantic has one for each."""
    merged: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        match = re.fullmatch(r"(.+?): expected (.+), found (.+)", problem, re.DOTALL)
        key, expected = ((match[1], match[3]), match[2]) if match else ((problem, ""), "")
        merged.setdefault(key, []).append(expected)
    return [
        f"{path}: expected {' or '.join(kinds)}, found {found}" if found else path
        for (path, found), kinds in merged.items()
    ]


_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "an object": "a section of keys",
    "a valid dictionary": "a section of keys",
}


def _plain(expected: str) -> str:
    for word, plain in _WORDS.items():
        expected = expected.replace(word, plain)
    return re.sub(r" after validation, not \d+", "", expected)


def _expected_field(model: type[BaseModel], location: Sequence[str | int]) -> str:
    """What a missing key is for, from the docstring of its model."""
    owner = _model_at(model, location[:-1])
    line = re.search(rf"^ +{location[-1]}: (.+)$", (owner and owner.__doc__) or "", re.MULTILINE)
    return line[1].rstrip(".") if line else "a value"


def _fields(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    owner = _model_at(model, location)
    return list(owner.model_fields) if owner else []


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel] | None:
    """The model whose keys stand at a location of the tree."""
    current: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        current = None if field is None else _model_in(field.annotation)
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {dict: "a section of keys", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, dict):
        return _kind(value)
    return f"{value!r} ({_kind(value)})"
