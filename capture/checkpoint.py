"""Open a model that a user names: check it first, then load it the usual way.

Checks come before loading, because what the loaders of other libraries do with half a checkpoint ranges
from silence to a stack trace.  Weights are read from safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from ..errors import (
    BadWeight,
    DownloadFailed,
    MissingExtra,
    ModelNotFound,
    NeedsRemoteCode,
    NotAModel,
    Unsupported,
    WeightsDamaged,
    WeightsMismatch,
    WeightsMissing,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_INDEX, _SINGLE, _SUMS = "model.safetensors.index.json", "model.safetensors", "SHA256SUMS"
_PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed the checks; ``bytes`` is the size of its weight files."""

    path: Path
    name: str
    config: dict[str, Any]
    shards: tuple[Path, ...]
    trust_remote_code: bool = False

    @property
    def bytes(self) -> int:
        return sum(s.stat().st_size for s in self.shards)

    @property
    def tokenizer_files(self) -> list[Path]:
        return [f for n in TOKENIZER_FILES if (f := self.path / n).is_file()]

    def load(self, dtype: Literal["float32", "bfloat16"] = "float32") -> Any:
        """The transformers model in ``dtype``, in eval mode, every parameter from the checkpoint.

        Raises BadWeight for NaN or Inf, WeightsMissing or WeightsMismatch if the weights are not those
        of the config.
        """
        transformers = _transformers()
        for shard in self.shards:
            _check_values(shard)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, trust_remote_code=self.trust_remote_code,
                output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True,
            )  # fmt: skip
        except (ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
            raise _refused(self.path, error) from error
        _check_loaded(self.path, info)
        return model.eval()


def open_checkpoint(model: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint at a directory, or under a hub id (downloaded the usual way).

    Raises ModelNotFound, NotAModel, NeedsRemoteCode, WeightsMissing or WeightsDamaged.
    """
    path = Path(model)
    if not path.exists():
        path = _download(str(model))
    config = _config(path)
    if "auto_map" in config and not trust_remote_code and not _known(config):
        raise NeedsRemoteCode(path=str(model), reason="config.json: auto_map")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise Unsupported(
            reason=f"the checkpoint is already quantized ({method})",
            where=str(path / "config.json"), advice="use the bf16 or fp32 checkpoint of this model",
        )  # fmt: skip
    shards = tuple(_shards(path))
    for shard in shards:
        check_safetensors(shard)
    _check_sums(path, shards)
    return Checkpoint(path, path.resolve().name, config, shards, trust_remote_code)


def _download(name: str) -> Path:
    """A snapshot of a hub repository; the path of the local copy."""
    parts = name.split("/")
    if len(parts) > 2 or name.startswith((".", "/", "~")) or not all(parts):
        raise ModelNotFound(path=name)
    _transformers()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadFailed(path=name, reason=_first_line(error)) from error


def _config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise NotAModel(path=str(path), reason="it is a file")
    if (path / "manifest.json").is_file() and (path / "plan.json").is_file():
        raise NotAModel(path=str(path), reason="it is a tokenmill artifact, compiled already")
    file = path / "config.json"
    if not file.is_file():
        empty = not any(path.iterdir())
        raise NotAModel(
            path=str(path), reason="it is empty" if empty else "there is no config.json"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NotAModel(path=str(path), reason=f"config.json is not JSON ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise NotAModel(path=str(path), reason="config.json names no model_type")
    return config


def _known(config: dict[str, Any]) -> bool:
    """Whether the library has its own code for this type of model."""
    _transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config["model_type"] in CONFIG_MAPPING_NAMES


# --- files ------------------------------------------------------------------------------------------


def _shards(path: Path) -> Iterator[Path]:
    index = path / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise WeightsDamaged(file=str(index), reason="not an index of shards") from error
    elif (path / _SINGLE).is_file():
        names = [_SINGLE]
    else:
        pickled = sorted(f.name for pattern in _PICKLED for f in path.glob(pattern))
        reason = "no *.safetensors file"
        if pickled:
            reason = (
                f"only pickled weights ({pickled[0]}), which tokenmill never opens: convert them"
            )
        raise WeightsMissing(path=str(path), reason=reason)
    for name in names:
        if Path(name).name != name:
            raise WeightsDamaged(
                file=str(index), reason=f"shard {name!r} lies outside the directory"
            )
        if not (path / name).is_file():
            raise WeightsMissing(path=str(path), reason=f"{name} is not there")
        yield path / name


_WIDTH = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8,
}  # fmt: skip


def check_safetensors(file: Path) -> None:
    """Raise WeightsDamaged unless header and size of a safetensors file agree."""

    def damaged(reason: str) -> WeightsDamaged:
        return WeightsDamaged(file=str(file), reason=reason)

    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise damaged("the file ends inside its header")
        try:
            header = json.loads(stream.read(length))
            spans = [_span(name, t) for name, t in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(f"the header is damaged ({error})") from error
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise damaged("the header is damaged (tensors overlap or leave gaps)")
        end = stop
    if 8 + length + end != size:
        raise damaged(f"{size} bytes where the header describes {8 + length + end}")


def _span(name: str, tensor: dict[str, Any]) -> tuple[int, int]:
    begin, end = (int(o) for o in tensor["data_offsets"])
    if end - begin != math.prod(tensor["shape"]) * _WIDTH[tensor["dtype"]]:
        raise ValueError(f"tensor {name!r} has {end - begin} bytes")
    return begin, end


def _check_sums(path: Path, shards: tuple[Path, ...]) -> None:
    """Compare with the digests that came along: a SHA256SUMS file, or the hub's own names.

    Without either, a flipped bit in the data cannot be told from a trained one.
    """
    listed = {}
    if (path / _SUMS).is_file():
        lines = (path / _SUMS).read_text().split("\n")
        listed = {line[66:].strip(): line[:64] for line in lines if len(line) > 66}
    for shard in shards:
        blob = shard.resolve().name  # in the hub's cache, a link to a file named by its digest
        wanted = listed.get(shard.name) or (blob if len(blob) == 64 else None)
        if wanted is None:
            continue
        with shard.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != wanted:
                raise WeightsDamaged(file=str(shard), reason="its SHA-256 is not the published one")


def _check_values(shard: Path) -> None:
    """Raise BadWeight under the name that the tensor has in its file; loading may fuse it with others."""
    with safe_open(shard, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (not a mapping)
            value = tensors.get_tensor(name)
            if value.is_floating_point() and not (finite := torch.isfinite(value.float())).all():
                raise BadWeight(name=name, count=int((~finite).sum()))


# --- after loading ----------------------------------------------------------------------------------


def _check_loaded(path: Path, info: dict[str, Any]) -> None:
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise WeightsMismatch(
            name=name, reason=f"its shape is {tuple(found)}, the config says {tuple(expected)}"
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsMissing(path=str(path), reason=f"no tensor {missing[0]!r}{more} in the files")
    if extra := sorted(k for k in info["unexpected_keys"] if not k.endswith("inv_freq")):
        raise WeightsMismatch(name=extra[0], reason="the config has no place for it")


def _refused(path: Path, error: Exception) -> NotAModel:
    return NotAModel(path=str(path), reason=f"transformers cannot load it ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(
            package="transformers", purpose="Hugging Face checkpoints", extra="hf"
        ) from error
    return transformers
