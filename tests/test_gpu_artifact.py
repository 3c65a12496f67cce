"""One artifact for a CPU and a GPU: compiled here, where there is no card, and run on a stand-in for one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenmill
import torch
from tokenmill import api, errors
from tokenmill.recipe import Recipe
from tokenmill.runtime import Artifact, Session
from tokenmill.runtime import cuda as runtime_cuda
from tokenmill.runtime.gpu import GpuExecutor

from . import models
from .runtime.interpreted import InterpretedDevice

PROMPT = [5, 17, 3, 88, 41]
NEEDS_NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with its KV heads shared, for steps of up to 8 tokens."""
    path = tmp_path_factory.mktemp("gpu") / "artifact"
    recipe = Recipe(weights="int8", targets=("cpu", "sm_90"), max_step_tokens=8, max_step_rows=4)
    tokenmill.optimize(models.pretrained("llama"), path, recipe=recipe)
    return path


def test_the_kernels_come_from_the_plan(artifact: Path) -> None:
    found = api.verify(artifact)
    assert found["reproducible"], found["differing"]


def test_what_it_holds(artifact: Path) -> None:
    files = Artifact.open(artifact).manifest.files
    schedule = json.loads((artifact / "kernels/sm_90/schedule.json").read_text())
    for binary in schedule["binaries"]:
        assert f"kernels/sm_90/{binary['name']}.cubin" in files
        assert f"kernels/sm_90/{binary['name']}.ptx" in files
        assert f"kernels/sm_90/{binary['file']}" in files
    assert {"plan.json", "plan.cuda.json", "kernels/sm_90/binaries.json"} <= files.keys()
    assert "Binaries for sm_90" in (artifact / "report.html").read_text()


def test_both_devices_agree(artifact: Path) -> None:
    with Session(artifact, device="cpu") as session:
        want = session.logits(PROMPT)
        continued = session.generate([PROMPT], max_new_tokens=3)[0].tokens
    opened = Artifact.open(artifact)
    with Session(opened, device="cpu") as session:
        session._executor = GpuExecutor(opened, InterpretedDevice(), cache_tokens=64)
        got = session.logits(PROMPT)
        tokens = session.generate([PROMPT], max_new_tokens=3)[0].tokens
    assert np.abs(got - want).max() < 0.05 * want.std()
    assert tokens == continued


@NEEDS_NO_CARD
def test_without_a_card_it_runs_on_the_cpu(artifact: Path) -> None:
    assert not runtime_cuda.available()
    with Session(artifact) as session:
        assert session.logits(PROMPT).shape == (5, models.VOCAB)
    with pytest.raises(errors.TokenmillError) as caught:
        Session(artifact, device="cuda")
    assert isinstance(caught.value, errors.NoGpu | errors.MissingExtra)


@NEEDS_NO_CARD
def test_a_gpu_alone(artifact: Path, tmp_path: Path) -> None:
    """Without kernels for a CPU there is no plan for one, and ``auto`` asks for a card."""
    recipe = Recipe(targets=("sm_80",), max_step_tokens=1, max_step_rows=1)
    path = tmp_path / "gpu"
    tokenmill.optimize(models.pretrained("llama"), path, recipe=recipe)
    assert not (path / "plan.json").exists()
    assert api.verify(path)["reproducible"]
    with pytest.raises(errors.NoGpu):
        Session(path)
    with pytest.raises(errors.ForeignTarget, match="sm_80 is not for a CPU"):
        Session(path, device="cpu")


def test_devices_have_names(artifact: Path) -> None:
    with pytest.raises(errors.BadRequest, match="no device 'tpu'"):
        Session(artifact, device="tpu")  # type: ignore[arg-type]
