"""The artifact: a directory that holds a compiled model, and nothing that needs a compiler.

    manifest.json           format version, targets, recipe, report, SHA-256 of every file
    plan.json               the steps and buffers (ir.plan.dump) on a CPU
    plan.cuda.json          the same on a GPU
    program.json            the graph that the plans were made from (ir.serialize.dump), for exports
    weights/*.safetensors   memory-mapped when it runs
    kernels/<target>/       readable sources, and step.so or cubins
    tokenizer/              tokenizer.json and its configs, where the model had them
    source/                 config.json of the checkpoint, where there was one, and which of its tensors
                            each weight holds (export.parameters)
    report.html

It is written beside its place and renamed into it, so it is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import errors
from .manifest import (
    MANIFEST,
    FileFact,
    Manifest,
    Target,
    canonical,
    check_inside,
    parse_object,
)
from .tensors import Bytes, Data, Tensor, TensorSpec, map_tensors, write_tensors

__all__ = ["Artifact", "ArtifactWriter", "Target", "TensorSpec", "check_output"]

PLANS = {"cpu": "plan.json", "cuda": "plan.cuda.json"}
PROGRAM = "program.json"
# Opening hashes the files, one at a time to a core: enough shards to share out, none of them tiny.
SHARDS, SHARD_BYTES_MIN, SHARD_BYTES_MAX = 16, 1 << 25, 1 << 30
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Artifact:
    """An artifact on disk, opened for reading with :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @staticmethod
    def open(path: str | os.PathLike[str], verify: bool = True) -> Artifact:
        """Open the artifact at ``path``; ``verify`` compares the SHA-256 of every file.

        Raises NotAnArtifact, ArtifactTooNew, or ArtifactDamaged naming the file.
        """
        root = Path(path)
        if not root.is_dir():
            raise errors.NotAnArtifact(path=str(path), reason="there is no such directory")
        file = root / MANIFEST
        if not file.is_file():
            raise errors.NotAnArtifact(path=str(path), reason=f"it has no {MANIFEST}")
        artifact = Artifact(root, Manifest.parse(file.read_bytes(), str(file)))
        artifact._check(verify)
        return artifact

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.manifest.targets

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The plan for a CPU, as ir.plan.dump wrote it; empty if the artifact has none."""
        return self.json(PLANS["cpu"])

    @cached_property
    def gpu_plan(self) -> dict[str, Any]:
        """The plan for a GPU; empty if the artifact has none."""
        return self.json(PLANS["cuda"])

    def file(self, name: str) -> Path | None:
        """The path of a file that the manifest vouches for, or None if the artifact has none."""
        return self.path / name if name in self.manifest.files else None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the artifact; empty if there is no such file."""
        file = self.file(name)
        return parse_object(file.read_bytes(), str(file)) if file else {}

    def weights(self) -> dict[str, Tensor]:
        """All weights by name, memory-mapped and read-only."""
        shards = [name for name in self.manifest.files if name.startswith("weights/")]
        tensors: dict[str, Tensor] = {}
        for name in sorted(shards):
            tensors |= map_tensors(self.path / name)
        return tensors

    def _check(self, verify: bool) -> None:
        for plan in {PLANS[target.device] for target in self.targets} or {PLANS["cpu"]}:
            if plan not in self.manifest.files:
                reason = f"no {plan} in it"
                raise errors.ArtifactDamaged(file=str(self.path / MANIFEST), reason=reason)
        root = self.path.resolve()
        for name, fact in self.manifest.files.items():
            self._check_file(root, name, fact)
        if not verify:
            return
        digests = _sha256(self.path, self.manifest.files)
        for name, fact in self.manifest.files.items():
            if digests[name] != fact.sha256:
                reason = "its contents changed since the artifact was written"
                raise errors.ArtifactDamaged(file=str(self.path / name), reason=reason)

    def _check_file(self, root: Path, name: str, fact: FileFact) -> None:
        file = self.path / name
        if not file.resolve().is_relative_to(root):
            reason = "it leads outside the artifact"
        elif not file.is_file():
            reason = "it is missing"
        elif (size := file.stat().st_size) != fact.bytes:
            reason = f"it has {size} bytes instead of {fact.bytes}"
        else:
            return
        raise errors.ArtifactDamaged(file=str(file), reason=reason)


class ArtifactWriter:
    """Writes an artifact, all of it or nothing.  A context manager; leaving it cleanly commits.

    >>> with ArtifactWriter("model.tm") as writer:            # doctest: +SKIP
    ...     writer.json("plan.json", plan)
    ...     writer.weights(index, data)
    ...     writer.text("kernels/cpu-x86-64-v3/step.cpp", source)
    ...     writer.describe(targets=[Target("cpu", "kernels/cpu-x86-64-v3", ("avx2",))])

    Files appear in a hidden directory beside ``path``; :meth:`path` gives the way there to tools
    that write for themselves.  An exception, Ctrl-C included, removes it; what a killed run left is
    removed by the next one for the same ``path``.  Raises OutputExists and OutputForeign on
    entering, OutputFailed when the disk does.  One writer per path and process at a time.
    """

    def __init__(self, path: str | os.PathLike[str], force: bool = False) -> None:
        self._target = Path(path).resolve()
        self._force = force
        self._siblings = _Siblings(self._target)
        self._about: dict[str, Any] | None = None

    def __enter__(self) -> ArtifactWriter:
        with self._reporting():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._siblings.clean()
            check_output(self._target, self._force)
            self._siblings.stage.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._siblings.clean()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise self._failed(error) from error

    def path(self, name: str) -> Path:
        """Where to write the file ``name`` (relative to the artifact); its directory exists."""
        file = self._siblings.stage / check_inside(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def bytes(self, name: str, data: Bytes) -> None:
        with self._reporting():
            self.path(name).write_bytes(data)

    def text(self, name: str, text: str) -> None:
        self.bytes(name, text.encode())

    def json(self, name: str, value: Any) -> None:
        """Canonical JSON; raises ValueError for NaN and infinities."""
        self.bytes(name, canonical(value))

    def copy(self, name: str, source: Path) -> None:
        with self._reporting():
            shutil.copyfile(source, self.path(name))

    def weights(
        self,
        index: Iterable[TensorSpec],
        data: Iterable[tuple[str, Data]],
        shard_bytes: int | None = None,
    ) -> None:
        """Stream tensors into ``weights/``: the index first, then the data by name in any order.

        Data is an array or a buffer of the tensor's bytes (bf16 and e4m3 as raw bits).  A file holds
        at most ``shard_bytes``, unless one tensor alone is larger.  Raises ValueError if data and
        index disagree.
        """
        index = list(index)
        if shard_bytes is None:
            share = sum(spec.nbytes for spec in index) // SHARDS
            shard_bytes = min(max(share, SHARD_BYTES_MIN), SHARD_BYTES_MAX)
        with self._reporting():
            folder = self._siblings.stage / "weights"
            folder.mkdir(exist_ok=True)
            write_tensors(folder, index, data, shard_bytes)

    def describe(
        self,
        *,
        targets: Sequence[Target],
        tokenmill: str = "",
        toolchain: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        """What the manifest says besides the files.  Must be called before leaving."""
        self._about = {
            "targets": tuple(targets),
            "tokenmill": tokenmill,
            "toolchain": toolchain or {},
            "recipe": recipe or {},
            "report": report or {},
        }

    def _commit(self) -> None:
        if self._about is None:
            raise ValueError("describe() was not called")
        with self._reporting():
            stage = self._siblings.stage
            names = sorted(f.relative_to(stage).as_posix() for f in _files(stage))
            digests = _sha256(stage, names)
            files = {n: FileFact((stage / n).stat().st_size, digests[n]) for n in names}
            (stage / MANIFEST).write_bytes(Manifest(files=files, **self._about).render())
            for file in (*_files(stage), *_folders(stage)):
                _sync(file)
            check_output(self._target, self._force)
            self._siblings.swap()
            _sync(self._target.parent)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> errors.OutputFailed:
        return errors.OutputFailed(path=str(self._target), reason=error.strerror or str(error))


def check_output(path: str | os.PathLike[str], force: bool) -> None:
    """Raise OutputExists, OutputForeign or OutputFailed if an artifact may not, or cannot, be written there.

    Without ``force`` nothing may be at ``path``; with it an artifact or an empty directory is replaced.
    """
    target = Path(path)
    if not os.path.lexists(target):
        parent = next(p for p in target.absolute().parents if os.path.lexists(p))
        if not parent.is_dir():
            raise errors.OutputFailed(path=str(path), reason=f"{parent} is not a directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise errors.OutputFailed(path=str(path), reason=f"no permission to write in {parent}")
        return
    if not force:
        raise errors.OutputExists(path=str(path))
    if not target.is_dir() or (any(target.iterdir()) and not _looks_like_artifact(target)):
        raise errors.OutputForeign(path=str(path), kind="a tokenmill artifact")


def _looks_like_artifact(path: Path) -> bool:
    manifest = path / MANIFEST
    return manifest.is_file() and b'"format_version"' in manifest.read_bytes()


class _Siblings:
    """The directories beside ``target`` that exist while it is written.

    ``stage`` becomes the artifact; ``old`` is the one that it replaces, between two renames.  Their
    names carry host and process, so that only those of the dead are cleaned away.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._host = re.sub(r"\W", "_", socket.gethostname())
        stem = f".{target.name}.{self._host}-{os.getpid()}"
        self.stage = target.with_name(stem + ".stage")
        self.old = target.with_name(stem + ".old")

    def swap(self) -> None:
        """Put the stage in the target's place; what was there stays until :meth:`clean`."""
        if self.target.exists():
            self.target.rename(self.old)
        self.stage.rename(self.target)

    def clean(self) -> None:
        """Remove what this process or dead ones left; an artifact without successor goes back."""
        name = re.escape(self.target.name)
        pattern = re.compile(rf"\.{name}\.{self._host}-(\d+)\.(stage|old)")
        for path in list(self.target.parent.iterdir()):
            match = pattern.fullmatch(path.name)
            if not match or _runs_elsewhere(int(match[1])):
                continue
            if match[2] == "old" and not self.target.exists():
                path.rename(self.target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _runs_elsewhere(pid: int) -> bool:
    """Whether another process of this machine has the id ``pid``."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _folders(root: Path) -> list[Path]:
    return [root, *sorted(path for path in root.rglob("*") if path.is_dir())]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Hex digests by name, hashed in parallel: hashlib lets go of the interpreter lock."""

    def digest(name: str) -> str:
        with (root / name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    names = list(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
