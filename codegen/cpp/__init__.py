"""C++ for the CPU: one file per kernel kind, support headers (``*.h``) that are copied as they are."""

from . import build, target
from .emit import emit

__all__ = ["build", "emit", "target"]
