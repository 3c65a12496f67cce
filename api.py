"""The optimization API: one call from a model to an artifact, and one from an artifact to a session."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import __version__
from .capture.checkpoint import Checkpoint, open_checkpoint
from .capture.huggingface import capture_pretrained
from .capture.module import capture
from .codegen import build, emit, parse_target, toolchain
from .errors import BadRequest, BadWeight
from .facts import Recorder
from .ir.plan import Capacity, Device, Plan, dump
from .ir.plan import load as load_plan
from .ir.program import Program
from .passes.lower import lower
from .passes.memory import memory
from .passes.narrow import narrow
from .passes.pipeline import check_capture, eager_samples, pipeline, run_passes
from .recipe import Recipe
from .report import render
from .runtime import Artifact, Session
from .runtime.artifact import PLANS, ArtifactWriter, Target, TensorSpec, check_output


class Progress(Protocol):
    """Hears what is being done: ``done`` of ``total`` steps."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@dataclass
class Compiled:
    """What a compile yields.

    ``facts`` is what the report says, ``sources`` the kernels by file, ``graphs`` the graph's text by
    stage, ``path`` where the artifact was written.
    """

    plans: dict[Device, Plan]
    facts: dict[str, Any]
    sources: dict[str, str] = field(repr=False)
    graphs: dict[str, str] = field(repr=False)
    path: Path | None = None


def optimize(
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe | None = None,
    check: bool = False,
    dry_run: bool = False,
    force: bool = False,
    example_ids: Tensor | None = None,
    max_positions: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a model into an artifact at ``output``.

    ``model`` is a Hugging Face directory or hub id, or a module that maps ids ``[1, T]`` to logits
    ``[1, T, V]``; for a module, ``max_positions`` bounds a sequence's length (default 2048).  With
    ``check`` the model is executed before and after every pass; with ``dry_run`` nothing is built or
    written.  Raises a TokenmillError for bad input, before anything is written.
    """
    recipe = recipe or Recipe()
    passes = pipeline(recipe)
    targets = [parse_target(t) for t in dict.fromkeys(recipe.targets)]
    if output is None and not dry_run:
        raise BadRequest(reason="no output directory", advice="pass output=, or dry_run=True")
    if output is not None and not dry_run:
        check_output(output, force)
        tools = {t.name: toolchain(t) for t in targets}  # none is missing, before the work
    say = progress or (lambda what, done, total: None)

    say("capture", 0, 1)
    checkpoint = None
    if not isinstance(model, nn.Module):
        checkpoint = open_checkpoint(os.fspath(model), trust_remote_code)
        model = checkpoint.load()
    expected = eager_samples(model) if check else []
    start = time.perf_counter()
    program = _capture(model, checkpoint, example_ids, max_positions)
    seconds = time.perf_counter() - start
    if checkpoint is None:  # those of a checkpoint were checked under their names in its files
        check_weights(program)
    recorder = Recorder(program, checkpoint)
    recorder.passes.append(check_capture(program, expected, seconds))
    say("capture", 1, 1)

    def observe(program: Program, result: Any) -> None:
        recorder.after_pass(program, result)
        say("passes", len(recorder.passes), 1 + len(passes))

    run_passes(program, passes, check=check, observe=observe)
    capacity = Capacity(recipe.max_step_tokens, recipe.max_step_rows)
    plans = {
        device: _plan(program, capacity, device)
        for device in dict.fromkeys(t.device for t in targets)
    }

    say("kernels", 0, 1)
    sources = {t.name: emit(plans[t.device], t.name) for t in targets}
    say("kernels", 1, 1)
    facts = recorder.facts(program, plans, passes, recipe, [t.name for t in targets])
    flat = {f"kernels/{t}/{n}": text for t, files in sources.items() for n, text in files.items()}
    if dry_run:
        return Compiled(plans, facts, flat, recorder.graphs)

    assert output is not None
    with ArtifactWriter(output, force) as writer:
        facts["binaries"] = {}
        for target in targets:
            built = build(sources[target.name], target, say)
            for name, data in built.files.items():
                writer.bytes(f"kernels/{target.name}/{name}", data)
            if built.facts:
                facts["binaries"][target.name] = built.facts
        for name, text in flat.items():
            writer.text(name, text)
        for device, plan in plans.items():
            writer.json(PLANS[device], dump(plan))
        _write_weights(writer, program, plans.values(), say)
        for stage, text in recorder.graphs.items():
            writer.text(f"graphs/{stage}.txt", text)
        for file in checkpoint.tokenizer_files if checkpoint else []:
            writer.copy(f"tokenizer/{file.name}", file)
        writer.text("report.html", render(_timeless(facts), flat))
        writer.describe(
            targets=[
                Target(t.name, f"kernels/{t.name}", t.features, machine=t.machine) for t in targets
            ],
            tokenmill=__version__,
            toolchain={**tools, "torch": torch.__version__},
            recipe=recipe.dump(),
            report=_timeless(facts),
        )
    return Compiled(plans, facts, flat, recorder.graphs, Path(output))


def load(path: str | os.PathLike[str], **options: Any) -> Session:
    """Open an artifact for generation; options are those of :class:`Session`."""
    return Session(path, **options)


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every hash, and that the kernels are what the plan emits; raises ArtifactDamaged otherwise.

    ``reproducible`` is False if this version of tokenmill emits other text than the one that built it.
    """
    artifact = Artifact.open(path)
    plans = {d: load_plan(artifact.json(PLANS[d])) for d in {t.device for t in artifact.targets}}
    differing: list[str] = []
    for target in artifact.targets:
        for name, text in emit(plans[target.device], target.name).items():
            file = artifact.path / target.directory / name
            if not file.is_file() or file.read_text() != text:
                differing.append(f"{target.directory}/{name}")
    return {
        "path": str(path),
        "files": len(artifact.manifest.files),
        "hashes": "ok",
        "reproducible": not differing,
        "differing": differing,
        "built_by": artifact.manifest.tokenmill,
    }


def original(model: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The eager model in fp32, to compare with."""
    return open_checkpoint(os.fspath(model), trust_remote_code).load()


# --- steps ------------------------------------------------------------------------------------------


def _capture(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    example_ids: Tensor | None,
    max_positions: int | None,
) -> Program:
    name = checkpoint.name if checkpoint else type(model).__name__
    if hasattr(model, "set_attn_implementation"):
        return capture_pretrained(model, name)
    return capture(model, example=example_ids, max_positions=max_positions or 2048, name=name)


def check_weights(program: Program) -> None:
    """Raise BadWeight for the first weight that holds NaN or Inf."""
    for name in program.used_weights():
        value = program.weights[name]
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadWeight(name=name, count=int((~torch.isfinite(value)).sum()))


def _timeless(facts: dict[str, Any]) -> dict[str, Any]:
    """Without durations: two builds of the same input are the same bytes."""
    return {**facts, "passes": [{**p, "seconds": None} for p in facts["passes"]]}


def _plan(program: Program, capacity: Capacity, device: Device) -> Plan:
    plan = lower(program, capacity, device)
    return memory(plan if device == "cpu" else narrow(plan))


def _write_weights(
    writer: ArtifactWriter, program: Program, plans: Iterable[Plan], say: Callable[..., None]
) -> None:
    """Stream the plans' weights to disk, one at a time; what both read is there once."""
    buffers = [b for plan in plans for b in plan.buffers.values() if b.kind == "weight"]
    index = list(dict.fromkeys(TensorSpec(b.name, b.dtype, b.shape) for b in buffers))

    def data() -> Any:
        for i, spec in enumerate(index):
            yield spec.name, _bytes(program.weights[spec.name])
            say("weights", i + 1, len(index))

    writer.weights(index, data())


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes as a flat numpy array (bf16 and e4m3 have no numpy type)."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
