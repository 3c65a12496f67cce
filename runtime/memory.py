"""Memory for kernels: zeroed, page-aligned, and taken from the system only where it is touched."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import errors
from .layout import Activation, Layout
from .tensors import Tensor


def allocate(nbytes: int, purpose: str) -> NDArray[np.uint8]:
    """``nbytes`` zero bytes; raises BadRequest, naming ``purpose``, if they are not to be had."""
    try:
        # Private pages: shared ones, mmap's default, would count as files in memory.
        region = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        reason = f"{nbytes / 1e9:.1f} GB for {purpose} are more than this machine has"
        raise errors.BadRequest(reason=reason, advice="pass a smaller cache_tokens") from error
    return np.frombuffer(region, np.uint8)


class Arena:
    """The activations of a plan, which share one block of memory."""

    def __init__(self, layout: Layout) -> None:
        self.bytes = allocate(layout.arena_bytes, "activations")
        self.activations: Mapping[str, Activation] = layout.activations

    def tensor(self, name: str, rows: int) -> Tensor:
        """A view of the first ``rows`` rows of an activation, ``[rows, width]``."""
        activation = self.activations[name]
        return Tensor(activation.dtype, self.view(activation, rows))

    def view(self, activation: Activation, rows: int) -> NDArray[Any]:
        count = rows * activation.width
        flat = np.frombuffer(self.bytes, activation.carrier, count, activation.offset)
        return flat.reshape(rows, activation.width)
