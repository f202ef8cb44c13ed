"""Registries of methods and tasks: a subclass with a name registers itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import ClassVar


class Registered:
    """Base of classes that a spec string `name:key=value` names.

    A subclass that sets `noun` has a registry of its own, and every subclass of that one that sets `name` is in it. Defining two
    classes of one name raises `TypeError`.
    """

    noun: ClassVar[str]
    """What an entry is called in messages: method, task."""
    name: ClassVar[str] = ""
    registry: ClassVar[dict[str, type]]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        _check_settings(cls)
        if "noun" in cls.__dict__:
            cls.registry = {}
        if name := cls.__dict__.get("name"):
            other = cls.registry.get(name)
            if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(
                    f"two {cls.noun}s are named {name!r}, in {other.__module__} and {cls.__module__}; rename one"
                )
            cls.registry[name] = cls


def _check_settings(cls: type[Registered]) -> None:
    """Raises `TypeError` for a setting with the name of a class variable that describes every method or task."""
    described: set[str] = set()
    for base in cls.__mro__[1:]:
        described |= {name for name, hint in inspect.get_annotations(base).items() if "ClassVar" in str(hint)}
    for name, hint in inspect.get_annotations(cls).items():
        if name in described and "ClassVar" not in str(hint):
            raise TypeError(
                f"{cls.__name__}: a setting cannot be called {name!r}, which describes every {cls.noun}; rename it"
            )


def import_all(folders: Iterable[str], group: str) -> None:
    """Imports every file of these folders of the package, and every package of the entry-point group."""
    for folder in folders:
        package = importlib.import_module(f"longspan.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"longspan.{folder}.{module.name}")
    for entry in entry_points(group=group):
        entry.load()
