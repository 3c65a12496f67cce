"""The optimization API: one call from a model to an artifact, and one from an artifact to a session."""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import __version__
from .calibration import LENGTH, Text
from .calibration import read as read_calibration
from .capture.checkpoint import Checkpoint, Streamed, open_checkpoint
from .capture.huggingface import capture_pretrained
from .capture.module import capture
from .codegen import Table, build, check_table, emit, parse_target, toolchain
from .codegen.custom import unknown
from .errors import (
    ArtifactDamaged,
    ArtifactTooOld,
    BadRequest,
    BadWeight,
    ExtensionMissing,
    LossTooHigh,
)
from .export import parameters
from .facts import Recorder, emitted
from .ir import serialize, stored
from .ir.plan import Capacity, Device, Plan, dump
from .ir.plan import load as load_plan
from .ir.program import Program
from .passes.calibrate import Calibrate
from .passes.chain import chain
from .passes.heal_scales import HealScales
from .passes.latent_kv import LatentKV
from .passes.lower import lower
from .passes.memory import memory
from .passes.narrow import narrow
from .passes.pipeline import (
    Fit,
    before_quantization,
    check_capture,
    eager_samples,
    pipeline,
    run_passes,
)
from .passes.quantize import Quantize, check_stored
from .passes.workspace import Workspace
from .recipe import Recipe, load_module
from .report import render
from .runtime import Artifact
from .runtime.artifact import PLANS, PROGRAM, ArtifactWriter, Target, TensorSpec, check_output
from .runtime.tensors import Tensor as MappedTensor
from .search import Found, search
from .units import size

HEALING_TOKENS = 1 << 20  # at most, of the text that weights are trained on


class Progress(Protocol):
    """Hears what is being done: ``done`` of ``total`` steps."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@dataclass
class Compiled:
    """What a compile yields.

    ``facts`` is what the report says, ``sources`` the kernels by file, ``graphs`` the graph's text by
    stage, ``recipe`` the one that was followed, with the rules that a search found, ``path`` where the
    artifact was written.
    """

    plans: dict[Device, Plan]
    facts: dict[str, Any]
    sources: dict[str, str] = field(repr=False)
    graphs: dict[str, str] = field(repr=False)
    recipe: Recipe
    path: Path | None = None


def optimize(
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe | None = None,
    check: bool = False,
    dry_run: bool = False,
    config_only: bool = False,
    force: bool = False,
    example_ids: Tensor | None = None,
    max_positions: int | None = None,
    calibration_ids: Sequence[Tensor] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a model into an artifact at ``output``.

    ``model`` is a Hugging Face directory or hub id, or a module that maps ids ``[1, T]`` to logits
    ``[1, T, V]``; for a module, ``max_positions`` bounds a sequence's length (default 2048).  With
    ``check`` the model is executed before and after every pass; with ``dry_run`` nothing is built or
    written; with ``config_only`` too, a directory's config.json is enough, and no weights are looked for.
    ``calibration_ids``, sequences of token ids ``[T]``, stand for the recipe's calibration text.

    Fitting weights to a text takes long for a large model: what is finished is kept in ``OUTPUT.work`` until
    all is, and the same call goes on from there.  Raises a TokenmillError for bad input, before anything is
    written.
    """
    if not isinstance(model, str | os.PathLike | nn.Module):
        raise BadRequest(
            reason=f"a model that is a {type(model).__name__}",
            advice="pass a checkpoint's directory, a hub id, or an nn.Module",
        )
    recipe = Recipe.model_validate(recipe or {})  # a dict of its fields will do
    pipeline(recipe)  # raises for a pass that is not there
    targets = [parse_target(t) for t in dict.fromkeys(recipe.targets)]
    tables: dict[str, Table] = {table.target: table.tiles for table in recipe.tiles}
    for name, table in tables.items():
        check_table(name, table)
    if output is None and not dry_run:
        raise BadRequest(reason="no output directory", advice="pass output=, or dry_run=True")
    if output is not None and not dry_run:
        check_output(output, force)
        tools = {t.name: toolchain(t) for t in targets}  # none is missing, before the work
    if config_only:
        _refuse_numbers(model, recipe, check, dry_run)
    say = progress or (lambda what, done, total: None)

    say("capture", 0, 1)
    checkpoint = None
    if not isinstance(model, nn.Module):
        checkpoint = open_checkpoint(os.fspath(model), trust_remote_code, config_only)
    fitted, searched, healing = None, None, None
    if not config_only:
        fitted, searched = _texts(recipe, checkpoint, calibration_ids)
        healing = _healing_text(recipe, checkpoint, calibration_ids)
    expected = eager_samples(_eager(model, checkpoint)) if check else []
    start = time.perf_counter()
    streamed = checkpoint.stream() if checkpoint else Streamed(model)
    program = _capture(streamed, checkpoint, example_ids, max_positions)
    seconds = time.perf_counter() - start
    if checkpoint is None:  # those of a checkpoint were checked under their names in its files
        check_weights(program)
    recorder = Recorder(program, checkpoint)
    captured = check_capture(program, expected, seconds)
    captured.notes += [streamed.note] if streamed.note else []
    recorder.passes.append(captured)
    say("capture", 1, 1)

    fit = Fit()
    if not dry_run:
        fit = _fit(output, recipe, checkpoint, fitted, healing, say)
    passes = pipeline(recipe, fit)

    def observe(program: Program, result: Any) -> None:
        done = len(recorder.passes)  # the capture is one of them
        last = done == len(passes) or passes[done].produces is not None
        recorder.after_pass(program, result, last)
        say("passes", len(recorder.passes), 1 + len(passes))

    # What changes the model itself comes before the search for formats, which is for the model as it is then.
    converting = next((p for p in passes if isinstance(p, LatentKV)), None)
    after = converting.name if converting else None
    done = 1 + passes.index(converting) if converting else 0
    try:
        run_passes(program, passes[:done], check=check, observe=observe)
    except LossTooHigh:  # the same call would end there again
        if fit.workspace is not None:
            fit.workspace.remove()
        raise
    found = None
    if fitted is not None and searched is not None:
        found = _search(program, _left(recipe, converting), fitted, searched, say, after)
        recipe = found.recipe
        passes = passes[:done] + pipeline(recipe, fit, after)
    run_passes(program, passes[done:], check=check, observe=observe)
    for quantize in (p for p in passes if isinstance(p, Quantize)):
        check_stored(program, quantize.decisions)
    capacity = Capacity(recipe.max_step_tokens, recipe.max_step_rows)
    plans = {
        device: plan_for(program, capacity, device)
        for device in dict.fromkeys(t.device for t in targets)
    }

    say("kernels", 0, 1)
    sources = {t.name: emit(plans[t.device], t.name, tables.get(t.name)) for t in targets}
    say("kernels", 1, 1)
    facts = recorder.facts(program, plans, passes, recipe, [t.name for t in targets])
    facts["emitted"] = {t.name: emitted(plans[t.device], sources[t.name]) for t in targets}
    facts["calibration"] = _fitted(fitted, passes)
    facts["search"] = found and found.facts
    facts["heal_scales"] = next((p.facts for p in passes if isinstance(p, HealScales)), None)
    facts["kv_compress"] = None
    if converting:
        plan = next(iter(plans.values()))
        facts["kv_compress"] = recorder.converted(converting.facts, facts, plan, recipe)
    flat = {f"kernels/{t}/{n}": text for t, files in sources.items() for n, text in files.items()}
    if dry_run:
        return Compiled(plans, facts, flat, recorder.graphs, recipe)

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
        writer.json(PROGRAM, serialize.dump(program))
        _write_weights(writer, program, plans.values(), say)
        for stage, text in recorder.graphs.items():
            writer.text(f"graphs/{stage}.txt", text)
        for file in checkpoint.tokenizer_files if checkpoint else []:
            writer.copy(f"tokenizer/{file.name}", file)
        for file in checkpoint.config_files if checkpoint else []:
            writer.copy(f"source/{file.name}", file)
        if streamed.sources:
            writer.json(parameters.FILE, parameters.describe(program, streamed.sources))
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
    if fit.workspace is not None:
        fit.workspace.remove()
    return Compiled(plans, facts, flat, recorder.graphs, recipe, Path(output))


def open_program(path: str | os.PathLike[str], verify: bool = True) -> Program:
    """The program that an artifact was compiled from, after all passes, over the artifact's weights.

    Nothing of them is read before it is asked for; what kernels read in an order of their own is brought
    back into that of :mod:`.ir.quant`, so the numbers are those of the compile, bit for bit.  Raises what
    Artifact.open raises, ArtifactTooOld if the artifact holds no program, ArtifactDamaged if the program is
    not that of its weights.
    """
    artifact = Artifact.open(path, verify)
    if artifact.file(PROGRAM) is None:
        raise ArtifactTooOld(
            path=str(path), built_by=artifact.manifest.tokenmill, missing="their program"
        )
    tensors = {name: _mapped(tensor) for name, tensor in artifact.weights().items()}
    try:
        return stored.load(artifact.json(PROGRAM), tensors)
    except (KeyError, TypeError, ValueError) as error:
        file = str(artifact.path / PROGRAM)
        raise ArtifactDamaged(file=file, reason=f"malformed: {error}") from error


def verify(path: str | os.PathLike[str], extensions: Sequence[str] = ()) -> dict[str, Any]:
    """Check every hash, and that the kernels are what the plan emits; raises ArtifactDamaged otherwise.

    ``extensions`` are modules with the kernels and formats of the user's own that the artifact uses; only
    these are imported, never those that the artifact itself names.  Raises ExtensionMissing without them.
    ``reproducible`` is False if this version of tokenmill emits other text than the one that built it.
    """
    artifact = Artifact.open(path)
    plans = open_plans(artifact, extensions)
    differing = [
        name
        for target in artifact.targets
        for name in differing_sources(artifact, target, plans[target.device])
    ]
    return {
        "path": str(path),
        "files": len(artifact.manifest.files),
        "hashes": "ok",
        "reproducible": not differing,
        "differing": differing,
        "built_by": artifact.manifest.tokenmill,
    }


def open_plans(artifact: Artifact, extensions: Sequence[str] = ()) -> dict[str, Plan]:
    """The plans of an artifact, by device; raises ExtensionMissing for what no ``extensions`` add."""
    for name in extensions:
        load_module(name, "extension")
    stored_plans = {d: artifact.json(PLANS[d]) for d in {t.device for t in artifact.targets}}
    if missing := [what for plan in stored_plans.values() for what in unknown(plan)]:
        names = ", ".join(artifact.manifest.recipe.get("extensions", ()))
        recorded = f" (its recipe says: {names})" if names else ""
        raise ExtensionMissing(what=missing[0], recorded=recorded)
    return {d: load_plan(plan) for d, plan in stored_plans.items()}


def tiles_of(artifact: Artifact, target: str) -> Table:
    """The tiles of the user's own that an artifact's kernels for ``target`` were made with."""
    tables = artifact.manifest.recipe.get("tiles", ())
    return next((table["tiles"] for table in tables if table["target"] == target), {})


def differing_sources(artifact: Artifact, target: Target, plan: Plan) -> list[str]:
    """Files of a target that this version of tokenmill would write otherwise."""
    emitted = emit(plan, target.name, tiles_of(artifact, target.name))
    files = {name: artifact.path / target.directory / name for name in emitted}
    return [
        f"{target.directory}/{name}"
        for name, text in emitted.items()
        if not files[name].is_file() or files[name].read_text() != text
    ]


def original(model: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The eager model in fp32, to compare with."""
    return open_checkpoint(os.fspath(model), trust_remote_code).load()


# --- steps ------------------------------------------------------------------------------------------


def _refuse_numbers(model: Any, recipe: Recipe, check: bool, dry_run: bool) -> None:
    """Raise BadRequest for what a config alone cannot give."""
    wanted = {
        "a module brings its weights along": isinstance(model, nn.Module),
        "an artifact needs weights, and config_only has none": not dry_run,
        "checking runs the model, and config_only has no weights": check,
        "a search within a budget runs the model, and config_only has no weights": (
            recipe.budget is not None
        ),
    }
    for reason, asked in wanted.items():
        if asked:
            raise BadRequest(
                reason=reason,
                advice="with config_only pass dry_run, a directory, and neither check nor budget",
            )


def _eager(model: Any, checkpoint: Checkpoint | None) -> nn.Module:
    return checkpoint.load() if checkpoint else model


def _texts(
    recipe: Recipe, checkpoint: Checkpoint | None, ids: Sequence[Tensor] | None
) -> tuple[Text | None, Text | None]:
    """The texts that weights are fitted to and formats are searched with, as far as they are needed."""
    if recipe.rounding == "rtn" and not recipe.balance and recipe.budget is None:
        return None, None
    tokens = recipe.calibration_tokens * (1 if recipe.budget is None else 2)
    text = _text(recipe, checkpoint, ids, tokens)
    return text.split() if recipe.budget is not None else (text, None)


def _healing_text(
    recipe: Recipe, checkpoint: Checkpoint | None, ids: Sequence[Tensor] | None
) -> Text | None:
    """All of the text, for weights that are trained on it."""
    if recipe.kv_compress is None and recipe.heal_scales is None:
        return None
    text = _text(recipe, checkpoint, ids, HEALING_TOKENS)
    if len(text.hold_out()[1]) < 2:
        raise BadRequest(
            reason=f"{text.source} makes {len(text.sequences)} sequences, too few to measure healing on",
            advice="pass four sequences or more of the kind of text that the model will see, better "
            "50,000 tokens",
        )
    return text


def _text(
    recipe: Recipe, checkpoint: Checkpoint | None, ids: Sequence[Tensor] | None, tokens: int
) -> Text:
    if ids is not None:
        return Text([s.reshape(-1).long() for s in ids])
    if checkpoint is None:
        raise BadRequest(
            reason="a module comes without a tokenizer, which calibration needs",
            advice="pass calibration_ids, token ids of text like what the model will see",
        )
    positions = checkpoint.config.get("max_position_embeddings", LENGTH)
    return read_calibration(recipe.calibration, checkpoint.path, tokens, positions)


def _fit(
    output: str | os.PathLike[str] | None,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    fitted: Text | None,
    healing: Text | None,
    say: Progress,
) -> Fit:
    text = fitted or healing
    if text is None:
        return Fit()
    workspace = _workspace(output, recipe, checkpoint, text)
    trained, held = healing.hold_out() if healing else ([], [])
    return Fit(fitted.sequences if fitted else (), trained, held, workspace, say)


def _left(recipe: Recipe, converting: LatentKV | None) -> Recipe:
    """With what a conversion has lost taken from the budget."""
    if converting is None or recipe.budget is None or recipe.budget.nats is None:
        return recipe
    left = recipe.budget.less(converting.loss.guarded)
    return recipe.model_copy(update={"budget": left})


def _fitted(text: Text | None, passes: Sequence[Any]) -> dict[str, Any] | None:
    """The text that weights were fitted to, with what a person should know about it."""
    if text is None:
        return None
    starved = [note for p in passes if isinstance(p, Calibrate) for note in p.starved]
    return text.facts | {"notes": [*text.notes, *starved]}


def _search(
    program: Program,
    recipe: Recipe,
    fitted: Text,
    searched: Text,
    say: Progress,
    after: str | None,
) -> Found:
    """Formats within the recipe's budget; what comes out is rounded as the artifact will be."""
    fit = Fit(fitted.sequences)

    def calibrate(quantized: Program) -> None:
        Calibrate(fit.text, recipe.rounding).run(quantized)  # type: ignore[arg-type]

    return search(
        lambda wanted: before_quantization(program, wanted, fit, after),
        recipe,
        searched.sequences,
        say,
        calibrate if recipe.rounding != "rtn" else None,
    )


def _workspace(
    output: str | os.PathLike[str] | None,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    text: Text,
) -> Workspace | None:
    """Beside the artifact; a module cannot be told from another one, so its work is not kept."""
    if output is None or checkpoint is None:
        return None
    files = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in checkpoint.shards]
    key = {
        "tokenmill": __version__, "recipe": recipe.dump(), "text": text.digest, "model": files,
    }  # fmt: skip
    path = Path(output)
    return Workspace(path.with_name(f"{path.name}.work"), key)


def _capture(
    streamed: Streamed,
    checkpoint: Checkpoint | None,
    example_ids: Tensor | None,
    max_positions: int | None,
) -> Program:
    model, sources = streamed.model, streamed.sources
    name = checkpoint.name if checkpoint else type(model).__name__
    if hasattr(model, "set_attn_implementation"):
        return capture_pretrained(model, name, sources)
    return capture(
        model, example=example_ids, max_positions=max_positions or 2048, name=name, sources=sources
    )


def check_weights(program: Program) -> None:
    """Raise BadWeight for the first weight that holds NaN or Inf."""
    for name in program.used_weights():
        value = program.weights[name]
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadWeight(name=name, count=int((~torch.isfinite(value)).sum()))


def _timeless(facts: dict[str, Any]) -> dict[str, Any]:
    """Without durations: two builds of the same input are the same bytes."""
    return {**facts, "passes": [{**p, "seconds": None} for p in facts["passes"]]}


def plan_for(program: Program, capacity: Capacity, device: Device) -> Plan:
    """The steps of a program on a kind of device, with every buffer in its place."""
    plan = chain(lower(program, capacity, device))
    return memory(plan if device == "cpu" else narrow(plan))


def _write_weights(
    writer: ArtifactWriter, program: Program, plans: Iterable[Plan], say: Callable[..., None]
) -> None:
    """Stream the plans' weights to disk, one at a time; what both read is there once."""
    buffers = [b for plan in plans for b in plan.buffers.values() if b.kind == "weight"]
    index = list(dict.fromkeys(TensorSpec(b.name, b.dtype, b.shape) for b in buffers))

    label = f"weights, in {size(_writing_bytes(program, index))}"
    say(label, 0, len(index))

    def data() -> Any:
        for i, spec in enumerate(index):
            yield spec.name, _bytes(program.weights[spec.name])
            say(label, i + 1, len(index))

    writer.weights(index, data())


def _writing_bytes(program: Program, index: Sequence[TensorSpec]) -> int:
    """About how much memory writing takes: what the process has, what is kept, and the largest weight
    beside two copies in fp32 of a matrix that it is made of.
    """
    weights = program.weights
    sources = {
        s.name: [weights.like(root).shape[-2:].numel() for root in weights.roots(s.name)]
        for s in index
    }
    largest = max((s.nbytes + 8 * max(sources[s.name]) for s in index), default=0)
    kept = min(weights.memo_bytes, 4 * sum(map(sum, sources.values())))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + kept + largest


def _mapped(tensor: MappedTensor) -> Tensor:
    """A stored tensor, still on disk."""
    with warnings.catch_warnings():  # it is read-only, which torch dislikes
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(tensor.array).view(serialize.TORCH_DTYPES[tensor.dtype])


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes as a flat numpy array (bf16 and e4m3 have no numpy type)."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
