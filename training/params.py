"""params.yaml → `Config`: parsed once, every key known, before any work begins.

`load()` reads the root params.yaml, lays a tenant's params.yaml over the sections that are its own, then the `--set` overrides.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from training.config import TENANT_SECTIONS, Config, ConfigError

NAME = re.compile(
    r"[A-Za-z0-9][\w.-]*", re.ASCII
)  # of folders, experiments, registered models, labels and files of a ConfigMap
RESERVED = ("upstream", "bit-upstream")  # what upstream training calls its own


def tenants(root: Path = Path()) -> list[str]:
    """Names of all tenants: the folders below tenants/ that hold a params.yaml."""
    return sorted(path.parent.name for path in (root / "tenants").glob("*/params.yaml"))


def load(root: Path = Path(), tenant: str | None = None, overrides: Iterable[str] = ()) -> Config:
    """The resolved configuration of the project in `root`, or of one of its tenants.

    Raises ConfigError for a missing file, an unknown tenant, an unknown or misspelt key, or a value outside its range.
    """
    values = _read(root / "params.yaml")
    if tenant is not None:
        path = root / "tenants" / tenant / "params.yaml"
        if tenant not in tenants(root):
            raise ConfigError(f"tenant {tenant!r} is not known: {_choices(tenant, tenants(root))} Add {path}.")
        if not NAME.fullmatch(tenant) or tenant in RESERVED:
            raise ConfigError(
                f"tenant {tenant!r}: letters, digits, _, . and - only, a letter or digit first, and none of "
                f"{', '.join(RESERVED)}. Rename its folder below tenants/."
            )
        own = _read(path)
        if own.pop("tenant", tenant) != tenant:
            raise ConfigError(f"{path}: `tenant:` must be {tenant!r}, the name of its folder.")
        if foreign := sorted(set(own) - set(TENANT_SECTIONS)):
            raise ConfigError(
                f"{path}: {foreign[0]!r} cannot be set by a tenant: {_choices(foreign[0], TENANT_SECTIONS)} "
                "What all tenants share stands in the root params.yaml."
            )
        values = merge(values, own)
    for override in overrides:
        values = merge(values, _override(override))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """`over` laid on `base`, section by section as `model` has them; a section that is null counts as empty."""
    merged = dict(base)
    for key, value in over.items():
        field, old = model.model_fields.get(key), merged.get(key)
        inner = field.annotation if field else None
        section = isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(old, dict)
        merged[key] = merge(old, value or {}, inner) if section and isinstance(value, dict | None) else value  # type: ignore[arg-type]
    return merged


def explain(error: ValidationError) -> str:
    """All problems of a validation, one a line: key, value, what is wrong, the choices."""
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        key = ".".join(path)
        if problem["type"] == "extra_forbidden":
            known = _fields(path[:-1])
            lines.append(f"{key} is not a key of params.yaml: {_choices(path[-1], known)}")
        else:
            lines.append(f"{key or 'params.yaml'} = {problem['input']!r}: {problem['msg']}")
    return "\n".join(lines)


def _fields(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in path:
        if name in model.model_fields:  # else the place in a list
            model = _section(model.model_fields[name].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section in a key's type: itself, or what a list or an optional key holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)


def _choices(given: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(given, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Choices: {', '.join(known) or 'none yet'}."


def _override(text: str) -> dict[str, Any]:
    path, separator, value = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys) or len(keys) > 3:
        raise ConfigError(f"--set {text!r}: write section.key=value, as in --set pretrain.steps=100.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML ({error}).") from None
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there. Run from the root of the project, or create it.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path} holds a {type(values).__name__}; sections with keys are expected.")
    return values or {}
