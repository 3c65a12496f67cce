"""C++ for the CPU: one file per kernel kind, support headers (``*.h``) that are copied as they are."""

from .emit import emit

__all__ = ["emit"]
