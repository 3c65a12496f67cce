"""An ONNX model made of an artifact, for onnxruntime.

One file serves prompts and decoding: ``input_ids``, ``position_ids [B, S]``, ``attention_mask [B, P + S]``
and ``past_key_values.N.*`` of layer N go in, ``logits [B, S, V]`` and ``present.N.*`` come out; batch, length
and past are free.  Sequences of different lengths are padded on the left, where the mask is 0.  Caches are
fp32: ``key`` and ``value [B, heads, P, width]``, or ``latent [B, P, latent + rope]``.

Weights keep their formats where onnxruntime has them (:mod:`._onnx_weights`); logits are those of the
artifact's program up to rounding, which is measured before the directory takes its place.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..api import Progress, open_program
from ..errors import BadRequest, ExportDiffers, MissingExtra
from ..ir.program import Program
from ..runtime import Artifact
from ..runtime.manifest import MANIFEST as ARTIFACT_MANIFEST
from .output import seal, staged

MODEL, DATA = "model.onnx", "model.onnx.data"
_MEMO_BYTES = 1 << 28
_ALIGNMENT = 4096  # so that a runtime can map the weights


def export(
    artifact: Path,
    output: Path,
    *,
    force: bool = False,
    provider: Literal["cpu", "cuda"] = "cpu",
    activations: Literal["int8", "fp32"] = "int8",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the directory ``output``; returns its manifest, which is in ``export.json`` too.

    ``provider`` is where the result is run for the comparison; for ``cuda`` experts compute in fp16, which is
    all that onnxruntime has kernels for there.  ``activations`` is what kernels on a CPU may round the inputs
    of INT4 and INT8 weights to: to INT8 by blocks, as the artifact's own kernels do, or not at all, which is
    many times slower for INT8, since onnxruntime then expands the weights at every step.

    Weights are read and written one at a time.  Raises Unsupported for an op without an ONNX form,
    MissingExtra without the ``onnx`` packages, ExportDiffers if what was written does not compute what the
    artifact does; then nothing is left behind.
    """
    _require(provider)
    say = progress or (lambda what, done, total: None)
    opened = Artifact.open(artifact)
    program = open_program(artifact, verify=False)
    program.weights.memo_bytes = _MEMO_BYTES
    with staged(Path(output), force) as stage:
        emitted = _write(program, stage, provider == "cuda", activations == "int8", say)
        for name in opened.manifest.files:
            folder, _, file = name.partition("/")
            if folder == "tokenizer":
                shutil.copyfile(opened.path / name, stage / file)
        say("check", 0, 1)
        checks = _checked(stage / MODEL, program, provider, emitted["arithmetic"], str(output))
        say("check", 1, 1)
        facts = {
            "tokenmill": __version__,
            "format": "onnx",
            "artifact": {
                "name": program.name,
                "digest": json.loads((opened.path / ARTIFACT_MANIFEST).read_bytes())["digest"],
                "recipe": dict(opened.manifest.recipe),
            },
            **emitted,
            "checks": checks,
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("onnx", "onnx-ir", "onnxruntime")
            },
        }
        return seal(stage, facts)


def _require(provider: str) -> None:
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(
            package=error.name or "onnxruntime", purpose="exporting to ONNX", extra="onnx"
        ) from error
    from ._onnx_check import PROVIDERS

    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise BadRequest(
            reason=f"this onnxruntime has no {PROVIDERS[provider]}",
            advice="install onnxruntime-gpu in place of onnxruntime, or pass --provider cpu",
        )


def _write(
    program: Program, stage: Path, half: bool, rounded: bool, say: Progress
) -> dict[str, Any]:
    """Write the model; returns what the manifest says of it."""
    import onnx_ir as ir

    from ._onnx_graph import OPSETS, Graph
    from ._onnx_ops import Emitter

    graph = Graph(program.name, accuracy_level=4 if rounded else 0)
    emitter = Emitter(program, graph, half)
    emitter.run()
    model = graph.model(tokenmill=__version__, positions=str(program.positions))
    count = len(model.graph.initializers)
    written = [0]

    def heard(tensor: Any, info: Any) -> None:
        written[0] += 1
        say("weights", min(written[0], count), count)

    ir.save(model, stage / MODEL, external_data=DATA, callback=heard, alignment=_ALIGNMENT)
    return {
        "opsets": {domain or "ai.onnx": version for domain, version in OPSETS.items()},
        "inputs": {v.name: _signature(v) for v in model.graph.inputs},
        "outputs": {v.name: _signature(v) for v in model.graph.outputs},
        "arithmetic": "fp16" if half else "int8" if rounded and graph.quantized else "fp32",
        "notes": _notes(program, emitter.loops, graph.widened),
    }


def _signature(value: Any) -> dict[str, Any]:
    return {
        "dtype": value.dtype.name.lower(),
        "shape": [d if isinstance(d, int) else str(d.value) for d in value.shape],
    }


def _notes(program: Program, loops: list[str], widened: set[str]) -> list[str]:
    """What a person should know before running it."""
    formats = {spec.format for spec in program.caches} - {"fp32"}
    notes = [
        f"{place}: no contrib op has these formats and this activation, so experts are a loop in "
        "standard ops" for place in loops
    ]  # fmt: skip
    if formats:
        notes.append(f"caches are fp32 here, and {', '.join(sorted(formats))} in the artifact")
    if program.caches:
        notes.append("pad on the left; windows count places along the cache")
    if wide := sorted(widened - {"fp32"}):
        notes.append(f"some matrices in {', '.join(wide)} take 4 bytes a number once loaded")
    return notes


def _checked(
    file: Path, program: Program, provider: str, arithmetic: str, output: str
) -> dict[str, Any]:
    """Run the model and compare it with the program; raises ExportDiffers.

    What rounds its inputs is compared twice: without the rounding, when hardly anything may differ, and as it
    is.
    """
    from . import _onnx_check as check

    errors: dict[str, Any] = {}

    def run(model: Path, how: str) -> check.Measured:
        found = check.compare(model, program, provider)
        tolerance = check.TOLERANCES[how]
        if not (worst := found.errors[found.worst]) <= tolerance:
            reason = f"relative error {worst:.3g} > {tolerance:.3g} ({found.worst}, {how})"
            raise ExportDiffers(path=output, reason=reason)
        errors[how] = {"tolerance": tolerance, "relative_errors": found.errors}
        return found

    if arithmetic == "int8":
        exact = check.unrounded(file)
        run(exact, "fp32")
        exact.unlink()
    found = run(file, arithmetic)
    with tempfile.TemporaryDirectory() as folder:
        placed = check.placement(file, provider, Path(folder))
    return {
        "provider": check.PROVIDERS[provider],
        "arithmetic": errors,
        "relative_error_of_cache_format": found.cache,
        **placed,
    }
