"""What the runtime needs to know of plan.json: sizes, orders and extern steps, but no kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import errors
from .tensors import DTYPES, Tensor, TensorSpec

PLAN_VERSION = 1


@dataclass(frozen=True)
class Activation:
    """An array ``[rows, width]`` at byte ``offset`` of the arena, for at most ``rows`` rows.

    ``over`` says what the rows are: the batch's tokens, its rows of logits, or fixed (one row).
    """

    dtype: str
    over: str
    rows: int
    width: int
    offset: int

    @property
    def carrier(self) -> np.dtype[Any]:
        """The numpy dtype that carries its bits."""
        return np.dtype(DTYPES[self.dtype][1])

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.width * self.carrier.itemsize


@dataclass(frozen=True)
class CacheLayout:
    """One layer's cache: ``row_bytes`` bytes per token."""

    name: str
    row_bytes: int


@dataclass(frozen=True)
class ExternStep:
    """Step ``index`` of the plan, which torch runs: ``out = op(*args, **kwargs)``.

    ``item`` picks one of several results (-1: there is one); ``bind`` maps operands and ``out`` to
    (buffer, first column).  runtime.extern says how arguments are written.
    """

    index: int
    op: str
    args: list[Any]
    kwargs: dict[str, Any]
    item: int
    bind: Mapping[str, tuple[str, int]]
    where: str


@dataclass(frozen=True)
class Layout:
    """A plan as the runtime sees it; ``weights`` and ``caches`` are in the order of the C ABI.

    One batch carries at most ``tokens`` tokens and ``rows`` rows of logits, ``[rows, vocab]``.
    """

    tokens: int
    rows: int
    arena_bytes: int
    output: Activation
    vocab: int
    positions: int
    steps: int
    weights: tuple[TensorSpec, ...]
    caches: tuple[CacheLayout, ...]
    activations: Mapping[str, Activation]
    externs: tuple[ExternStep, ...]
    meta: Mapping[str, Any]

    @staticmethod
    def parse(plan: Mapping[str, Any], file: str = "plan.json") -> Layout:
        """The layout of ir.plan.dump's JSON; raises ArtifactTooNew, or ArtifactDamaged naming ``file``."""
        version = plan.get("version")
        if isinstance(version, int) and version > PLAN_VERSION:
            raise errors.ArtifactTooNew(found=f"(plan) {version}", known=PLAN_VERSION)
        try:
            layout = _parse(plan)
            layout._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"malformed: {error!r}"
            raise errors.ArtifactDamaged(file=file, reason=reason) from error
        return layout

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all caches together."""
        return sum(cache.row_bytes for cache in self.caches)

    def _check(self) -> None:
        if min(self.tokens, self.rows, self.vocab, self.positions) < 1:
            raise ValueError("capacity, vocab and positions must be positive")
        for name, activation in self.activations.items():
            if not 0 <= activation.offset <= activation.end <= self.arena_bytes:
                raise ValueError(f"buffer {name} does not fit the arena")
        if self.output.dtype != "f32" or self.output.width < self.vocab:
            raise ValueError("the output does not hold rows of logits")


def bind_weights(
    layout: Layout, stored: Mapping[str, Tensor], file: str = "plan.json"
) -> dict[str, Tensor]:
    """The plan's weights in its order; raises ArtifactDamaged naming ``file`` if one is not there."""
    bound = {}
    for spec in layout.weights:
        tensor = stored.get(spec.name)
        if tensor is None or (tensor.dtype, tensor.array.shape) != (spec.dtype, spec.shape):
            reason = f"the weights have no {spec.dtype} {list(spec.shape)} named {spec.name!r}"
            raise errors.ArtifactDamaged(file=file, reason=reason)
        bound[spec.name] = tensor
    return bound


def _parse(plan: Mapping[str, Any]) -> Layout:
    buffers = plan["buffers"]
    count = {"fixed": 1, **plan["capacity"]}
    activations = {
        b["name"]: Activation(b["dtype"], b["rows"], count[b["rows"]], b["width"], b["offset"])
        for b in buffers
        if b["kind"] == "arena"
    }
    return Layout(
        tokens=plan["capacity"]["tokens"],
        rows=plan["capacity"]["rows"],
        arena_bytes=plan["arena_bytes"],
        output=activations[plan["output"]],
        vocab=plan["vocab"],
        positions=plan["positions"],
        steps=len(plan["steps"]),
        weights=tuple(
            TensorSpec(b["name"], b["dtype"], tuple(b["shape"]))
            for b in buffers
            if b["kind"] == "weight"
        ),
        caches=tuple(CacheLayout(c["name"], c["row_bytes"]) for c in plan["caches"]),
        activations=activations,
        externs=tuple(_externs(plan)),
        meta=plan["meta"],
    )


def _externs(plan: Mapping[str, Any]) -> Iterator[ExternStep]:
    for index, step in enumerate(plan["steps"]):
        spec = plan["specs"][step["spec"]]
        if spec["kind"] == "extern":
            call = json.loads(spec["args"])
            yield ExternStep(
                index=index,
                op=spec["op"],
                args=call["args"],
                kwargs=call["kwargs"],
                item=spec["item"],
                bind={name: (at[0], at[1]) for name, at in step["bind"].items()},
                where=step["where"],
            )
