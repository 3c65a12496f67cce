"""What was exported, read again and compared with the artifact."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import Progress
from ..capture.checkpoint import Checkpoint, open_checkpoint
from ..capture.packed import Packed
from ..capture.shards import Shards
from ..errors import ExportDiffers
from ..ir import quant
from ..ir.program import Program
from ._hf_tensors import Form, Original, plain_dtype, values

_TOKENS = 32
# What a token's logits may differ by, relative to them.  The artifact rounds its cache, the checkpoint does
# not; some weights are rounded to bf16 for the checkpoint, and all are while transformers loads it.
_BY_CACHE = {"fp32": 1e-3, "bf16": 0.03, "int8": 0.05, "fp8": 0.1}
_BY_ROUNDING = 0.03
_COPIES = 3  # of all weights in fp32 that running a model here may take


def compare(
    stage: Path,
    program: Program,
    tensors: Sequence[Original],
    forms: Mapping[str, Form],
    say: Progress,
) -> dict[str, Any]:
    """Measured errors, for the manifest; raises ExportDiffers.

    Every weight is read back and must be what the artifact holds.  A model that fits into memory is run,
    with weights as this compiler reads them and as transformers does, and its logits are compared with those
    of the artifact's program.
    """
    checkpoint = open_checkpoint(stage)
    _compare_weights(checkpoint, program, tensors, forms, say)
    exact = not any(f.reason for f in forms.values())
    found = {"weights": "every tensor read back equal to the artifact's"}
    return found | logits(checkpoint, program, exact, say)


def logits(checkpoint: Checkpoint, program: Program, exact: bool, say: Progress) -> dict[str, Any]:
    """The errors of a checkpoint's logits as this compiler and as transformers reads it.

    With ``exact`` no weight was rounded for it.  Raises ExportDiffers if an error is more than rounding.
    """
    found: dict[str, Any] = {}
    needed = _COPIES * 4 * program.parameters
    if (free := _free_memory()) < needed:
        found["logits"] = (
            f"not compared: that takes {needed:,} bytes of memory, and {free:,} are free"
        )
        return found
    say("logits", 0, 2)
    ids = torch.randint(0, program.vocab, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    expected = program.run(ids[: program.positions])
    limit = max(_BY_CACHE[spec.format] for spec in program.caches)
    with torch.no_grad():
        again = checkpoint.load()(ids[None], use_cache=False).logits[0]
    rounded = max(limit, _BY_ROUNDING)
    ours = limit if exact else rounded
    found["tokenmill"] = _judge(program.name, "tokenmill", expected, again, ours)
    say("logits", 1, 2)
    found["transformers"] = _by_transformers(checkpoint, program, ids, expected, rounded)
    say("logits", 2, 2)
    return found


def _compare_weights(
    checkpoint: Checkpoint,
    program: Program,
    tensors: Sequence[Original],
    forms: Mapping[str, Form],
    say: Progress,
) -> None:
    reader: Any = Shards(checkpoint.shards)
    if how := checkpoint.config.get("quantization_config"):
        reader = Packed(reader, how, str(checkpoint.path / "config.json"))
    for number, tensor in enumerate(tensors):
        wanted = values(tensor, program.weights)
        chosen = forms[tensor.name]
        if quant.parse(chosen.format).bits >= 16:
            wanted = wanted.to(plain_dtype(tensor, chosen)).float()
        if not torch.equal(reader.read(tensor.name).float(), wanted):
            raise ExportDiffers(
                path=program.name, reason=f"{tensor.name} reads back as other numbers"
            )
        say("comparing", number + 1, len(tensors))


def _by_transformers(
    checkpoint: Checkpoint, program: Program, ids: Tensor, expected: Tensor, limit: float
) -> dict[str, Any] | str:
    """The errors of the library's own loader, or why there are none."""
    how = checkpoint.config.get("quantization_config", {}).get("quant_method")
    package = {"compressed-tensors": "compressed_tensors", "fp8": "accelerate"}.get(how)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"not loaded: the package {package.replace('_', '-')} is not installed"
    import transformers

    # On a CPU it makes bf16 of FP8, whatever it is told.
    dtype = torch.bfloat16 if how == "fp8" else torch.float32
    try:
        model, info = _class(transformers, checkpoint).from_pretrained(
            checkpoint.path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            return f"cannot load it: it finds no {missing[0]}"
        with torch.no_grad():
            if how == "fp8":
                model = model.float()  # what is not FP8 stays as it is stored
            logits = model.eval()(ids[None], use_cache=False).logits[0].float()
    except Exception as error:
        return f"cannot load it: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return _judge(program.name, "transformers", expected, logits, limit)


def _class(transformers: Any, checkpoint: Checkpoint) -> Any:
    """The class that config.json names, which not all are that have latent attention is looked up under."""
    name = str(next(iter(checkpoint.config.get("architectures", ())), ""))
    return getattr(transformers, name, transformers.AutoModelForCausalLM)


def _judge(
    path: str, reader: str, expected: Tensor, actual: Tensor, limit: float
) -> dict[str, float]:
    """Relative errors of logits, token by token; raises ExportDiffers.

    The middle one is judged: where a router's choice hangs in the balance single tokens may differ by more.
    """
    each = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    middle, largest = float(each.median()), float(each.max())
    if not middle <= limit:
        reason = f"read by {reader}, its logits differ by {middle:.3g}, and {limit:.3g} would be rounding"
        raise ExportDiffers(path=path, reason=reason)
    same = float((actual.argmax(-1) == expected.argmax(-1)).float().mean())
    return {
        "error_median": middle, "error_max": largest, "tolerance": limit, "top1_agreement": same,
    }  # fmt: skip


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
