"""Models whose attention was made latent, as checkpoints: other classes of transformers, the same logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.capture.checkpoint import open_checkpoint
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.errors import ArtifactTooOld, Unsupported
from tokenmill.export._hf_latent import LatentPlan
from tokenmill.export._hf_latent_attention import angles, constant, down, up
from tokenmill.export.huggingface import plan_of, write
from tokenmill.export.parameters import describe
from tokenmill.ir.program import Program
from tokenmill.passes.base import calls, mill
from tokenmill.passes.pipeline import Fit, pipeline, relative_error, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor

from .models import VOCAB, pretrained

CLASSES = {"llama": "DeepseekV3ForCausalLM", "qwen3_moe": "Mistral4ForCausalLM"}
IDS = torch.arange(70) * 37 % VOCAB


def texts(count: int, seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (48,), generator=rng) for _ in range(count)]


def quiet(what: str, done: int, total: int) -> None: ...


@dataclass
class Model:
    """A captured checkpoint; ``converted`` is what an artifact of it holds, without kernels."""

    program: Program
    sources: Any
    config: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Model:
        checkpoint = open_checkpoint(path)
        streamed = checkpoint.stream()
        assert streamed.sources
        program = capture_pretrained(streamed.model, path.name, streamed.sources)
        return cls(program, streamed.sources, checkpoint.config)

    def converted(self, weights: Any) -> tuple[Program, dict[str, Any]]:
        how = {"save": "50%", "heal_steps": 0}
        recipe = Recipe(weights=weights, kv="fp32", kv_compress=how)
        program = self.program.copy()
        run_passes(program, pipeline(recipe, Fit(healing=texts(4, 0), held=texts(2, 1))))
        return program, json.loads(json.dumps(describe(program, self.sources)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    root, made = tmp_path_factory.mktemp("models"), dict[str, Model]()

    def get(name: str) -> Model:
        if name not in made:
            pretrained(name).save_pretrained(root / name)
            made[name] = Model.read(root / name)
        return made[name]

    return get


def load(path: Path, name: str) -> Any:
    kind = getattr(transformers, CLASSES[name])
    loaded, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_computes_the_same(
    name: str, model: Callable[[str], Model], tmp_path: Path
) -> None:
    program, record = model(name).converted("fp32")
    plan = plan_of(program, record, model(name).config)
    assert isinstance(plan, LatentPlan)
    facts = write(tmp_path, plan, 1 << 40, quiet)
    assert facts["otherwise"] == []
    assert facts["checks"]["transformers"]["error_max"] < 1e-4
    loaded, expected = load(tmp_path, name), program.run(IDS)
    with torch.no_grad():
        assert relative_error(expected, loaded(IDS[None]).logits[0]) < 1e-4
        made = loaded.generate(IDS[None, :5], max_new_tokens=6, do_sample=False, eos_token_id=None)
        again = loaded(made).logits[0].argmax(-1)
    assert torch.equal(made[0, 5:], again[4:-1])
    if name == "qwen3_moe":
        after = Model.read(tmp_path).program
        run_passes(after, pipeline(Recipe(weights="int8", kv="fp32")))
        assert len(list(calls(after, mill.cached_latent_attention))) == 2
        assert relative_error(expected, after.run(IDS)) < 0.05


@pytest.mark.parametrize(("name", "weights"), [("qwen3_moe", "bf16"), ("llama", "int8")])
def test_narrow_weights_are_written_in_bf16(
    name: str, weights: str, model: Callable[[str], Model], tmp_path: Path
) -> None:
    program, record = model(name).converted(weights)
    plan = plan_of(program, record, model(name).config)
    facts = write(tmp_path, plan, 1 << 40, quiet)
    loaded = load(tmp_path, name)
    assert loaded.config.architectures == [CLASSES[name]]
    with torch.no_grad():
        assert relative_error(program.run(IDS), loaded(IDS[None]).logits[0]) < 0.03
    assert {o["artifact"] for o in facts["otherwise"]} == {weights} - {"bf16"}
    noted = any("numbers that they stand for" in note for note in facts["notes"])
    assert noted == (weights == "int8")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_no_class_has_is_refused(model: Callable[[str], Model]) -> None:
    dense = model("llama")
    program, record = dense.converted("fp32")
    with pytest.raises(Unsupported, match="laid out like gemma"):
        plan_of(program, record, dense.config | {"model_type": "gemma"})
    with pytest.raises(ArtifactTooOld):
        plan_of(program, {k: v for k, v in record.items() if k != "made"}, dense.config)
    with pytest.raises(Unsupported, match="2 of 3 attentions"):
        plan_of(program, record, dense.config | {"num_hidden_layers": 3})
    with pytest.raises(Unsupported, match="embed_tokens"):
        plan_of(program, record, dense.config | {"vocab_size": VOCAB + 1})
    query = "model.layers.0.self_attn.q_proj.weight.latent"
    made = record["made"]
    rows = made["tensors"][query]["shape"][0]
    bias = {"name": "b", "format": "fp32", "role": "norm", "edited": False, "transposed": False,
            "rows": [[f"{query}.bias", 0, 1, 0, rows]]}  # fmt: skip
    tensors = made["tensors"] | {f"{query}.bias": {"dtype": "f32", "shape": [rows]}}
    biased = {"tensors": tensors, "stored": [*made["stored"], bias]}
    with pytest.raises(Unsupported, match="queries have a bias"):
        plan_of(program, record | {"made": biased}, dense.config)
    routed = model("qwen3_moe")
    program, record = routed.converted("fp32")
    for node in calls(program, mill.route):
        spec = str(node.args[2]).replace("softmax", "sigmoid")
        node.args = (*node.args[:2], spec)
    with pytest.raises(Unsupported, match="softmax of their scores"):
        plan_of(program, record, routed.config)


@given(st.lists(st.floats(-6.0, 0.0), min_size=1, max_size=6), st.floats(0.5, 2.0))
@settings(deadline=None, max_examples=40)
def test_frequencies_are_read_from_tables(powers: list[float], modulus: float) -> None:
    frequency = 10.0 ** torch.tensor(powers)
    turned = torch.arange(3000)[:, None] * frequency
    found, length = angles((modulus * turned.cos()).double(), (modulus * turned.sin()).double())
    torch.testing.assert_close(found, frequency.double(), rtol=3e-7, atol=0)
    assert length == pytest.approx(modulus, rel=1e-6)


def test_angles_that_bend_are_refused() -> None:
    turned = torch.arange(500)[:, None].double() ** 1.1
    with pytest.raises(Unsupported, match="multiples"):
        angles(turned.cos(), turned.sin())
    with pytest.raises(Unsupported, match="unevenly"):
        angles(turned.cos(), 2 * turned.sin())


@given(st.integers(1, 600), st.floats(-20.0, 20.0), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=15)
def test_a_norm_leaves_latents_beside_a_constant(rank: int, power: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    latent = math.ldexp(1.0, round(power)) * torch.randn(rank, 8, generator=rng)
    gain, size = 1 + torch.randn(8, generator=rng), rank + 1
    large, weight = constant(latent, gain, size)
    x = torch.randn(5, 8, generator=rng)
    x = x * x.square().mean(-1, keepdim=True).rsqrt() * gain
    both = x @ down(latent, torch.zeros(0, 8), size).T
    expected = both[:, :-1].clone()
    both[:, -1] += large
    normed = both * torch.rsqrt(both.square().mean(-1, keepdim=True) + 1e-6) * weight
    same = up(torch.eye(rank)[None], torch.zeros(1, 0, rank), size)
    torch.testing.assert_close(normed @ same.T, expected, rtol=1e-5, atol=0)
    assert [torch.tensor(v).bfloat16().item() for v in (large, weight)] == [large, weight]
