"""The runtime: opens an artifact and runs it, with numpy and ctypes and nothing of the compiler."""

from .artifact import Artifact
from .session import Generation, Piece, Session

load = Session  # as one says it outside: tokenmill.load("model.tm")

__all__ = ["Artifact", "Generation", "Piece", "Session", "load"]
