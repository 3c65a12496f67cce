"""A transformers model without its weights, and where each of them can be read.

The library converts names and layouts while it loads (one tensor per expert becomes a stack, say).  Here its
own table is replayed on names and meta tensors, and the operations run for one weight when somebody wants it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..errors import NumbersMissing, WeightsMismatch
from ..ir import quant
from ..ir.provenance import Rows, rearranged
from .shards import Source, Stored


class NotStreamable(Exception):
    """Why this checkpoint has to be loaded as a whole."""


class Tensors(Protocol):
    """Tensors of a checkpoint by name, as :class:`.shards.Shards` reads them."""

    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def like(self, name: str) -> Tensor: ...
    def read(self, name: str, index: int | None = None) -> Tensor: ...
    def stored(self, name: str) -> Stored | None: ...


@dataclass
class Report:
    """What does not fit: names, and (name, shape found, shape expected); named as the library's report."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]] = field(default_factory=set)


def skeleton(config: Any, trust_remote_code: bool) -> Any:
    """The model of a config in eval mode: parameters on the meta device, computed buffers real."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import PreTrainedModel
    from transformers.utils.generic import ContextManagers

    with ContextManagers(PreTrainedModel.get_init_context(torch.float32, False, False, None)):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # nothing is to be drawn at random
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    model._initialize_missing_keys(False)
    return model.eval()


def absent(model: Any) -> dict[str, Source]:
    """Sources for a :func:`skeleton` of which there is only a config: they know shapes, and no numbers."""
    model.tie_weights()
    made: dict[int, Source] = {}
    found: dict[str, Source] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            none = partial(_no_numbers, name)
            made[id(tensor)] = Source(like, none, none if like.dim() > 2 else None)
        found[name] = made[id(tensor)]
    return found


def _no_numbers(name: str, index: int = 0) -> NoReturn:
    raise NumbersMissing(name=name)


def sources(model: Any, tensors: Tensors) -> tuple[dict[str, Source], Report]:
    """Where each parameter and stored buffer of a :func:`skeleton` is read; ties are made on the way."""
    groups, unexpected = _groups(model, tensors)
    state = model.state_dict()
    found: dict[str, Source] = {}
    report = Report(set(), unexpected)
    for group in groups.values():
        for name, like in group.shapes(tensors).items():
            if name not in state:
                continue
            if like.shape != state[name].shape:
                report.mismatched_keys.add((name, like.shape, state[name].shape))
            found[name] = group.source(name, state[name], tensors)
    _untie(model, found)
    absent = set(state) - set(found)
    report.missing_keys |= absent
    model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    tied = absent - report.missing_keys
    owners = {id(t): n for n, t in model.state_dict(keep_vars=True).items() if n in found}
    found |= {n: found[owners[id(model.get_parameter_or_buffer(n))]] for n in tied}
    model._adjust_missing_and_unexpected_keys(report)
    if lost := set(state) - set(found) - report.missing_keys:
        raise NotStreamable(f"{sorted(lost)[0]} is in no file, and the library does not miss it")
    return found, report


def _untie(model: Any, found: dict[str, Source]) -> None:
    """Where both names of a tie have tensors, they are one only if the numbers are the same."""
    for target, owner in list(model.all_tied_weights_keys.items()):
        if target in found and owner in found:
            if torch.equal(found[target].whole(), found[owner].whole()):
                del found[target]
            else:
                del model.all_tied_weights_keys[target]


# --- names and layouts ------------------------------------------------------------------------------


# Operations that stack matrices, or stack those of several names and join them along their rows.
_STACKS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


@dataclass
class Group:
    """Tensors of a checkpoint that become one or more weights together.

    ``names`` are those that matched each of the converter's patterns, in order.
    """

    model: Any
    target: str  # the first weight
    converter: Any  # None: a tensor that has another name at most
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def convert(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.target: read(self._only)}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.names.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, partial(read, name))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {n: v[0] if isinstance(v, list) else v for n, v in made.items()}

    def shapes(self, tensors: Tensors) -> dict[str, Tensor]:
        """Meta tensors of what the group becomes; WeightsMismatch if its tensors do not go together."""
        try:
            return self.convert(tensors.like)
        except RuntimeError as error:
            if self.converter is None or self._steps not in _STACKS:
                raise
            reason = f"the tensors that it is made of do not go together ({error})"
            raise WeightsMismatch(name=self.target, reason=reason) from error

    def source(self, name: str, place: Tensor, tensors: Tensors) -> Source:
        """How to read the weight ``name``, of which ``place`` says shape and dtype."""
        like = torch.empty(place.shape, dtype=place.dtype, device="meta")
        files = {n: tensors.like(n) for names in self.names.values() for n in names}
        rows_of_files = partial(self.rows, name, like, files)
        if self.converter is None:
            only = self._only

            def member(index: int) -> Tensor:
                return tensors.read(only, index).to(like.dtype)

            return Source(
                like, lambda: tensors.read(only).to(like.dtype), member if like.dim() > 2 else None,
                _whole_parts(tensors, only), files, rows_of_files,
            )  # fmt: skip
        if rows := self.members(len(like)):

            def expert(index: int) -> Tensor:
                return torch.cat([tensors.read(n) for n in rows[index]]).to(like.dtype)

            return Source(
                like, partial(_stack, like, expert), expert, _stacked_parts(tensors, rows), files,
                rows_of_files,
            )  # fmt: skip
        return Source(
            like, lambda: self.convert(lambda n: tensors.read(n).to(like.dtype))[name].contiguous(),
            files=files,
            rows=rows_of_files,
        )  # fmt: skip

    def rows(self, name: str, like: Tensor, files: Mapping[str, Tensor]) -> Rows | None:
        """Where the rows of the weight ``name`` are in the tensors of the files."""
        if self.converter is None:
            return Rows.whole(self._only, like)
        if like.dim() > 2 and (members := self.members(len(like))):
            return Rows.joined({n: files[n] for row in members for n in row})

        def made(*values: Tensor) -> Tensor:
            return self.convert(dict(zip(files, values, strict=True)).__getitem__)[name]

        return rearranged(made, files, like)

    def members(self, count: int) -> list[list[str]] | None:
        """Per member of a stack, the tensors that are put together along its rows, if that is all."""
        columns = [self.names[p] for p in self.converter.source_patterns if p in self.names]
        if self._steps not in _STACKS or (len(columns) > 1 and len(self._steps) == 1):
            return None
        if any(len(column) != count for column in columns):
            return None
        return [list(row) for row in zip(*columns, strict=True)]

    @property
    def _steps(self) -> list[tuple[str, Any]]:
        return [(type(op).__name__, getattr(op, "dim", None)) for op in self.converter.operations]

    @property
    def _only(self) -> str:
        return next(iter(self.names.values()))[0]


def _whole_parts(tensors: Tensors, name: str) -> dict[str, Source]:
    stored = tensors.stored(name)
    if stored is None:
        return {}
    return {f"{stored.format}.{n}": Source(p.like, p.read) for n, p in stored.parts.items()}


def _stacked_parts(tensors: Tensors, rows: list[list[str]]) -> dict[str, Source]:
    """Parts of a stack whose members are tensors put together along their rows."""
    found = {name: tensors.stored(name) for row in rows for name in row}
    formats = {s.format if s else None for s in found.values()}
    if None in formats or len(formats) > 1:
        return {}
    format = formats.pop()
    blocked = format == "fp8" and any(
        tensors.like(name).shape[0] % quant.FP8_BLOCK for row in rows for name in row[:-1]
    )
    if blocked:  # a block of scales would cross from one tensor to the next
        return {}

    def member(part: str, index: int) -> Tensor:
        return torch.cat([found[n].parts[part].read() for n in rows[index]])  # type: ignore[union-attr]

    made: dict[str, Source] = {}
    for part in found[rows[0][0]].parts:  # type: ignore[union-attr]
        likes = [[found[n].parts[part].like for n in row] for row in rows]  # type: ignore[union-attr]
        like = torch.stack([torch.cat(row) for row in likes])
        one = partial(member, part)
        made[f"{format}.{part}"] = Source(like, partial(_stack, like, one), one)
    return made


def _stack(like: Tensor, member: Callable[[int], Tensor]) -> Tensor:
    value = torch.empty(like.shape, dtype=like.dtype)
    for i in range(len(value)):
        value[i] = member(i)
    return value


def _groups(model: Any, tensors: Tensors) -> tuple[dict[str, Group], set[str]]:
    """Groups by their first weight, and what no weight of the model comes from."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    table = get_model_conversion_mapping(model)
    renamings = [t for t in table if isinstance(t, WeightRenaming)]
    converters = [t for t in table if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    unexpected: set[str] = set()
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unexpected.add(target)
            continue
        group = groups.setdefault(target, Group(model, target, by_pattern.get(pattern)))
        group.names[pattern or name].append(name)
    return groups, unexpected


# --- for tracing and for running --------------------------------------------------------------------


def fake(model: nn.Module) -> None:
    """Let parameters on the meta device pose as real ones, so that tracing takes them for the model's."""
    mode = FakeTensorMode(
        shape_env=ShapeEnv(
            tracked_fakes=[], prefer_deferred_runtime_asserts_over_guards=True, trace_asserts=True
        ),
        allow_non_fake_inputs=True,
        export=True,
    )  # fmt: skip
    with mode:
        _replace(model, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))


def fill(model: nn.Module, found: Mapping[str, Source]) -> None:
    """Read all weights of a :func:`skeleton` into memory."""
    names = {id(t): n for n, t in model.state_dict(keep_vars=True).items()}
    _replace(model, lambda t: found[names[id(t)]].whole())


def _replace(model: nn.Module, value: Callable[[Tensor], Tensor]) -> None:
    """Put a value where a tensor on the meta device is; what was tied stays tied."""
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        new = value(tensor)
                        made[id(tensor)] = (
                            nn.Parameter(new, requires_grad=False)
                            if isinstance(tensor, nn.Parameter)
                            else new
                        )
                    own[name] = made[id(tensor)]
