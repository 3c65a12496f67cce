"""An exported directory against the program that it came from, run by onnxruntime.

Caches come out of the export in fp32, so that is how the program's are kept for the comparison; what the
artifact's own cache format adds is measured beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from ..ir.program import Program

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Of the norm of logits: with fp32 arithmetic, with experts in fp16, with inputs rounded to INT8, where tokens
# may visit other experts.
TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2, "int8": 0.2}
_TOKENS, _STEPS = 72, 6  # more than a page of the cache; decoded one by one
_FORMATS = {"cached_attention": "format", "cached_latent_attention": "cache_format"}


class Model:
    """A session over an exported file, with the caches of the sequences that it runs."""

    def __init__(self, file: Path, provider: str, profile: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        wanted = list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))
        self.session = onnxruntime.InferenceSession(str(file), options, providers=wanted)
        self.reset(1)

    def reset(self, batch: int) -> None:
        """Begin ``batch`` new sequences."""
        self._caches = {
            i.name: np.zeros([{"batch": batch, "past": 0}.get(d, d) for d in i.shape], np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past_key_values.")
        }
        self._mask = np.zeros((batch, 0), np.int64)

    def step(self, ids: NDArray[np.int64], real: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits ``[B, S, V]`` of the tokens ``ids [B, S]``, of which those with ``real`` 0 are padding."""
        self._mask = np.concatenate((self._mask, real), 1)
        positions = np.maximum(self._mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        names = [o.name for o in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, inputs | self._caches), strict=True))
        logits: NDArray[np.float32] = found.pop("logits")
        self._caches = {n.replace("present", "past_key_values"): x for n, x in found.items()}
        return logits


@dataclass(frozen=True)
class Measured:
    """Relative errors of logits by what was run, and ``cache``: what the artifact's cache format adds."""

    errors: dict[str, float]
    cache: float

    @property
    def worst(self) -> str:
        return max(self.errors, key=lambda name: self.errors[name])


def unrounded(file: Path) -> Path:
    """The same model beside it, over the same weights, whose kernels round no inputs."""
    model = ir.load(file)
    for node in model.graph.all_nodes():
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    exact = file.with_name(f"unrounded.{file.name}")
    ir.save(model, exact)
    return exact


def compare(file: Path, program: Program, provider: str) -> Measured:
    """Run a prompt, tokens one by one, a single token, and two sequences of different lengths."""
    rng = np.random.default_rng(0)
    count = min(_TOKENS, program.positions)
    steps = min(_STEPS, count - 1)
    prompts = [rng.integers(0, program.vocab, n) for n in (count, count // 2 + 1)]
    wide = _wide(program)
    wanted = [wide.run(ids.tolist()).numpy() for ids in prompts]
    model = Model(file, provider)
    first, whole = prompts[0], wanted[0]
    found = {
        "prompt": (_run(model, [first], 0)[0], whole),
        "decoding": (_run(model, [first], steps)[0], whole),
        "one token": (_run(model, [first[:1]], 0)[0], whole[:1]),
    }
    for i, (got, want) in enumerate(zip(_run(model, prompts, steps), wanted, strict=True)):
        found[f"batch of two, {i}"] = (got, want)
    errors = {name: _error(got, want) for name, (got, want) in found.items()}
    own = program.run(first.tolist()).numpy()
    return Measured(errors, _error(whole, own))


def _run(
    model: Model, prompts: Sequence[NDArray[np.int64]], steps: int
) -> list[NDArray[np.float32]]:
    """Logits ``[n, V]`` of each prompt: padded to the left, the last ``steps`` tokens one by one."""
    longest = max(map(len, prompts))
    ids = np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts])
    real = np.stack([np.arange(longest) >= longest - len(p) for p in prompts]).astype(np.int64)
    model.reset(len(prompts))
    ends = [longest - steps, *range(longest - steps + 1, longest + 1)]
    found, begin = [], 0
    for end in ends:
        found.append(model.step(ids[:, begin:end], real[:, begin:end]))
        begin = end
    logits = np.concatenate(found, 1)
    return [row[longest - len(p) :] for row, p in zip(logits, prompts, strict=True)]


def _error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))


def _wide(program: Program) -> Program:
    """The program with caches in fp32."""
    twin = program.copy()
    twin.caches = [
        replace(c, format="fp32", parts=tuple(replace(p, format=None) for p in c.parts))
        for c in twin.caches
    ]
    for node in twin.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        name = _FORMATS.get(getattr(packet, "__name__", ""))
        if name is not None:
            schema = [a.name for a in node.target._schema.arguments]
            node.update_arg(schema.index(name), "fp32")
    return twin


def placement(file: Path, provider: str, folder: Path) -> dict[str, Any]:
    """How many nodes of a step each provider runs, by op, and the names of those left to the CPU.

    Profiles one token in ``folder``.
    """
    model = Model(file, provider, folder / "profile")
    one = np.ones((1, 1), np.int64)
    model.step(one, one)
    events = json.loads(Path(model.session.end_profiling()).read_text("utf-8"))
    nodes = [e["args"] | {"name": e["name"]} for e in events if e.get("cat") == "Node"]
    run = [n for n in nodes if n["name"].endswith("_kernel_time")]
    by: dict[str, Counter[str]] = {}
    for node in run:
        by.setdefault(node["provider"], Counter())[node["op_name"]] += 1
    left = [
        n["name"].removesuffix("_kernel_time") for n in run if n["provider"] == PROVIDERS["cpu"]
    ]
    return {
        "nodes": {p: dict(sorted(count.items())) for p, count in sorted(by.items())},
        "left_to_cpu": [] if provider == "cpu" else sorted(left),
    }
