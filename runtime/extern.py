"""Steps that no kernel computes: torch runs them on the arena's memory.

``args`` and ``kwargs`` of a step are JSON, in which an object stands for what JSON cannot say:

    {"operand": "x0", "columns": 8, "shape": [1, -1, 8], "dtype": "float32"}
        8 columns of every row of what is bound to x0, in that shape (-1: the rows), as that dtype
    {"size": "tokens", "times": 4}
        four times the batch's count of tokens (or of rows of logits, "rows")
    {"dtype": "float32"}
        torch.float32

The numbers of the result, or of its member ``item``, fill the rows of ``out`` in order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from .. import errors
from .batch import Batch
from .layout import ExternStep, Layout
from .memory import Arena
from .tensors import Tensor

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

# Arrays that numpy can only carry as raw bits.
_BITS = {"bf16": "bfloat16", "e4m3": "float8_e4m3fn"}


# A buffer as a tensor: the rows in use of an activation, a weight, or an input by its name.
View: TypeAlias = Callable[[str, Batch], "TorchTensor"]


class ExternRunner:
    """Runs the extern steps of a plan on what ``view`` gives for a buffer.

    Raises MissingExtra or Unsupported when it cannot.
    """

    def __init__(self, layout: Layout, view: View) -> None:
        try:
            import torch
        except ImportError as error:
            purpose = f"the step {layout.externs[0].op}"
            raise errors.MissingExtra(package="torch", purpose=purpose, extra="hf") from error
        self._torch = torch
        self._activations = layout.activations
        self._view = view
        self._ops = {step.index: self._resolve(step) for step in layout.externs}

    def run(self, step: ExternStep, batch: Batch) -> None:
        """Compute ``step`` for the batch whose activations the arena holds."""
        buffer, column = step.bind["out"]
        out = self._view(buffer, batch)
        if out.shape[0] == 0:
            return
        with self._torch.inference_mode():
            args = self._value(step.args, step, batch)
            kwargs = {name: self._value(arg, step, batch) for name, arg in step.kwargs.items()}
            result = self._ops[step.index](*args, **kwargs)
            part = result if step.item < 0 else result[step.item]
            rows = part.reshape(out.shape[0], -1)
            out[:, column : column + rows.shape[1]] = rows

    def _value(self, arg: Any, step: ExternStep, batch: Batch) -> Any:
        """The Python value of a JSON argument."""
        match arg:
            case list():
                return [self._value(item, step, batch) for item in arg]
            case {"operand": name, "columns": columns, "shape": shape, "dtype": dtype}:
                buffer, column = step.bind[name]
                tensor = self._view(buffer, batch)
                if buffer in self._activations:
                    tensor = tensor[:, column : column + columns]
                return tensor.reshape(shape).to(getattr(self._torch, dtype))
            case {"size": over, "times": times}:
                return batch.extent(over) * times
            case {"dtype": name}:
                return getattr(self._torch, name)
        return arg

    def _resolve(self, step: ExternStep) -> Callable[..., Any]:
        found: Any = self._torch.ops
        try:
            for part in step.op.split("."):
                found = getattr(found, part)
        except AttributeError as error:
            raise errors.Unsupported(
                reason=f"torch {self._torch.__version__} has no operator {step.op}",
                where=step.where,
                advice="install the torch that the artifact was made with, or import the library "
                "that registers the operator",
            ) from error
        return cast("Callable[..., Any]", found)


def host_view(arena: Arena, weights: Mapping[str, Tensor]) -> View:
    """Buffers in the memory of this machine."""

    def view(buffer: str, batch: Batch) -> TorchTensor:
        import torch

        if buffer in arena.activations:
            dtype, array = arena.tensor(buffer, batch.extent(arena.activations[buffer].over))
        elif buffer in weights:
            dtype, array = weights[buffer]
        else:
            dtype, array = "i32", getattr(batch, buffer)
        with warnings.catch_warnings():  # mapped weights are read-only, which torch dislikes
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(array)
        return tensor.view(getattr(torch, _BITS[dtype])) if dtype in _BITS else tensor

    return view
