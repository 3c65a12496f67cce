"""The manifest: what an artifact holds, and how one knows that it still holds it.

``manifest.json`` is canonical JSON (sorted keys, one space of indent, ASCII, no timestamps) that
lists every other file with its size and SHA-256, and carries a digest of itself.  A reader accepts
exactly the bytes that :meth:`Manifest.render` would write, so one flipped byte anywhere is found.

>>> Manifest.parse(Manifest(files={}, targets=()).render(), "manifest.json").targets
()
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from .. import errors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileFact:
    """Size in bytes and hex SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Target:
    """Kernels for one kind of machine: ``directory`` holds the sources and what was built from them.

    On a CPU ``needs`` are feature flags as Linux spells them in /proc/cpuinfo (``avx2``, ``fma``), and
    ``machine`` is ``platform.machine()`` (``x86_64``, ``aarch64``), empty for any.  A GPU is named by its
    architecture: ``sm_90``.
    """

    name: str
    directory: str
    needs: tuple[str, ...] = ()
    machine: str = ""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cuda" if self.name.startswith("sm_") else "cpu"

    @property
    def entry(self) -> str:
        """The file that a runtime opens first, relative to the artifact."""
        file = "schedule.json" if self.device == "cuda" else "step.so"
        return f"{self.directory}/{file}"


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact except its contents; ``report`` is free JSON."""

    files: Mapping[str, FileFact]
    targets: tuple[Target, ...]
    tokenmill: str = ""
    toolchain: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def render(self) -> bytes:
        body = dataclasses.asdict(self) | {"format_version": FORMAT_VERSION}
        return canonical(body | {"digest": _digest(body)})

    @staticmethod
    def parse(raw: bytes, file: str) -> Manifest:
        """The manifest in ``raw``; raises ArtifactTooNew, or ArtifactDamaged naming ``file``."""
        data = parse_object(raw, file)
        version = data.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise errors.ArtifactDamaged(file=file, reason="it has no format_version")
        if version > FORMAT_VERSION:
            raise errors.ArtifactTooNew(found=version, known=FORMAT_VERSION)
        body = {key: value for key, value in data.items() if key != "digest"}
        if data.get("digest") != _digest(body) or raw != canonical(data):
            raise errors.ArtifactDamaged(file=file, reason="its contents do not match its digest")
        try:
            return _from_json(body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise errors.ArtifactDamaged(file=file, reason=f"malformed: {error}") from error


def canonical(value: Any) -> bytes:
    """The one JSON text of a value; raises ValueError for NaN and infinities."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def parse_object(raw: bytes, file: str) -> dict[str, Any]:
    """A JSON object, or ArtifactDamaged naming ``file``."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise errors.ArtifactDamaged(file=file, reason=f"not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise errors.ArtifactDamaged(file=file, reason="not a JSON object")
    return data


def check_inside(path: str) -> str:
    """``path`` if it is a plain relative path that cannot leave the artifact; raises ValueError."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    plain = path and str(posix) == path and path != "." and not windows.drive and "\\" not in path
    if not plain or posix.is_absolute() or ".." in posix.parts:
        raise ValueError(f"path {path!r} leads outside the artifact")
    return path


def _from_json(body: Mapping[str, Any]) -> Manifest:
    files = {
        check_inside(path): FileFact(int(fact["bytes"]), str(fact["sha256"]))
        for path, fact in body["files"].items()
    }
    targets = tuple(
        Target(t["name"], check_inside(t["directory"]), tuple(t["needs"]), t.get("machine", ""))
        for t in body["targets"]
    )
    for key in ("toolchain", "recipe", "report"):
        if not isinstance(body[key], dict):
            raise TypeError(f"{key} is not an object")
    for target in targets:  # only what is hashed may be loaded
        if target.entry not in files:
            raise ValueError(f"target {target.name!r} has no {target.entry}")
    return Manifest(
        files=files,
        targets=targets,
        tokenmill=body["tokenmill"],
        toolchain=body["toolchain"],
        recipe=body["recipe"],
        report=body["report"],
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(body)).hexdigest()
