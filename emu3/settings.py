"""Groups of settings: frozen, checked, read from TOML; errors of one line."""

import sys
from collections.abc import Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class Settings(BaseModel):
    """A frozen group of settings; an unknown key is an error, and so is inf or nan."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SettingsError(ValueError):
    """A setting that is unknown, missing or out of range, in one line."""


def parse(kind: type[Settings], tree: Mapping[str, Any]) -> Any:
    """Validate ``tree`` as ``kind``, the first error in one line."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_one_line(kind, error)) from None


def read_toml(name: str | Path, folder: Path) -> dict[str, Any]:
    """The tables of the TOML file ``name``, or of the one in ``folder`` that is called so."""
    shipped = folder / f"{name}.toml"
    is_shipped = Path(name).name == str(name) and shipped.is_file()
    path = shipped if is_shipped else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise SettingsError(f"recipe: no file {str(name)!r}; those that ship are {known}")
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: must be UTF-8 text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None


def override(tree: dict[str, Any], word: str) -> None:
    """Apply a ``word`` such as ``optim.lr=1e-4``; the value is TOML, or a plain string."""
    key, equals, value = word.partition("=")
    *tables, leaf = (part.strip() for part in key.split("."))
    if not equals or not all([*tables, leaf]):
        raise SettingsError(f"{word}: an override must read key=value")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"{key}: {table} is a value, not a table")
    try:
        tree[leaf] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        tree[leaf] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``, table by table."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _one_line(kind: type[Settings], error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        group: Any = kind
        for part in path[:-1]:
            is_member = part.isdecimal()
            group = get_args(group)[0] if is_member else group.model_fields[part].annotation
            if type(None) in get_args(group):  # a table that need not be there
                group = get_args(group)[0]
        tables = [part for part in path[:-1] if not part.isdecimal()]
        name = tables[-1] if tables else kind.model_config.get("title", kind.__name__.lower())
        return f"{where}: unknown setting; {name} has {', '.join(sorted(group.model_fields))}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    # Of a table, pydantic gives all settings: the message has the ones it is about.
    got = "" if isinstance(given, Mapping) else f", got {_SHORT.repr(given)}"
    return f"{where}: {message}{got}" if where else message
