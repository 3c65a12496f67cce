"""A checkpoint in the layout of Hugging Face, made of an artifact.

The matrices keep their formats where the ecosystem has them: INT4 in groups and INT8 by rows as
``pack-quantized`` of compressed-tensors, FP8 in blocks of 128x128, the rest in 16 and 32 bits.  Integers and
scales are those of the artifact, bit for bit.  Names are those of the checkpoint that the artifact came from.

Nothing is done before it is read again and compared; ``export.json`` says what was found.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..api import Progress, open_program
from ..errors import ArtifactTooOld, Unsupported
from ..ir.program import Program
from ..runtime import Artifact
from ..runtime.manifest import MANIFEST as ARTIFACT_MANIFEST
from ..runtime.tensors import write_tensors
from . import _hf_check as check
from . import _hf_config as configs
from ._hf_latent import LatentPlan, is_converted
from ._hf_tensors import Form, Original, Writable, form, originals, writables
from .output import seal, staged, write_json
from .parameters import FILE

SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_NAMED = 8  # tensors in a list of the manifest


def export(
    artifact: Path,
    output: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    max_shard_size: int = SHARD_BYTES,
    int8_inputs: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint ``output``; returns its manifest, which is in ``export.json`` too.

    With ``int8_inputs`` engines are told to round the inputs of INT8 matrices to INT8, one scale a token: all
    CPUs and older GPUs multiply that fast, and some engines only that.  Routed experts are left out, which
    transformers would not load so.

    A file of weights holds at most ``max_shard_size`` bytes, unless one tensor is larger; weights are read
    and written one at a time.  Raises Unsupported for an artifact with no counterpart among checkpoints,
    ExportDiffers if what was written does not compute what the artifact does; then nothing is left behind.
    """
    opened = Artifact.open(artifact)
    record, config = _source(opened)
    program = open_program(artifact, verify=False)
    program.weights.memo_bytes = 1 << 28
    about = {
        "name": program.name,
        "digest": json.loads((opened.path / ARTIFACT_MANIFEST).read_bytes())["digest"],
        "recipe": dict(opened.manifest.recipe),
    }
    plan = plan_of(program, record, config, int8_inputs)
    with staged(Path(output), force) as stage:
        _copy_companions(opened, stage)
        facts = write(stage, plan, max_shard_size, progress or (lambda what, done, total: None))
        return seal(stage, {"tokenmill": __version__, "format": "hf", "artifact": about, **facts})


def plan_of(
    program: Program,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    int8_inputs: bool = False,
) -> Plan | LatentPlan:
    """The plan for a program; one whose attention was made latent becomes a model of another class."""
    if is_converted(program, config):
        return LatentPlan(program, record, config)
    return Plan(program, record, config, int8_inputs)


def write(
    stage: Path, plan: Plan | LatentPlan, max_shard_size: int, say: Progress
) -> dict[str, Any]:
    """Write config.json and weights into a directory, and read them again; returns facts for the manifest."""
    write_json(stage / "config.json", plan.config)
    _write_weights(stage, plan, max_shard_size, say)
    measured = plan.compare(stage, say)
    return {
        "convention": plan.convention if "quantization_config" in plan.config else "plain",
        "formats": plan.formats(),
        "otherwise": plan.otherwise(),
        "notes": plan.notes(),
        "checks": measured,
        "versions": _versions(),
    }


def _source(artifact: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the artifact says of its checkpoint, and the checkpoint's config.json."""
    record, config = artifact.json(FILE), artifact.json("source/config.json")
    if record and config:
        return record, config
    if artifact.file("program.json") is None:
        raise ArtifactTooOld(
            path=str(artifact.path), built_by=artifact.manifest.tokenmill,
            missing="where their weights come from",
        )  # fmt: skip
    raise Unsupported(
        reason="the model came as a module, or was loaded as a whole: its parameters have no names in files",
        where=str(artifact.path),
        advice="compile a checkpoint directory, or export --format onnx",
    )


class Plan:
    """Every tensor of the checkpoint with its form, and config.json.

    ``record`` is what :func:`.parameters.describe` gives, ``config`` the config.json of the original.  Raises
    Unsupported if the program does not hold all of its parameters.
    """

    def __init__(
        self,
        program: Program,
        record: Mapping[str, Any],
        config: Mapping[str, Any],
        int8_inputs: bool = False,
    ) -> None:
        self.program = program
        self.tensors, self.untied = originals(record)
        _refuse_computed(record, self.tensors)
        self.forms = {t.name: form(t, program.weights) for t in self.tensors}
        linear = [t for t in self.tensors if t.is_matrix and not _has_role(t, "embedding", "norm")]
        experts = [t for t in linear if _has_role(t, "expert")]
        self.forms |= _together(experts, self.forms)
        self.experts = [t.module for t in experts]
        self.modules = {t.module: self.forms[t.name].format for t in linear}
        if int8_inputs:
            self.modules |= {
                m: configs.W8A8
                for m, f in self.modules.items()
                if f == "int8" and m not in set(self.experts)
            }
        kinds = {self.modules[e] for e in self.experts}
        self.convention = configs.convention(self.modules.values(), kinds)
        self.config = self._config(config)

    def _config(self, original: Mapping[str, Any]) -> dict[str, Any]:
        """config.json, with the formats of this checkpoint in place of those of the other."""
        made = configs.for_engines(original)
        made.pop("quantization_config", None)
        if self.untied:
            made["tie_word_embeddings"] = False
        how = configs.quantization_config(self.convention, self.modules, self.experts)
        return made | ({"quantization_config": how} if how else {})

    def writables(self) -> Iterator[Writable]:
        scale = configs.scale_name(self.convention)
        for tensor in self.tensors:
            packed = self.modules.get(tensor.module) != configs.W8A8
            chosen = self.forms[tensor.name]
            yield from writables(tensor, chosen, self.program.weights, scale, packed)

    def compare(self, stage: Path, say: Progress) -> dict[str, Any]:
        """Measured errors, for the manifest; raises ExportDiffers, see :func:`._hf_check.compare`."""
        return check.compare(stage, self.program, self.tensors, self.forms, say)

    def formats(self) -> dict[str, Any]:
        """Tensors, parameters and bytes by format."""
        count: Counter[str] = Counter()
        parameters: Counter[str] = Counter()
        for tensor in self.tensors:
            format = self.forms[tensor.name].format
            count[format] += 1
            parameters[format] += torch.Size(tensor.shape).numel()
        return {f: {"tensors": n, "parameters": parameters[f]} for f, n in sorted(count.items())}

    def otherwise(self) -> list[dict[str, Any]]:
        """What is not in the artifact's format, and why."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for tensor in self.tensors:
            chosen = self.forms[tensor.name]
            if chosen.reason:
                was = ", ".join(sorted({h.use.format for h in tensor.holders}))
                found.setdefault((was, chosen.format, chosen.reason), []).append(tensor.name)
        return [
            {"artifact": was, "checkpoint": now, "reason": why, "tensors": len(names),
             "names": names[:_NAMED]}
            for (was, now, why), names in found.items()
        ]  # fmt: skip

    def notes(self) -> list[str]:
        """What a person should know before loading it."""
        notes = [f"{name} is tied no more: as a head it has another format" for name in self.untied]
        if len({self.modules[e] for e in self.experts}) > 1:
            notes.append(
                "routed experts are in several formats: vLLM wants one within a layer, transformers "
                "one for all of them"
            )
        if "fp8" in self.modules.values():
            notes.append("engines round the inputs of FP8 matrices to FP8; the artifact does not")
        if configs.W8A8 in self.modules.values():
            notes.append("engines round the inputs of INT8 matrices to INT8, one scale a token")
        return notes


def _refuse_computed(record: Mapping[str, Any], tensors: Sequence[Original]) -> None:
    """Raise Unsupported for a parameter that no stored weight holds."""
    missing = next((t.name for t in tensors if not t.holders), None)
    if missing is None:
        return
    how = next(
        (f": {w} is computed from it" for w, r in record["computed"].items() if missing in r), ""
    )
    raise Unsupported(
        reason=f"the artifact does not hold the numbers of {missing}{how}",
        where=missing,
        advice="export --format onnx keeps the graph as it is",
    )


def _together(experts: Sequence[Original], forms: Mapping[str, Form]) -> dict[str, Form]:
    """Forms for the experts of blocks in which one cannot be quantized: loaders want all or none."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for tensor in experts:
        blocks[tensor.module.rsplit(".", 2)[0]].append(tensor.name)
    found: dict[str, Form] = {}
    for names in blocks.values():
        plain = [forms[n] for n in names if forms[n].reason]
        if plain:
            why = "other experts of its block cannot be quantized"
            found |= {n: Form(plain[0].format, forms[n].reason or why) for n in names}
    return found


def _has_role(tensor: Original, *roles: str) -> bool:
    return any(h.use.role in roles for h in tensor.holders)


# --- writing ----------------------------------------------------------------------------------------


def _copy_companions(artifact: Artifact, stage: Path) -> None:
    for name in artifact.manifest.files:
        folder, _, file = name.partition("/")
        if folder == "tokenizer" or name == "source/generation_config.json":
            shutil.copyfile(artifact.path / name, stage / file)


def _write_weights(stage: Path, plan: Plan | LatentPlan, shard_bytes: int, say: Progress) -> None:
    found = {w.spec.name: w for w in plan.writables()}

    def data() -> Iterator[tuple[str, Any]]:
        for i, (name, writable) in enumerate(found.items()):
            yield name, _bytes(writable.data(), writable)
            say("weights", i + 1, len(found))

    files = write_tensors(stage, [w.spec for w in found.values()], data(), shard_bytes, _shard_name)
    if len(set(files.values())) > 1:
        total = sum(w.spec.nbytes for w in found.values())
        write_json(
            stage / _INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))},
        )


def _shard_name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _bytes(tensor: Tensor, writable: Writable) -> Any:
    assert tuple(tensor.shape) == writable.spec.shape, writable.spec.name
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in ("torch", "transformers", "compressed-tensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
