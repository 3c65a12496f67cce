"""The catalogue of errors, and every module's worked examples."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import string

import pytest
import tokenmill
from tokenmill import errors
from tokenmill.errors import TokenmillError

CATALOGUE = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, TokenmillError) and cls is not TokenmillError
]


def _fields(*templates: str) -> set[str]:
    parsed = (part for text in templates for part in string.Formatter().parse(text))
    return {name for _, name, _, _ in parsed if name}


@pytest.mark.parametrize("cls", CATALOGUE, ids=lambda cls: cls.__name__)
def test_every_error_says_what_is_wrong_and_what_to_do(cls: type[TokenmillError]) -> None:
    assert cls.what != TokenmillError.what or "reason" in _fields(cls.what)
    assert cls.remedy
    # 0.5 fits every conversion that the templates use.
    error = cls(**dict.fromkeys(_fields(cls.what, cls.remedy), 0.5))
    assert error.message
    assert str(error) == f"{error.message}\n  remedy: {error.advice}"


def _modules() -> list[str]:
    """All modules of the package; the folders beside them (tests, examples) are not part of it."""
    parts = ("capture", "codegen", "ir", "passes", "runtime")
    names = [m.name for m in pkgutil.iter_modules(tokenmill.__path__) if not m.ispkg]
    for part in parts:
        package = importlib.import_module(f"tokenmill.{part}")
        names += [m.name.removeprefix("tokenmill.") for m in
                  pkgutil.walk_packages(package.__path__, f"tokenmill.{part}.")]  # fmt: skip
    return names


@pytest.mark.parametrize("name", _modules())
def test_worked_examples_of(name: str) -> None:
    module = importlib.import_module(f"tokenmill.{name}")
    assert doctest.testmod(module).failed == 0
