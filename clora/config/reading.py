"""From a YAML file and ``key=value`` overrides to a pydantic model, with errors that a user can act on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from clora.config.fields import Reading, UserPath
from clora.errors import CloraError, listed, nearest
from clora.files import read_text, user_path

REMOVED = {
    "sampler.integer_timesteps": "no stock scheduler yields such timesteps",
    "objective.tau_rule": "target simulation has one rule, on which paper and released code agree (docs/method.md 5)",
}
"""Settings of earlier versions, and why they were removed."""

MAX_BYTES = 4_000_000
"""A larger file is no config."""
MAX_DEPTH = 30
"""Levels of a file; one of a thousand levels takes long to read, and no config has ten."""
ModelType = TypeVar("ModelType", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which reads ``1e-4`` as a number and refuses a repeated key or part, or endless levels."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"expected at most {MAX_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        # A few lines of lists of aliases of lists of aliases are gigabytes.
        if is_alias and isinstance(node, yaml.CollectionNode):
            raise yaml.MarkedYAMLError(
                problem="a list or mapping is repeated by an alias; write it out", problem_mark=mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        # YAML's own loader keeps the last of two equal keys and drops the first silently.
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="expected a word as key", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as text, since it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


# No setting is a date or a set: 2001-01-01 is a name, and a tag for one is refused.
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _tag in (_TIMESTAMP, *(f"tag:yaml.org,2002:{kind}" for kind in ("binary", "omap", "pairs", "set"))):
    _Loader.add_constructor(_tag, _Loader.construct_undefined)


def read_tree(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file. Raises CloraError for one that is missing, unreadable, malformed or no mapping."""
    path = user_path(path)
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise CloraError(
            f"{path}: expected a YAML file of at most {MAX_BYTES // 10**6} MB, found {path.stat().st_size} bytes"
        )
    tree = _parse(read_text(path, "a YAML file"), str(path))
    if not isinstance(tree, dict):
        raise CloraError(f"{path}: expected a mapping of keys to values, found {_kind(tree)}")
    return tree


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a safe loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CloraError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        found = f"the character {chr(error.character)!r} at position {error.position}"
        raise CloraError(f"{where}: expected YAML, which is plain text, found {found}; is it another file?") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CloraError(f"{where}: not valid YAML: {error}") from error
    except (LookupError, AttributeError, TypeError) as error:  # YAML's readers of !!bool, !!int, !!timestamp and !!omap
        raise CloraError(f"{where}: a value does not fit its !! tag; remove the tag") from error


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Sets each ``key.sub=value`` in a tree. Raises CloraError for one that does not fit."""
    for override in overrides:
        _apply(tree, override)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets one ``key.sub=value``; missing sections are created, and checked with the rest."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise CloraError(f"override {override!r}: expected key=value or key.sub=value, as in train.updates=500")
    value = _parse(text, f"override {override!r}")
    # Down to the parent of the last part; a number chooses an entry of a list.
    node: Any = tree
    for depth, part in enumerate(parts, 1):
        entry: str | int = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise CloraError(f"override {override!r}: expected an entry from 0 to {len(node) - 1}, found {part!r}")
            entry = int(part)
        elif not isinstance(node, dict):
            raise CloraError(f"override {override!r}: {part!r} is inside {_kind(node)}, which has no keys")
        elif node.get(part) is None:
            node[part] = {}
        if depth == len(parts):
            node[entry] = value
        node = node[entry]


def fill_empty_sections(model: type[BaseModel], tree: dict[str, Any]) -> None:
    """Makes sections of a tree that state nothing (``train:``) sections without keys, whose settings are the defaults."""
    for name, field in model.model_fields.items():
        if name in tree and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if tree[name] is None:
                tree[name] = {}
            elif isinstance(tree[name], dict):
                fill_empty_sections(field.annotation, tree[name])


def named_files(tree: Mapping[str, Any], folder: Path = Path()) -> dict[str, str]:
    """Returns the LoRA files and folders of pictures in a config's tree, by setting, such as ``effects.0.lora``.

    Args:
        tree: a config as YAML has it, or ``model_dump()`` of a loaded one. It may be wrong elsewhere; values that are not
            text are skipped.
        folder: the one that relative paths are relative to; those of a loaded config have been found.
    """
    sections = {"data": tree.get("data")}
    if isinstance(tree.get("effects"), (list, tuple)):
        sections |= {f"effects.{i}": effect for i, effect in enumerate(tree["effects"])}
    files = {}
    for name, section in sections.items():
        for key in ("lora", "sources", "targets"):
            if isinstance(section, dict) and isinstance(section.get(key), str):
                path = section[key]
                files[f"{name}.{key}"] = path if isinstance(path, UserPath) else UserPath(path, folder)
    return files


def validate(
    model: type[ModelType],
    tree: Mapping[str, Any],
    where: str,
    overrides: Sequence[str] = (),
    context: Reading | None = None,
) -> ModelType:
    """Checks a tree strictly: a number written as text, or true for 1, is a wrong type.

    Args:
        model: the model at the root.
        tree: values as YAML has them.
        where: the file, for messages.
        overrides: those that are in the tree; a problem with the value of one is reported as the override's.
        context: the folder of paths, and whether the prompts file has been read; None for other files than configs.

    Raises:
        CloraError: every problem, one on each line, up to 40.
    """
    try:
        # Strict Python input would refuse a list for a tuple; strict JSON does not.
        return model.model_validate_json(json.dumps(tree, default=str), strict=True, context=context)
    except ValidationError as error:
        problems = _problems(model, error, where, overrides)
    except (TypeError, ValueError, RecursionError) as error:
        raise CloraError(f"{where}: not a plain tree of values ({error})") from error
    if len(problems) == 1:
        raise CloraError(problems[0])
    if all(problem.startswith(f"{where}: ") for problem in problems):
        raise CloraError(f"{where}: {listed([problem.removeprefix(f'{where}: ') for problem in problems])}")
    raise CloraError(listed(problems))


def _problems(model: type[BaseModel], error: ValidationError, where: str, overrides: Sequence[str]) -> list[str]:
    # A key of several types has an error for each of them: what they expected is joined, in one message.
    expected: dict[tuple[str, str], list[str]] = {}
    for detail in error.errors():
        # These two follow from another error: a default that depends on a wrong field, a list with wrong entries.
        is_short = detail["type"] == "too_short" and detail["input"]
        if detail["type"] == "default_factory_not_called" or is_short:
            continue
        problem, kind, found = _describe(model, detail)
        expected.setdefault((_origin(detail, where, overrides) + problem, found), []).append(kind)
    problems = [
        f"{problem}: expected {' or '.join(kinds)}, found {found}" if found else problem
        for (problem, found), kinds in expected.items()
    ]
    # A text of the file may be as long as the file.
    return [problem if len(problem) <= 2000 else f"{problem[:2000]}..." for problem in problems]


def _origin(detail: Mapping[str, Any], where: str, overrides: Sequence[str]) -> str:
    """Names the override that sets a wrong value, or the file, with the overrides that a check read."""
    location = [str(part) for part in detail["loc"]]
    paths = {override: override.partition("=")[0].strip().split(".") for override in overrides}
    # The last override of a key wins, so that a wrong value is its own.
    own = [override for override, path in paths.items() if location[: len(path)] == path]
    if own:
        return f"override {own[-1]!r}: "
    # A check of several settings: those of them that were overridden.
    read = [o for o, path in paths.items() if detail["type"] == "value_error" and path[: len(location)] == location]
    return f"{where} with {' '.join(read)}: " if read else f"{where}: "


_PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "an object": "a section of keys",
    "a valid dictionary": "a section of keys",
}


def _describe(model: type[BaseModel], detail: Mapping[str, Any]) -> tuple[str, str, str]:
    """One of pydantic's errors: the path and the problem, or the path, what was expected there and what was found."""
    # pydantic's location has parts of its own for the types of a union; they are not keys.
    keys = [str(part) for part in detail["loc"] if isinstance(part, int) or part.isidentifier()]
    path = ".".join(keys) or "config"
    if path in REMOVED:
        return f"{path}: was removed, since {REMOVED[path]}; delete the key", "", ""
    if detail["type"] == "extra_forbidden":
        key = str(detail["loc"][-1])
        known = list(_model_at(model, detail["loc"][:-1]).model_fields)
        hint = nearest(key, known) or f"; expected one of {', '.join(known)}"
        return f"{'.'.join(map(str, detail['loc']))}: unknown key{hint}", "", ""
    if detail["type"] == "missing":
        # The docstring of the model states what each key is for.
        owner = _model_at(model, detail["loc"][:-1])
        line = re.search(rf"^ +{detail['loc'][-1]}: (.+)$", owner.__doc__ or "", re.MULTILINE)
        return f"{path}: missing; expected {line[1].rstrip('.') if line else 'a value'}", "", ""
    if detail["type"] == "value_error":
        problem = str(detail["ctx"]["error"])
        return f"{path}: {problem}" if detail["loc"] else problem, "", ""
    expected = re.sub(r"^(Input should be|Value should have|\w+ should have|\w+ should match) ?", "", detail["msg"])
    for word, plain in _PLAIN_WORDS.items():
        expected = expected.replace(word, plain)
    return path, re.sub(r" after validation, not \d+", "", expected), _shown(detail["input"])


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """Returns the model whose keys stand at a location of the tree."""
    for part in location:
        if isinstance(part, str):  # a number is an entry of a list of such models
            model = _model_in(model.model_fields[part].annotation)
    return model


def _model_in(annotation: Any) -> Any:
    """Returns the model that an annotation names, also within a tuple or an optional; None where it names none."""
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
    found = repr(value)
    return f"{found if len(found) <= 200 else f'{found[:200]}...'} ({_kind(value)})"
