"""The directory that an export is: written beside its place, vouched for by a manifest, renamed into it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputExists, OutputFailed, OutputForeign

MANIFEST = "export.json"


@contextmanager
def staged(output: Path, force: bool) -> Iterator[Path]:
    """A directory to write into, which takes the place of ``output`` at the end, if all went well.

    Raises OutputExists or OutputForeign before anything is written: with ``force`` an earlier export or an
    empty directory is replaced, and nothing else.
    """
    _check(output, force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as error:
        raise OutputFailed(path=str(output), reason=error.strerror or str(error)) from error
    try:
        yield stage
        _check(output, force)
        stage.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        stage.rename(output)
    except OSError as error:
        raise OutputFailed(path=str(output), reason=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def seal(stage: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest: ``facts`` and the size and SHA-256 of every file; returns it."""
    files = {
        path.relative_to(stage).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(stage.rglob("*"))
        if path.is_file()
    }
    manifest = facts | {"files": files}
    write_json(stage / MANIFEST, manifest)
    return manifest


def write_json(file: Path, value: Any) -> None:
    """In the layout of the files that transformers writes."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise OutputExists(path=str(output))
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise OutputForeign(path=str(output), kind="an export of tokenmill")
