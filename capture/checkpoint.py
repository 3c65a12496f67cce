"""Open a model that a user names: check it first, then load it the usual way.

Checks come before loading, because what the loaders of other libraries do with half a checkpoint ranges
from silence to a stack trace.  Weights are read from safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import (
    BadWeight,
    DownloadFailed,
    MissingExtra,
    ModelNotFound,
    NeedsRemoteCode,
    NotAModel,
    TokenmillError,
    WeightsDamaged,
    WeightsMismatch,
    WeightsMissing,
)
from .packed import Packed
from .shards import DTYPES, Shards, Source, header
from .streaming import Tensors, absent, fake, fill, skeleton, sources

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
# Decoders of the library that it does not look up as such, by their type.
_UNLISTED = {"mistral4": "Mistral4"}
CONFIG_FILES = ("config.json", "generation_config.json")
_INDEX, _SINGLE, _SUMS = "model.safetensors.index.json", "model.safetensors", "SHA256SUMS"
_PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed the checks; with ``config_only`` nobody looked for weights."""

    path: Path
    name: str
    config: dict[str, Any]
    shards: tuple[Path, ...]
    trust_remote_code: bool = False
    config_only: bool = False

    def bytes_of(self, parameters: int) -> int:
        """The size of the weight files; if they are not there, of the parameters in the config's dtype."""
        if self.config_only:
            return parameters * self._dtype.itemsize
        return sum(s.stat().st_size for s in self.shards)

    @property
    def _dtype(self) -> torch.dtype:
        said = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        found = getattr(torch, said.removeprefix("torch."), None)
        return found if isinstance(found, torch.dtype) else torch.float32

    @property
    def tokenizer_files(self) -> list[Path]:
        return [f for n in TOKENIZER_FILES if (f := self.path / n).is_file()]

    @property
    def config_files(self) -> list[Path]:
        return [f for n in CONFIG_FILES if (f := self.path / n).is_file()]

    def load(self, dtype: Literal["float32", "bfloat16"] = "float32") -> Any:
        """The transformers model in ``dtype``, in eval mode, every parameter from the checkpoint.

        Raises BadWeight for NaN or Inf, WeightsMissing or WeightsMismatch if the weights are not those
        of the config.
        """
        if "quantization_config" in self.config:
            return self._unpacked().to(getattr(torch, dtype))
        transformers = _quiet()
        self.check_values()
        with _loading(self.path):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, trust_remote_code=self.trust_remote_code,
                output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True,
            )  # fmt: skip
        _check_loaded(self.path, info)
        return model.eval()

    def stream(self) -> Streamed:
        """The model in fp32 for tracing, and where its weights are read; errors as in :meth:`load`.

        A checkpoint of which that cannot be told is loaded as a whole.
        """
        if self.config_only:
            return self._shapes()
        try:
            model, found = self._open()
        except TokenmillError:
            raise
        except Exception as error:  # NotStreamable, or whatever the library's insides raise
            if "quantization_config" in self.config:
                raise _refused(self.path, error) from error
            return Streamed(self.load(), note=f"loaded as a whole: {_first_line(error)}")
        fake(model)
        return Streamed(model, found)

    def _shapes(self) -> Streamed:
        """The model without numbers."""
        _quiet()
        with _loading(self.path):
            config = self._library_config()
            config.quantization_config = None
            model = skeleton(config, self.trust_remote_code)
            found = absent(model)
        fake(model)
        dtype = str(self._dtype).removeprefix("torch.")
        return Streamed(model, found, f"no weights: their size before is that in {dtype}")

    def _library_config(self) -> Any:
        return _transformers().AutoConfig.from_pretrained(
            self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
        )

    def _unpacked(self) -> Any:
        """The model with the numbers that the quantized weights stand for."""
        with _loading(self.path):
            model, found = self._open()
        fill(model, found)
        return model

    def _open(self) -> tuple[Any, dict[str, Source]]:
        _quiet()
        config = self._library_config()
        tensors: Tensors = Shards(self.shards)
        if packed := self.config.get("quantization_config"):
            tensors = Packed(Shards(self.shards), packed, str(self.path / "config.json"))
            config.quantization_config = None
        self.check_values()
        model = skeleton(config, self.trust_remote_code)
        found, report = sources(model, tensors)
        _check_loaded(self.path, vars(report))
        return model, found

    def check_values(self) -> None:
        """Raise BadWeight under the name that a tensor has in its file; loading may fuse it with others."""
        shards = Shards(self.shards)
        for name in shards:
            if count := shards.invalid(name):
                raise BadWeight(name=name, count=count)


@dataclass(frozen=True)
class Streamed:
    """A model whose weights are not there but in ``sources``, by their names in its state dict.

    If ``note`` says why that was not possible, they are there, and ``sources`` is empty.
    """

    model: Any
    sources: Mapping[str, Source] = field(default_factory=dict)
    note: str = ""


def open_checkpoint(
    model: str | Path, trust_remote_code: bool = False, config_only: bool = False
) -> Checkpoint:
    """The checkpoint at a directory, or under a hub id (downloaded the usual way).

    With ``config_only`` a directory's config.json is all that is looked at, or that file itself.  Raises
    ModelNotFound, NotAModel, NeedsRemoteCode, WeightsMissing or WeightsDamaged.
    """
    path = Path(model)
    if config_only and path.name == "config.json" and path.is_file():
        path = path.parent
    if not path.exists():
        if config_only:
            raise ModelNotFound(path=str(model))
        path = _download(str(model))
    config = _config(path)
    if config["model_type"] in _UNLISTED:
        _list(_UNLISTED[config["model_type"]])
    if "auto_map" in config and not trust_remote_code and not _known(config):
        raise NeedsRemoteCode(path=str(model), reason="config.json: auto_map")
    if config_only:
        return Checkpoint(path, path.resolve().name, config, (), trust_remote_code, True)
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


def _list(kind: str) -> None:
    """Let AutoModelForCausalLM find a class of the library."""
    library = _transformers()
    classes = [getattr(library, f"{kind}{suffix}", None) for suffix in ("Config", "ForCausalLM")]
    if all(classes):
        library.AutoModelForCausalLM.register(*classes, exist_ok=True)


def _known(config: dict[str, Any]) -> bool:
    """Whether the library has its own code for this type of model."""
    _transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config["model_type"] in CONFIG_MAPPING_NAMES


# --- files ------------------------------------------------------------------------------------------


def _shards(path: Path) -> Iterator[Path]:
    index = path / _INDEX
    if index.is_file():
        names = _listed(index)
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


def _listed(index: Path) -> list[str]:
    """The shards that an index names."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if all(isinstance(name, str) for name in names):
            return sorted(set(names))
    except (ValueError, KeyError, TypeError, AttributeError):  # said below
        pass
    raise WeightsDamaged(file=str(index), reason="not an index of shards")


def check_safetensors(file: Path) -> None:
    """Raise WeightsDamaged unless header and size of a safetensors file agree."""

    def damaged(reason: str) -> WeightsDamaged:
        return WeightsDamaged(file=str(file), reason=reason)

    size = file.stat().st_size
    try:
        entries, start = header(file)
        spans = [_span(name, entry) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"the header is damaged ({error})") from error
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise damaged("the header is damaged (tensors overlap or leave gaps)")
        end = stop
    if start + end != size:
        raise damaged(f"{size} bytes where the header describes {start + end}")


def _span(name: str, tensor: dict[str, Any]) -> tuple[int, int]:
    begin, end = (int(o) for o in tensor["data_offsets"])
    if end - begin != math.prod(tensor["shape"]) * DTYPES[tensor["dtype"]].itemsize:
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


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Turn what the library raises, of whatever type, into NotAModel."""
    try:
        yield
    except TokenmillError:
        raise
    except Exception as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> NotAModel:
    return NotAModel(path=str(path), reason=f"transformers cannot load it ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    """The first line that says something; of a bare key, also what went wrong with it."""
    lines = [line for part in str(error).splitlines() if (line := part.strip())]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])[:200]
    return text if " " in text else f"{type(error).__name__} {text}".strip()


def _quiet() -> Any:
    transformers = _transformers()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(
            package="transformers", purpose="Hugging Face checkpoints", extra="hf"
        ) from error
    return transformers
