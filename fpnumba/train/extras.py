"""Packages that only training needs: imported where they are used, or missed with the command that helps."""

import importlib
from importlib.util import find_spec
from typing import Any

INSTALL = 'pip install "fpnumba[train]"'


class MissingExtra(ImportError):
    """A package of the ``train`` extra is not installed. The message holds the command that installs it."""


def need(module: str) -> Any:
    """Import a module of the ``train`` extra, or raise :class:`MissingExtra`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(f"{package} is needed here and cannot be imported; {INSTALL} brings it") from error


def need_all(*packages: str) -> None:
    """Raise :class:`MissingExtra` for the first package that is not installed, without importing any."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(f"{package} is needed here and is not installed; {INSTALL} brings it")
