"""Finished work on disk: a long pass that was killed goes on where it stopped, and holds little in memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import OutputFailed, OutputForeign

_KEY, _STATE = "key.json", "state.safetensors"


class Workspace:
    """A directory of tensors that belongs to one piece of work, told by ``key``; what another one left there
    is removed.  It is made when there is something to keep.  Files are complete or absent: each is written
    beside its place and renamed.

    Raises OutputForeign if there is something else at ``path``, OutputFailed when the disk does.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], parent: Workspace | None = None) -> None:
        self.path = path
        self._key = json.dumps(key, sort_keys=True)
        self._parent = parent
        mark = path / _KEY
        with self._reporting():
            if mark.is_file():
                if mark.read_text() != self._key:
                    self.remove()
            elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
                raise OutputForeign(path=str(path), kind="the unfinished work of a compile")

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def room(self, name: str, key: Mapping[str, Any]) -> Workspace:
        """A directory inside for one of several pieces of work, with results and a state of its own."""
        return Workspace(self.path / name, key, self)

    # --- results, kept under a name

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._write(self._file(name), tensors, {"name": name})

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def get(self, name: str, key: str) -> Tensor:
        with safe_open(self._file(name), framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(key)
        return value

    # --- where the work stands: nested tensors and numbers under a label, the last one only

    def save_state(self, label: str, state: Any) -> None:
        leaves, spec = pytree.tree_flatten(state)
        numbers = {str(i): leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        # Leaves may share memory, which the format does not allow.
        tensors = {
            str(i): leaf.clone() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
        }
        about = {
            "label": label, "spec": pytree.treespec_dumps(spec), "numbers": json.dumps(numbers),
        }  # fmt: skip
        self._write(self.path / _STATE, tensors, about)

    def load_state(self) -> tuple[str, Any] | None:
        """The last label and state, or None."""
        file = self.path / _STATE
        if not file.is_file():
            return None
        with safe_open(file, framework="pt") as tensors:
            about = tensors.metadata()
            leaves = json.loads(about["numbers"])
            leaves |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        spec = pytree.treespec_loads(about["spec"])
        return about["label"], pytree.tree_unflatten(
            [leaves[str(i)] for i in range(len(leaves))], spec
        )

    def _file(self, name: str) -> Path:
        return self.path / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def _write(self, file: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
        with self._reporting():
            self._make()
            beside = file.with_suffix(".partial")
            save_file({k: t.contiguous() for k, t in tensors.items()}, beside, about)
            beside.rename(file)

    def _make(self) -> None:
        """The directory, with the mark that tells whose it is."""
        if self._parent:
            self._parent._make()
        mark = self.path / _KEY
        if not mark.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            mark.write_text(self._key)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OutputFailed(path=str(self.path), reason=reason) from error
