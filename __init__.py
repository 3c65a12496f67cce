"""tokenmill: an ahead-of-time compiler that makes language models cheap to run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from .api import optimize as optimize
    from .recipe import Recipe as Recipe
    from .runtime import Artifact as Artifact
    from .runtime import Session as Session
    from .runtime import load as load

__version__ = "0.1.0"
__all__ = ["Artifact", "Recipe", "Session", "errors", "load", "optimize"]

# Resolved on first use, so that what runs an artifact stays free of torch and the compiler.
_HOME = {
    "optimize": ".api",
    "load": ".runtime",
    "Recipe": ".recipe",
    "Artifact": ".runtime",
    "Session": ".runtime",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
