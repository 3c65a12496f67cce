"""The catalogue of errors: each says what is wrong and what to do."""

from __future__ import annotations

import inspect
import string

import pytest
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
