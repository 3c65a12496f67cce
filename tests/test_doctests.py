"""The worked examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import tokenmill

MODULES = [
    m.name
    for m in pkgutil.walk_packages(tokenmill.__path__, "tokenmill.")
    if not m.name.startswith(("tokenmill.tests", "tokenmill.examples", "tokenmill.benchmarks"))
    and ".venv" not in m.name
    and not m.name.startswith("tokenmill.build")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0
