"""Every supported architecture, from a module to logits out of the compiled artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenmill import Recipe, Session, optimize
from torch import Tensor, nn

from .models import CONFIGS, eager, hand_written, pretrained

EXACT = Recipe(weights="fp32", kv="fp32", max_step_tokens=64, max_step_rows=64)


def assert_logits(path: Path, model: nn.Module, lengths: tuple[int, ...] = (1, 3, 65, 150)) -> None:
    """Also in one ragged batch, and in more chunks than one."""
    with Session(path) as session:
        rng = torch.Generator().manual_seed(1)
        batch = [torch.randint(0, session.vocab, (n,), generator=rng).tolist() for n in lengths]
        for ids, found in zip(batch, session.logits_of(batch), strict=True):
            wanted = eager(model, ids)
            error = (torch.from_numpy(found) - wanted).abs().max() / wanted.std()
            assert error < 1e-3, f"{len(ids)} tokens: {error}"


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_models(name: str, tmp_path: Path) -> None:
    compiled = optimize(pretrained(name), tmp_path / name, recipe=EXACT)
    assert compiled.facts["extern_steps"] == []
    assert_logits(tmp_path / name, pretrained(name))


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    compiled = optimize(hand_written(), tmp_path / "own", recipe=EXACT, max_positions=256)
    assert compiled.facts["extern_steps"] == []
    assert_logits(tmp_path / "own", hand_written())


class Unusual(nn.Module):
    """Ops without a kernel of ours: a running sum and a sort over features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + x.cumsum(-1) * 0.1
        x = torch.erfinv(torch.tanh(x.sort(-1).values) * 0.9)
        return self.head(x)


def test_what_only_torch_can_run_is_counted_and_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Unusual().eval()
    compiled = optimize(model, tmp_path / "unusual", recipe=EXACT, max_positions=256)
    ops = {step["op"] for step in compiled.facts["extern_steps"]}
    assert any("cumsum" in op for op in ops)
    assert any("sort" in op for op in ops)
    assert_logits(tmp_path / "unusual", model)
