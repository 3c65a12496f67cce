"""Deep models: a layer that comes again is traced once, and a config alone is enough for a dry run."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenmill import api
from tokenmill.capture import stamp
from tokenmill.capture.checkpoint import open_checkpoint
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.module import capture
from tokenmill.codegen import emit
from tokenmill.errors import BadRequest, ModelNotFound, NotAModel, NumbersMissing
from tokenmill.facts import graph_text, memory
from tokenmill.ir.infer import Memo, rule
from tokenmill.ir.plan import Capacity
from tokenmill.ir.program import Program
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor, nn

from .models import CONFIGS

V3 = Path(__file__).resolve().parent.parent / "benchmarks" / "configs" / "deepseek_v3"


def deep(name: str, layers: int, **changes: Any) -> Any:
    """A random model of ``layers`` layers, all of them different in their numbers."""
    config = CONFIGS[name]()
    for key, value in (changes | {"num_hidden_layers": layers}).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def plainly(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Program]) -> Program:
    with monkeypatch.context() as patch:
        patch.setattr(stamp, "kinds", lambda *_: [])
        return run()


def kinds(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Program]) -> tuple[Program, list[int]]:
    """The program, and how many layers each traced one stood for."""
    found: list[stamp.Kind] = []
    search = stamp.kinds

    def watched(*args: Any) -> list[stamp.Kind]:
        found.extend(search(*args))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(stamp, "kinds", watched)
        return run(), [1 + len(k.twins) for k in found]


def shape_of(program: Program) -> str:
    """The graph's text with its names in order of appearance: export counts traced values."""
    names: dict[str, str] = {}
    text = graph_text(program)
    for line in text.splitlines():
        if match := re.match(r"(\w+) = ", line):
            names[match[1]] = f"v{len(names)}"
    return re.sub(r"(?<![\w.@])\w+(?![\w.(])", lambda m: names.get(m[0], m[0]), text)


def kernels(program: Program) -> dict[str, str]:
    run_passes(program, pipeline(Recipe(weights="int8")))
    return emit(api.plan_for(program, Capacity(), "cpu"), "cpu-x86-64-v3")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 1}, [3]),
        ("qwen3_moe", {}, [4]),
        ("llama", {}, [4]),
    ],
)
def test_stamped_is_traced(
    name: str, changes: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep(name, 4, **changes)
    stamped, found = kinds(monkeypatch, lambda: capture_pretrained(model, name))
    traced = plainly(monkeypatch, lambda: capture_pretrained(model, name))
    ids = torch.randint(0, 256, (23,))
    assert found == expected
    assert shape_of(stamped) == shape_of(traced)
    assert torch.equal(stamped.run(ids), traced.run(ids))
    assert stamped.parameters == traced.parameters == model.num_parameters()
    assert set(stamped.weights) == set(traced.weights)
    if name == "qwen3_moe":
        assert kernels(stamped) == kernels(traced)


def test_layers_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other layer slides: two kinds, whose layers alternate."""
    types = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma2Config(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=9,
        layer_types=types,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    stamped, found = kinds(monkeypatch, lambda: capture_pretrained(model, "gemma2"))
    traced = plainly(monkeypatch, lambda: capture_pretrained(model, "gemma2"))
    ids = torch.randint(0, 256, (31,))
    assert found == [2, 2]
    assert shape_of(stamped) == shape_of(traced)
    assert torch.equal(stamped.run(ids), traced.run(ids))


class Block(nn.Module):
    """A layer of which everything may depend on its index."""

    def __init__(self, index: int, act: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.index, self.act = index, act
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.linear(x), self.index)


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))


_OUTSIDE = [torch.full((16,), 0.5), torch.full((16,), 2.0)]
ACTS: dict[str, tuple[Callable[[Tensor, int], Tensor], list[int]]] = {
    "the same": (lambda x, i: x.tanh(), [6]),
    "a factor by index": (lambda x, i: x * (i + 1), []),
    "another op by index": (lambda x, i: x.tanh() if i % 2 else x.sigmoid(), [3, 3]),
    "a constant by index": (lambda x, i: x * torch.tensor([1.0, 2.0, 3.0])[i % 3], [2, 2, 2]),
    "one of two tensors": (lambda x, i: x * _OUTSIDE[i // 3], [3, 3]),
    "the first is different": (lambda x, i: x.relu() if i == 0 else x.tanh(), [5]),
}


@pytest.mark.parametrize("name", ACTS)
def test_what_depends_on_the_index(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, expected = ACTS[name]
    torch.manual_seed(1)
    model = Stack([Block(i, act) for i in range(6)]).eval()
    program, found = kinds(monkeypatch, lambda: capture(model, max_positions=64))
    ids = torch.randint(0, 32, (11,))
    assert found == expected
    assert torch.allclose(program.run(ids), model(ids[None])[0], atol=1e-5)


class Stash(nn.Module):
    """A layer that leaves something for the layers after it, where no argument shows it."""

    kept: list[Tensor] = []  # noqa: RUF012

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.index < 4:
            self.kept[:] = [self.linear(x)]
        return x + self.linear(x).tanh() * (self.kept[0] if self.index >= 4 else 1)


def test_what_layers_pass_on_the_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = Stack([Stash(i) for i in range(6)]).eval()
    program, found = kinds(monkeypatch, lambda: capture(model, max_positions=64))
    ids = torch.randint(0, 32, (11,))
    assert found == [3]
    assert torch.allclose(program.run(ids), model(ids[None])[0], atol=1e-5)


def test_shared_and_tied_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that several layers have in common, and a layer that comes twice."""
    torch.manual_seed(1)
    blocks = [Block(i, lambda x, i: x.tanh()) for i in range(6)]
    for block in blocks[3:]:
        block.linear.weight = blocks[0].linear.weight
    tied = Stack(list(blocks)).eval()
    twice = Stack([*blocks[:5], blocks[2]]).eval()
    ids = torch.randint(0, 32, (11,))
    for model in (tied, twice):
        program, _ = kinds(monkeypatch, lambda model=model: capture(model, max_positions=64))
        assert program.parameters == sum(p.numel() for p in model.parameters())
        assert torch.allclose(program.run(ids), model(ids[None])[0], atol=1e-5)
    assert all(type(p) is nn.Parameter for p in tied.parameters())
    assert not any("forward" in vars(m) for m in tied.modules())


# --- from a config ------------------------------------------------------------------------------------


TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def small(path: Path, **changes: Any) -> Path:
    """DeepSeek-V3's config with narrow layers."""
    config = json.loads((V3 / "config.json").read_text())
    config |= {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 16,
        "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
    } | changes  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def dry(path: Path, **recipe: Any) -> api.Compiled:
    return api.optimize(path, dry_run=True, config_only=True, recipe=Recipe(**recipe))


def test_a_deep_config(tmp_path: Path) -> None:
    """61 layers, of two kinds, without a number: what the report of a compile says."""
    found = dry(small(tmp_path / "v3"), weights="fp8", targets=["cpu-x86-64-v3", "sm_90"])
    matches = {p["name"]: p["matches"] for p in found.facts["passes"]}
    assert matches["compress_kv"] == 61
    assert matches["fuse_router"] == 58
    assert found.facts["extern_steps"] == []
    assert found.facts["kv_bytes_per_token"] == 61 * 2 * (32 + 8)
    assert found.facts["model"]["positions"] == 163840
    assert found.facts["bytes"]["original"] == 2 * found.facts["parameters"]["total"]
    assert "no weights" in found.facts["passes"][0]["notes"][0]
    stored = found.facts["bytes_by_format"]
    assert stored.keys() == found.facts["weights_by_format"].keys()
    assert found.facts["emitted"]["sm_90"]["binaries"] > 10
    assert len(found.facts["kernels"]) < 30


def test_kernels_are_those_of_a_compile(tmp_path: Path) -> None:
    """With weights and without, dry: the same plan and the same text."""
    path = small(tmp_path / "v3", num_hidden_layers=4, quantization_config=None)
    config = transformers.AutoConfig.from_pretrained(path)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "whole")
    recipe = Recipe(weights="int8", targets=["cpu-x86-64-v3", "sm_90"])
    without = api.optimize(path, dry_run=True, config_only=True, recipe=recipe)
    whole = api.optimize(tmp_path / "whole", dry_run=True, recipe=recipe)
    assert without.plans == whole.plans
    assert without.sources == whole.sources


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dry_run": False, "output": "x"}, "an artifact needs weights"),
        ({"check": True}, "checking runs the model"),
        ({"recipe": Recipe(budget={"max_loss": "1%"})}, "a search within a budget"),
    ],
)
def test_what_a_config_cannot_give(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = small(tmp_path / "v3", num_hidden_layers=4)
    with pytest.raises(BadRequest, match=said):
        api.optimize(path, **{"dry_run": True, "config_only": True} | options)
    assert not Path("x").exists()


def test_configs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        dry(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAModel, match=r"it is empty"):
        dry(tmp_path / "empty")
    with pytest.raises(NotAModel, match="transformers cannot load it"):
        dry(small(tmp_path / "unknown", model_type="no_such_model"))
    with pytest.raises(BadRequest, match="brings its weights"):
        api.optimize(nn.Linear(2, 2), dry_run=True, config_only=True)


def test_numbers_that_are_not_there_are_named(tmp_path: Path) -> None:
    transformers.LlamaConfig(**TINY).save_pretrained(tmp_path)
    streamed = open_checkpoint(tmp_path / "config.json", config_only=True).stream()
    program = capture_pretrained(streamed.model, "llama", streamed.sources)
    with pytest.raises(NumbersMissing, match="embed_tokens"):
        program.run([1, 2])


def test_full_width_stays_small(tmp_path: Path) -> None:
    """Four layers as wide as DeepSeek-V3's, of 163,840 positions, are 26 billion parameters."""
    config = json.loads((V3 / "config.json").read_text()) | {"num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = dry(tmp_path, weights="fp8", targets=["cpu-x86-64-v3"])
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert found.facts["parameters"]["total"] > 25e9
    assert found.facts["kv_bytes_per_token"] == 5 * 1152
    assert grown < 500 << 20


def test_cards() -> None:
    found = memory(weights=100 * 10**9, arena=10**9, row=50_000, positions=4096)
    by_size = {c["card_bytes"] // 10**9: c for c in found["cards"]}
    assert by_size[24]["cards"] == 5
    assert by_size[141]["cards"] == 1
    assert by_size[141]["tokens"] == (141 - 1 - 100) * 10**9 // 50_000
    assert by_size[141]["context"] == 4096
    assert by_size[24]["weight_bytes_per_card"] == 20 * 10**9
    for c in found["cards"]:
        used = 100 * 10**9 + c["tokens"] * 50_000 + c["cards"] * 10**9
        assert used <= c["cards"] * c["card_bytes"]
        assert c["tokens"] > 0


# --- shapes ------------------------------------------------------------------------------------------


_DOUBLED: list[Any] = []


def double(x: Tensor, times: int = 2) -> Tensor:
    _DOUBLED.append(x.shape)
    return x.new_empty(x.shape[0] * times)


def test_shapes_are_inferred_once() -> None:
    calls = _DOUBLED
    calls.clear()
    memo = Memo()
    meta = torch.empty(3, device="meta")
    assert (
        memo.call(double, [meta]).shape == memo.call(double, [torch.empty(3, device="meta")]).shape
    )
    assert len(calls) == 1
    memo.call(double, [meta], {"times": 3})
    memo.call(double, [meta.double()])
    assert len(calls) == 3
    rows = torch.arange(2)
    for _ in range(2):  # what a function holds in a tensor may count
        memo.call(lambda x: double(x[rows]), [meta])
    assert len(calls) == 5


def test_functions_are_told_apart() -> None:
    def make(n: int) -> Callable[[Tensor], Tensor]:
        return lambda w: w.unflatten(0, (n, -1))

    assert rule(make(2)) == rule(make(2))
    assert rule(make(2)) != rule(make(3))
