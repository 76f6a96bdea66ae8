"""Catalog: a name is a file. Techniques and recipes are found in their folders, techniques in outside packages too, by entry points."""

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from tightfit.contracts import Transform
from tightfit.terms.errors import TightfitError, near
from tightfit.terms.restore import restore

ENTRY_POINTS = "tightfit.techniques"
"""The entry-point group in which another package names its technique modules."""


def technique_names() -> list[str]:
    """Every technique that can be named, without importing one. A file whose name begins with `_` is a part of others."""
    import tightfit.techniques

    own = [module.name for module in pkgutil.iter_modules(tightfit.techniques.__path__) if not module.name.startswith("_")]
    return sorted({*own, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


@cache
def technique(name: str) -> type[Any]:
    """The technique class called `name`. Raises `TightfitError` with near names for an unknown one."""
    module = technique_module(name)
    found = [item for item in vars(module).values() if isinstance(item, type) and is_dataclass(item) and item.__module__ == module.__name__]
    offered = [item for item in found if "stage" in vars(item)]
    if len(offered) != 1:
        raise TightfitError(
            f"`{module.__name__}` offers {len(offered)} techniques", hint="a technique file ends in one dataclass with a `stage`"
        )
    return offered[0]


def technique_module(name: str) -> ModuleType:
    """The file in which the technique `name` lives; its docstring explains it."""
    outside = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name in outside:
        return outside[name].load()
    if name not in technique_names():
        raise TightfitError(f"no technique is called `{name}`", hint=near(name, technique_names()))
    return importlib.import_module(f"tightfit.techniques.{name}")


def techniques() -> dict[str, type[Any]]:
    """All techniques by name."""
    return {name: technique(name) for name in technique_names()}


def recipe_names() -> list[str]:
    """Every recipe that can be named, without importing one."""
    room = importlib.util.find_spec("tightfit.recipes")
    folders = room.submodule_search_locations if room else None
    return sorted(module.name for module in pkgutil.iter_modules(folders or []) if not module.name.startswith("_"))


def recipe(name: str) -> Callable[..., Any]:
    """The function that carries the recipe `name` out. Raises `TightfitError` with near names for an unknown one."""
    if name not in recipe_names():
        raise TightfitError(f"no recipe is called `{name}`", hint=near(name, recipe_names()))
    return importlib.import_module(f"tightfit.recipes.{name}").run


def summary(name: str) -> str:
    """The first sentence of the file of a technique or recipe. Nothing is imported."""
    first = explain(name)["text"].split("\n")[0]
    return first.partition(": ")[2] or first


def explain(name: str) -> dict[str, Any]:
    """The docstring (`text`) of a technique or recipe and its `settings`, each with name, default and what its comment says.

    Nothing is imported.
    """
    source = _source(name)
    tree, lines = ast.parse(source), source.split("\n")
    settings = [
        {
            "name": setting,
            "default": ast.unparse(default) if default else "(must be given)",
            "price": lines[last_line - 1].partition("  # ")[2].strip(),
        }
        for setting, default, last_line in (_fields(tree) if name in technique_names() else _parameters(tree))
    ]
    return {"name": name, "text": ast.get_docstring(tree) or "", "settings": settings}


def _fields(tree: ast.Module) -> list[tuple[str, ast.expr | None, int]]:
    """The settings of a technique, the fields of its file's last class: name, default, and the line where it ends."""
    last = [node for node in tree.body if isinstance(node, ast.ClassDef)][-1]
    declared = [node for node in last.body if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)]
    return [(ast.unparse(node.target), node.value, node.end_lineno or 0) for node in declared]


def _parameters(tree: ast.Module) -> list[tuple[str, ast.expr | None, int]]:
    """The settings of a recipe, the parameters of its `run`: name, default, and the line where it ends. Who is `told` is none."""
    run = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    given, others = run.args.args, zip(run.args.kwonlyargs, run.args.kw_defaults, strict=True)
    defaults = [*[None] * (len(given) - len(run.args.defaults)), *run.args.defaults]
    found = [*zip(given, defaults, strict=True), *others]
    return [(item.arg, default, (default or item).end_lineno or 0) for item, default in found if item.arg != "told"]


def _source(name: str) -> str:
    if name not in technique_names() + recipe_names():
        raise TightfitError(f"no technique or recipe is called `{name}`", hint=near(name, technique_names() + recipe_names()))
    outside = {entry.name: entry.module for entry in entry_points(group=ENTRY_POINTS)}
    room = "techniques" if name in technique_names() else "recipes"
    found = importlib.util.find_spec(outside.get(name, f"tightfit.{room}.{name}"))
    return Path(found.origin).read_text() if found and found.origin else ""


def make(name: str, settings: Mapping[str, Any]) -> Transform:
    """The technique `name` with `settings`. Raises `TightfitError` for a setting that it does not have."""
    kind = technique(name)
    known = {item.name for item in fields(kind)}
    for setting in settings:
        if setting not in known:
            raise TightfitError(f"`{name}` has no setting `{setting}`", hint=near(setting, known) or f"`{name}` has no settings")
    return kind(**{setting: _restored(name, setting, get_type_hints(kind)[setting], value) for setting, value in settings.items()})


def _restored(name: str, setting: str, kind: Any, value: Any) -> Any:
    """`value` as the setting takes it; lists become tuples, and a `where` must be a regular expression."""
    try:
        restored = restore(kind, value)
        if setting == "where":
            re.compile(restored)
        return restored
    except TypeError as error:
        raise TightfitError(f"`{name}:{setting}` cannot be `{value}`", hint=f"`tightfit explain {name}` tells what it takes") from error
    except re.error as error:
        raise TightfitError(f"`{name}:{setting}={value}` is not a regular expression: {error}", hint="escape brackets as `\\[`") from error


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings from `NAME` or `NAME:key=value,key=value`, as the command line takes them.

    A value may hold commas: a piece without `=` continues the value before it, as in `targets=q_proj,v_proj,rank=8`.
    """
    name, _, rest = text.partition(":")
    hints = get_type_hints(technique(name))
    pieces: dict[str, list[str]] = {}
    for piece in filter(None, rest.split(",")):
        key, equals, value = piece.partition("=")
        if equals:
            pieces[key.strip()] = [value]
        elif pieces:
            pieces[next(reversed(pieces))].append(piece)
        else:
            raise TightfitError(f"`{piece}` is not a setting", hint=f"write `{name}:key=value,key=value`")
    settings = {key: _typed(found, hints.get(key, str), f"{name}:{key}") for key, found in pieces.items()}
    make(name, settings)
    return name, settings


def _typed(pieces: list[str], kind: Any, place: str) -> Any:
    """The value of type `kind` whose `pieces` stood between commas; only a tuple takes them apart."""
    if get_origin(kind) is tuple:
        return tuple(_typed([piece], get_args(kind)[0], place) for piece in pieces)
    value = ",".join(pieces).strip()
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise TightfitError(f"`{place}` is true or false, not `{value}`")
        return value.lower() == "true"
    if kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            raise TightfitError(f"`{place}` is a number, not `{value}`") from None
    return value
