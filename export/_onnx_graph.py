"""An ONNX graph as it grows: nodes, constants, and weights that are read when the file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

CONTRIB = "com.microsoft"
OPSETS = {"": 23, CONTRIB: 1}
IR_VERSION = 11

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}


class Graph:
    """Collects nodes; ``place`` is where in the user's model those that come next belong.

    ``accuracy_level`` is that of kernels for quantized weights: 0 multiplies in fp32, 4 lets them round what
    comes in to INT8, block by block.  ``widened`` are formats of weights that some kernel is given in fp32.
    """

    def __init__(self, name: str, accuracy_level: int = 0) -> None:
        self.place = ""
        self.accuracy_level = accuracy_level
        self.widened: set[str] = set()
        self._name = name
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._scopes: list[list[ir.Node]] = [[]]
        self._count = 0

    # --- the outside ---

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> ir.Value:
        value = ir.val(name, dtype=DTYPES[dtype], shape=shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Let a computed value, fp32, leave the graph."""
        value.name, value.shape = name, ir.Shape(shape)
        value.dtype = ir.DataType.FLOAT
        self._outputs.append(value)

    def model(self, **metadata: str) -> ir.Model:
        outputs = self._outputs[-1:] + self._outputs[:-1]  # logits first
        graph = ir.Graph(
            self._inputs, outputs, nodes=self._scopes[0],
            initializers=list(self._initializers.values()), opset_imports=OPSETS, name=self._name,
        )  # fmt: skip
        made = ir.Model(
            graph, ir_version=IR_VERSION, producer_name="tokenmill", metadata_props=metadata
        )
        ir.passes.common.CommonSubexpressionEliminationPass()(made)
        ir.passes.common.RemoveUnusedNodesPass()(made)
        return made

    @property
    def quantized(self) -> bool:
        """Whether there are kernels that ``accuracy_level`` is for."""
        return any("accuracy_level" in n.attributes for nodes in self._scopes for n in nodes)

    # --- nodes ---

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> Any:
        """Add a node of one result."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, results: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node of several results."""
        self._count += 1
        name = f"{self.place}/{kind}.{self._count}"
        outputs = [ir.Value(name=f"{name}:{i}") for i in range(results)]
        known = ir.convenience.convert_attributes(
            {key: value for key, value in attributes.items() if value is not None}
        )
        node = ir.Node(domain, kind, inputs, known, outputs=outputs, name=name)
        self._scopes[-1].append(node)
        return outputs

    @contextmanager
    def body(self, inputs: Sequence[ir.Value], outputs: list[ir.Value]) -> Iterator[list[ir.Graph]]:
        """The nodes that are added inside become a graph of their own, for an attribute.

        ``outputs`` may be filled inside; the graph stands in the list when all is done.
        """
        made: list[ir.Graph] = []
        self._scopes.append([])
        yield made
        nodes = self._scopes.pop()
        self._count += 1
        made.append(ir.Graph(inputs, outputs, nodes=nodes, name=f"body.{self._count}"))

    # --- constants and weights ---

    def ints(self, *values: int) -> ir.Value:
        """A vector int64."""
        return self._constant(torch.tensor(values, dtype=torch.int64))

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> ir.Value:
        return self._constant(torch.tensor(value, dtype=dtype))

    def _constant(self, value: Tensor) -> ir.Value:
        kind = str(value.dtype).removeprefix("torch.")
        name = f"constant.{kind}.{value.tolist()}"
        return self.weight(name, lambda: value, value.dtype, value.shape)

    def weight(
        self, name: str, read: Callable[[], Tensor], dtype: torch.dtype, shape: Sequence[int]
    ) -> ir.Value:
        """A stored tensor that ``read`` yields when the file is written; one of a name is there once."""
        if name not in self._initializers:
            sizes = ir.Shape(list(shape))
            tensor = ir.LazyTensor(
                lambda: TorchTensor(read().contiguous(), name), DTYPES[dtype], sizes, name=name
            )
            value = ir.Value(
                name=name, shape=sizes, type=ir.TensorType(DTYPES[dtype]), const_value=tensor
            )
            self._initializers[name] = value
        return self._initializers[name]

    # --- verbs that several ops need ---

    def cast(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        return self.op("Cast", x, to=DTYPES[dtype].value)

    def shape(self, *sizes: int | ir.Value) -> ir.Value:
        """A shape of numbers and of vectors of sizes that are known when the model runs."""
        parts: list[ir.Value] = []
        run: list[int] = []
        for size in (*sizes, None):
            if isinstance(size, int):
                run.append(size)
                continue
            parts += [self.ints(*run)] if run else []
            parts += [] if size is None else [size]
            run = []
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def reshape(self, x: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        return self.reshape_to(x, self.shape(*sizes))

    def reshape_to(self, x: ir.Value, sizes: ir.Value) -> ir.Value:
        """``x`` in a shape without zeros, whatever shape it had between."""
        while (node := x.producer()) is not None and node.op_type == "Reshape":
            source = node.inputs[0]
            assert source is not None
            x = source
        return self.op("Reshape", x, sizes)

    def transpose(self, x: ir.Value, *order: int) -> ir.Value:
        return self.op("Transpose", x, perm=list(order))

    def cut(self, x: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        return self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis))

    def sizes(self, x: ir.Value, start: int, end: int) -> ir.Value:
        """The vector of the sizes of some dims."""
        return self.op("Shape", x, start=start, end=end)
