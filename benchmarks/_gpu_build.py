"""What gpu.py brings to the card: emitted kernels, cross-compiled, in directories that need no Triton.

DIR/build.json            target, formats, layers
DIR/checks-f32, -bf16     single kernels on hostile shapes; suite.json says which, and on what batches
DIR/gemm, experts, mla, prompt   kernels at the shapes of models
DIR/gemm-pointers         large products without tensor descriptors
DIR/model-FORMAT          the bundled model, a whole artifact, and expected.npz
DIR/end-FORMAT            an artifact of a large model without its weights
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenmill
import torch
from _gpu_cases import (
    END_FORMATS,
    LAYERS,
    MODEL_DECODED,
    MODEL_FORMATS,
    MODEL_PROMPT,
    MODEL_ROWS,
    MODEL_STEP,
    PROMPT,
    SUITES,
    TOGETHER,
    Suite,
    lite_config,
    model_batches,
)
from tokenmill import codegen
from tokenmill.api import plan_for
from tokenmill.codegen import reference
from tokenmill.codegen.triton import tiles
from tokenmill.codegen.triton.target import GpuTarget
from tokenmill.ir import cache
from tokenmill.ir import plan as plans
from tokenmill.ir.plan import Capacity, KernelSpec, Plan
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from tokenmill.runtime import Artifact, Session
from tokenmill.runtime.artifact import ArtifactWriter, Target

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny_deepseek"
CHECKED = {"f32": (1, 200), "bf16": (1, 8, 200)}  # activations -> buckets
END_BUCKETS = (1, TOGETHER, PROMPT)

Compile = Callable[[Mapping[str, str], GpuTarget], Mapping[str, bytes]]


def build(folder: Path, target: str, wanted: Callable[[str], bool], layers: int = LAYERS) -> None:
    """Everything whose directory is ``wanted``; what is there already of another build is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"target": target, "layers": layers, "tokenmill": tokenmill.__version__}
    (folder / "build.json").write_text(json.dumps(about) + "\n")
    works: dict[str, Callable[[Path], object]] = {}
    for dtype in CHECKED:
        works[f"checks-{dtype}"] = lambda path, d=dtype: build_checks(path, target, d)
    for name, suite in SUITES.items():
        works[name] = lambda path, s=suite: build_suite(path, target, s)
    for fmt in MODEL_FORMATS:
        works[f"model-{fmt}"] = lambda path, f=fmt: build_model(path, target, f)
    for fmt in END_FORMATS:
        works[f"end-{fmt}"] = lambda path, f=fmt: build_end(path, target, f, layers)
    for name, work in works.items():
        if not wanted(name):
            continue
        path, start = folder / name, time.perf_counter()
        shutil.rmtree(path, ignore_errors=True)
        work(path)
        files = [file for file in path.rglob("*") if file.is_file()]
        size, count = sum(f.stat().st_size for f in files), sum(f.suffix == ".cubin" for f in files)
        seconds = time.perf_counter() - start
        print(f"{name}: {count} binaries, {size / 1e6:.1f} MB, {seconds:.0f} s", file=sys.stderr)


# --- kernels ----------------------------------------------------------------------------------------


def compiled(files: Mapping[str, str], target: GpuTarget) -> Mapping[str, bytes]:
    """Binaries and binaries.json of emitted text, without PTX."""
    built = codegen.build(files, target, _progress)
    return {name: data for name, data in built.files.items() if not name.endswith(".ptx")}


def _progress(what: str, done: int, total: int) -> None:
    if done % 25 == 0 or done == total:
        print(f"  {what} {done} of {total}", file=sys.stderr)


def only_buckets(files: Mapping[str, str], tokens: Sequence[int]) -> dict[str, str]:
    """``files`` with the buckets of so many tokens, and the binaries that those launch."""
    schedule = json.loads(files["schedule.json"])
    schedule["buckets"] = [b for b in schedule["buckets"] if b["tokens"] in tokens]
    used = {g for b in schedule["buckets"] for g in (*b["steps"], b["sample"])}
    schedule["groups"] = [g if i in used else [] for i, g in enumerate(schedule["groups"])]
    launched = {launch["binary"] for group in schedule["groups"] for launch in group}
    schedule["binaries"] = [b for b in schedule["binaries"] if b["name"] in launched]
    text = json.dumps(schedule, separators=(",", ":"), sort_keys=True) + "\n"
    return {**files, "schedule.json": text}


def write_kernels(
    path: Path,
    target: str,
    files: Mapping[str, str],
    about: Mapping[str, Any],
    compile_: Compile = compiled,
) -> None:
    """A directory that _gpu_run.Rig loads."""
    parsed = codegen.parse_target(target)
    assert isinstance(parsed, GpuTarget)
    binaries = compile_(files, parsed)
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    for name, data in binaries.items():
        (path / name).write_bytes(data)
    (path / "suite.json").write_text(json.dumps(about))


def build_suite(path: Path, target: str, suite: Suite, compile_: Compile = compiled) -> None:
    plan = suite.plan()
    with _pointers() if suite.pointers else nullcontext():
        files = only_buckets(codegen.emit(plan, target), suite.buckets)
    write_kernels(path, target, files, {"plan": plans.dump(plan)}, compile_)


@contextmanager
def _pointers() -> Iterator[None]:
    """Within, no tile is read by descriptors, and no program has several."""
    usual = tiles.gemm
    plain = {"persistent": 0, "flatten": False, "descriptors": False}
    tiles.gemm = lambda *args: replace(usual(*args), **plain)
    try:
        yield
    finally:
        tiles.gemm = usual


def build_checks(
    path: Path,
    target: str,
    dtype: str,
    specs: Sequence[KernelSpec] = (),
    compile_: Compile = compiled,
) -> None:
    """Kernels of the tests, in an arena of ``dtype``: all of them, or ``specs``."""
    from _gpu_checks import Checked

    from tests.codegen import test_kernels

    specs = tuple(specs) or test_kernels.SPECS
    in_place = {s: p for s, p in test_kernels.IN_PLACE.items() if s in specs}
    column = 3 if dtype == "f32" else 0
    kernels = Checked(specs, target, in_place, column, dtype=dtype)
    about = {
        "plan": plans.dump(kernels.plan),
        "in_place": [[specs.index(spec), param] for spec, param in in_place.items()],
        "column": column,
        "dtype": dtype,
        "batches": test_kernels.BATCHES,
    }
    files = only_buckets(kernels.files, CHECKED[dtype])
    write_kernels(path, target, files, about, compile_)


# --- models -----------------------------------------------------------------------------------------


def build_model(path: Path, target: str, fmt: str) -> None:
    """The bundled model for the card, and what it must say."""
    sizes = {"max_step_tokens": MODEL_STEP, "max_step_rows": MODEL_ROWS}
    recipe = Recipe(weights=fmt, targets=[target], **sizes)
    tokenmill.optimize(MODEL, path, recipe=recipe, progress=_progress)
    exact = path.with_name(f"{path.name}-fp32")
    tokenmill.optimize(MODEL, exact, recipe=Recipe(weights="fp32", kv="fp32", **sizes), force=True)
    text = (MODEL / "heldout.txt").read_text("utf-8")
    with Session(exact) as session:
        ids = np.array(session.tokenizer.encode(text), np.int32)[: MODEL_PROMPT + MODEL_DECODED]
        prompt = ids[:MODEL_PROMPT].tolist()
        greedy = session.generate([prompt], max_new_tokens=MODEL_DECODED)[0].tokens
        executor = session._executor
        assert executor is not None
        wanted = np.concatenate([executor.run(b).copy() for b in model_batches(ids)])
    shutil.rmtree(exact)
    meant = _meaning(Artifact.open(path), ids)
    # Beside the artifact, whose files are all in its manifest.
    np.savez(path.with_suffix(".npz"), ids=ids, fp32=wanted, meant=meant, greedy=np.array(greedy))


def _meaning(artifact: Artifact, ids: np.ndarray) -> np.ndarray:
    """What torch makes of the same plan with the same weights."""
    from tests.codegen.harness import DTYPES

    plan = plans.load(artifact.gpu_plan)
    weights = {
        name: torch.from_numpy(tensor.array.copy()).view(DTYPES[tensor.dtype])
        for name, tensor in artifact.weights().items()
    }
    caches = {c.name: cache.allocate(c, -(-len(ids) // cache.PAGE)) for c in plan.caches}
    found = []
    for batch in model_batches(ids):
        given = cache.Batch(*(torch.from_numpy(batch._asdict()[n]) for n in cache.Batch._fields))
        step, rows = torch.from_numpy(batch.ids), torch.from_numpy(batch.rows)
        found.append(reference.run_plan(plan, weights, caches, step, rows, given)[:, : plan.vocab])
    return torch.cat(found).numpy()


def build_end(path: Path, target: str, fmt: str, layers: int) -> None:
    """An artifact of a large model without weights, for END_BUCKETS."""
    plan = lite_plan(fmt, layers)
    files = only_buckets(codegen.emit(plan, target), END_BUCKETS)
    parsed = codegen.parse_target(target)
    assert isinstance(parsed, GpuTarget)
    with ArtifactWriter(path) as writer:
        writer.json("plan.cuda.json", plans.dump(plan))
        writer.json("config.json", lite_config(layers))
        for name, text in files.items():
            writer.text(f"kernels/{target}/{name}", text)
        for name, data in compiled(files, parsed).items():
            writer.bytes(f"kernels/{target}/{name}", data)
        writer.describe(
            targets=[Target(target, f"kernels/{target}")], tokenmill=tokenmill.__version__
        )


def lite_plan(fmt: str, layers: int) -> Plan:
    """The plan of a model whose weights are never made: their memory is asked for and not touched."""
    import transformers
    from tokenmill.capture.huggingface import capture_pretrained

    values = dict(lite_config(layers))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model = model.to_empty(device="cpu")
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    program = capture_pretrained(model, "deepseek-v2-lite")
    run_passes(program, pipeline(Recipe(weights=fmt)))
    return plan_for(program, Capacity(PROMPT, TOGETHER), "cuda")
