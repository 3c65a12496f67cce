"""Triton for NVIDIA GPUs: emitted text, and what launches it."""

from . import target
from .emit import emit

__all__ = ["emit", "target"]
