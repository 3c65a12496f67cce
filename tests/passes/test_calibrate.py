"""Weights rounded for a text: less is lost, nothing else changes, and a killed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenmill.errors import OutputFailed, OutputForeign, Unsupported
from tokenmill.ir import quant
from tokenmill.ir.program import Program, Runner
from tokenmill.passes import calibrate as module
from tokenmill.passes.calibrate import Calibrate, find_sites, peak_bytes
from tokenmill.passes.fuse_dequantize import FuseDequantize
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.quantize import Quantize
from tokenmill.passes.workspace import Workspace
from tokenmill.recipe import Recipe, Rule
from torch import Tensor

from .build import VOCAB, apply, decoder, found, logits, mill

INT4 = Recipe(
    weights="int4-g128",
    rules=[Rule(match=f"role:{role}", format="int4-g128") for role in ("linear", "head")],
)


def _text(sequences: int = 40, length: int = 24) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length,), generator=rng) for _ in range(sequences)]


def _quantized(latent: bool = True, recipe: Recipe = INT4) -> Program:
    program = decoder(latent)
    apply(program, FuseLinear(), exact=False)
    apply(program, Quantize(recipe), exact=False)
    return program


def _loss(program: Program, latent: bool = True) -> float:
    pairs = zip(logits(program), logits(decoder(latent)), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs)


@pytest.mark.parametrize("latent", [True, False])
def test_less_is_lost(latent: bool) -> None:
    nearest, fitted = _quantized(latent), _quantized(latent)
    calibrate = Calibrate(_text())
    apply(fitted, calibrate, exact=False)
    assert _loss(fitted, latent) < 0.8 * _loss(nearest, latent)
    sites = [s for weights in find_sites(fitted).values() for s in weights.values()]
    assert sorted(calibrate.rounded) == sorted(s.name for s in sites)
    assert calibrate.notes[0].startswith(f"{len(sites)} weights rounded by GPTQ")


def test_a_program_that_shares_the_weights_is_left_alone() -> None:
    before = _quantized()
    twin = before.copy()
    expected = logits(before)
    Calibrate(_text()).run(twin)
    assert all(torch.equal(a, b) for a, b in zip(logits(before), expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(logits(twin), expected, strict=True))


def test_what_was_walked_is_what_the_program_computes() -> None:
    """The inputs that weights are fitted to are those of the program with the weights before them rounded."""
    program = _quantized()
    text = _text(3)
    seen: dict[str, list[Tensor]] = {}

    class Watch(Calibrate):
        def _linear(self, program, walk, node, weights):  # type: ignore[no-untyped-def]
            seen[node.name] = [v.clone() for v in walk.values[node.args[0]]]
            super()._linear(program, walk, node, weights)

    Watch(text).run(program)

    class Check(Runner):
        def run_node(self, n):  # type: ignore[no-untyped-def]
            if n.name in seen:
                (x, *_), _ = self.fetch_args_kwargs_from_env(n)
                torch.testing.assert_close(x, seen[n.name].pop(0), rtol=1e-4, atol=1e-5)
            return super().run_node(n)

    for ids in text:
        program.run(ids, runner=Check(program.graph, program.weights))
    assert seen
    assert not any(seen.values())


def test_experts_that_few_tokens_reach_are_rounded_to_the_nearest() -> None:
    few = _quantized(recipe=Recipe(weights="int4"))
    calibrate = Calibrate(_text(1, 3))
    apply(few, calibrate, exact=False)
    (note,) = calibrate.starved
    assert "experts of layers.1.mlp.experts.gate_up saw fewer than" in note
    plain = _quantized(recipe=Recipe(weights="int4"))
    for name in (n for n in few.used_weights() if ".experts." in n):
        assert torch.equal(few.weights[name], plain.weights[name])


def test_clipping_keeps_to_the_nearest() -> None:
    program = _quantized()
    calibrate = Calibrate(_text(), rounding="clip")
    apply(program, calibrate, exact=False)
    assert "clipped" in calibrate.notes[0]
    assert _loss(program) < 1.05 * _loss(_quantized())


def test_parts_reach_the_kernels() -> None:
    program = _quantized()
    apply(program, Calibrate(_text()), exact=False)
    expected = logits(program)
    apply(program, FuseDequantize())
    assert not found(program, mill.dequantize)
    assert all(torch.equal(a, b) for a, b in zip(logits(program), expected, strict=True))


def test_a_text_on_which_the_model_overflows_is_refused() -> None:
    program = decoder()
    program.weights["embed.weight"].mul_(torch.inf)
    apply(program, FuseLinear(), exact=False)
    Quantize(INT4).run(program)
    with pytest.raises(Unsupported, match="NaN or Inf on the calibration text"):
        Calibrate(_text(1)).run(program)


# --- going on after a kill --------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    whole = _quantized()
    Calibrate(_text()).run(whole)
    wanted = logits(whole)
    rounded: list[int] = []
    gptq = module.gptq

    def counted(*args):  # type: ignore[no-untyped-def]
        rounded.append(1)
        return gptq(*args)

    monkeypatch.setattr(module, "gptq", counted)
    total = 0
    for stop in (3, 5, None):

        def progress(what: str, done: int, of: int, stop: int | None = stop) -> None:
            if done == stop:
                raise Killed

        program = _quantized()
        calibrate = Calibrate(
            _text(), "gptq", Workspace(tmp_path / "work", {"of": "this"}), progress
        )
        rounded.clear()
        if stop is None:
            calibrate.run(program)
        else:
            with pytest.raises(Killed):
                calibrate.run(program)
        total += len(rounded)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(logits(program), wanted, strict=True)
    )
    sites = find_sites(program)
    experts = sum(4 * 2 for weights in sites.values() if len(weights) == 2)
    assert total == experts + sum(len(weights) == 1 for weights in sites.values())


def test_the_work_of_another_recipe_is_thrown_away(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "work", {"recipe": 1})
    first.keep("a/b", {"q": torch.ones(2)})
    first.save_state("here", {"x": [torch.ones(3), (torch.zeros(1), 7)]})
    again = Workspace(tmp_path / "work", {"recipe": 1})
    assert again.has("a/b")
    assert again.get("a/b", "q").tolist() == [1.0, 1.0]
    label, state = again.load_state() or ("", {})
    assert (label, state["x"][1][1]) == ("here", 7)
    assert state["x"][0].tolist() == [1.0, 1.0, 1.0]
    other = Workspace(tmp_path / "work", {"recipe": 2})
    assert not other.has("a/b")
    assert other.load_state() is None
    other.remove()
    assert not (tmp_path / "work").exists()


def test_work_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "work" / "thesis.tex"
    mine.parent.mkdir()
    Workspace(mine.parent, {})  # an empty directory holds nothing to lose
    mine.write_text("x")
    with pytest.raises(OutputForeign, match="unfinished work"):
        Workspace(mine.parent, {})
    with pytest.raises(OutputForeign):
        Workspace(mine, {})
    assert mine.read_text() == "x"


def test_work_makes_its_directory_with_the_first_result(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work", {"of": "this"})
    room = work.room("inner", {"of": "that"})
    assert not work.path.exists()
    room.keep("a", {"q": torch.ones(2)})
    again = Workspace(tmp_path / "work", {"of": "this"}).room("inner", {"of": "that"})
    assert again.has("a")


def test_work_that_cannot_be_written(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "file" / "work", {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputFailed, match="work"):
        work.keep("a", {"q": torch.ones(2)})


def test_the_peak_is_foretold() -> None:
    """Between the least that must be in memory at one node, and that of all nodes together."""
    program = _quantized()
    text = _text(40, 64)
    held = [0]

    class Watch(Calibrate):
        def _linear(self, program, walk, node, weights):  # type: ignore[no-untyped-def]
            held.append(_held(walk.values))
            super()._linear(program, walk, node, weights)

    Watch(text).run(program)
    told = peak_bytes(_quantized(), 40 * 64)
    assert max(held) <= told <= 3 * max(held)


def _held(values: dict[Any, list[Any]]) -> int:
    tensors = [
        t for node, each in values.items() if node.op != "placeholder" for v in each
        for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, Tensor)
    ]  # fmt: skip
    return sum(t.nbytes for t in tensors)


def test_parts_that_came_with_the_checkpoint_stay() -> None:
    program = decoder()
    apply(program, FuseLinear(), exact=False)
    name, fmt = "layers.1.mlp.down_proj.weight", quant.parse("int4-g128")
    given = quant.quantize(program.weights[name], fmt)
    for part, value in given.items():
        program.weights.add(f"{name}.{fmt.name}.{part}", value)
    apply(program, Quantize(INT4), exact=False)
    calibrate = Calibrate(_text())
    apply(program, calibrate, exact=False)
    assert name not in calibrate.rounded
    assert torch.equal(program.weights[f"{name}.{fmt.name}.q"], given["q"])
