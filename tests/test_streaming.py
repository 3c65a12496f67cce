"""A checkpoint's weights are read one at a time, and are those that the library's own loader would give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenmill import api
from tokenmill.capture import checkpoint as checkpoints
from tokenmill.capture.checkpoint import Streamed, open_checkpoint
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.shards import Shards
from tokenmill.capture.streaming import NotStreamable
from tokenmill.errors import BadWeight, WeightsMismatch, WeightsMissing
from tokenmill.ir.program import Weights
from tokenmill.recipe import Recipe
from torch import Tensor, nn

from .models import CONFIGS, pretrained


def saved(name: str, path: Path, shard: str = "60KB") -> Path:
    pretrained(name).save_pretrained(path, max_shard_size=shard)
    return path


def assert_same_numbers(streamed: Streamed, whole: nn.Module) -> None:
    """Every weight, each member of the stacks, and what the model computed for itself."""
    assert streamed.note == ""
    wanted = whole.state_dict()
    assert set(streamed.sources) == set(wanted)
    for key, source in streamed.sources.items():
        assert torch.equal(source.whole(), wanted[key])
        assert (source.like.shape, source.like.dtype) == (wanted[key].shape, wanted[key].dtype)
        for i in range(len(source.like)) if source.member else ():
            assert torch.equal(source.member(i), wanted[key][i])  # type: ignore[misc]
    for key, buffer in whole.named_buffers():
        if key not in wanted:
            assert torch.equal(streamed.model.get_buffer(key), buffer)


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(name, tmp_path / name))
    assert len(checkpoint.shards) > 1
    assert_same_numbers(checkpoint.stream(), checkpoint.load())


@pytest.mark.parametrize("name", ["tiny_deepseek", "tiny_qwen3_moe"])
def test_bundled_checkpoints(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(name))
    assert_same_numbers(checkpoint.stream(), checkpoint.load())


def test_nothing_is_read_to_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(saved("llama", tmp_path / "model"))

    def never(*args: Any) -> Tensor:
        raise AssertionError("read")

    monkeypatch.setattr(Shards, "read", never)
    streamed = checkpoint.stream()
    program = capture_pretrained(streamed.model, "model", streamed.sources)
    assert program.parameters == pretrained("llama").num_parameters()


def test_an_expert_is_computed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of experts is made of one at a time, down from the files."""
    source = open_checkpoint(saved("qwen3_moe", tmp_path / "model")).stream().sources[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]  # fmt: skip
    read: list[int] = []
    whole = Shards.read

    def watched(self: Shards, name: str, index: int | None = None) -> Tensor:
        value = whole(self, name, index)
        read.append(value.numel())
        return value

    sizes: list[int] = []

    def halved(w: Tensor) -> Tensor:
        sizes.append(0 if w.is_meta else w.numel())
        return w / 2

    weights = Weights({})
    weights.read("w", source.like, source.whole, source.member)
    weights.derive("half", halved, "w", each=True)
    weights.derive("quarter", halved, "half", each=True)
    monkeypatch.setattr(Shards, "read", watched)
    quarter = weights["quarter"]
    one = source.like[0].numel()
    assert max(sizes) == one
    assert max(read) == one // 2  # gate and up are tensors of their own
    assert torch.equal(quarter, weights["w"] / 4)
    assert torch.equal(weights["quarter"], weights["half"] / 2)
    weights.settle("half", lambda: torch.ones(source.like.shape))
    assert (weights["quarter"] == 0.5).all()


def renamed(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_tied_weights_are_read_under_the_name_that_is_there(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    checkpoint = open_checkpoint(renamed(saved("llama", tmp_path / "model", "1GB"), rename))
    streamed = checkpoint.stream()
    assert_same_numbers(streamed, checkpoint.load())
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight


@pytest.mark.parametrize("same", [True, False])
def test_both_names_of_a_tie_may_be_there(same: bool, tmp_path: Path) -> None:
    def double(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if same else 2)

    checkpoint = open_checkpoint(renamed(saved("llama", tmp_path / "model", "1GB"), double))
    streamed = checkpoint.stream()
    assert_same_numbers(streamed, checkpoint.load())
    tied = streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
    assert tied is same


def test_what_cannot_be_streamed_is_loaded_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved("llama", tmp_path / "model")

    def unknown(*args: Any) -> Any:
        raise NotStreamable("a layout of its own")

    monkeypatch.setattr(checkpoints, "sources", unknown)
    streamed = open_checkpoint(path).stream()
    assert streamed.sources == {}
    assert torch.equal(streamed.model.lm_head.weight, open_checkpoint(path).load().lm_head.weight)
    compiled = api.optimize(path, dry_run=True, recipe=Recipe(weights="bf16"))
    notes = compiled.facts["passes"][0]["notes"]
    assert notes == ["loaded as a whole: a layout of its own"]


def test_a_library_that_changed_inside_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading

    checkpoint = open_checkpoint(saved("llama", tmp_path / "model"))
    monkeypatch.delattr(core_model_loading, "dot_natural_key")
    monkeypatch.setattr(checkpoints.Checkpoint, "load", lambda self: pretrained("llama"))
    streamed = checkpoint.stream()
    assert "dot_natural_key" in streamed.note
    assert isinstance(streamed.model, transformers.LlamaForCausalLM)


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    return saved("deepseek_v3", tmp_path / "model", "1GB")


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({EXPERT: torch.full((24, 64), float("nan"))}, BadWeight, "experts.3.up_proj"),
        ({EXPERT: None}, WeightsMismatch, "experts.gate_up_proj"),
        ({EXPERT: torch.zeros(24, 32)}, WeightsMismatch, "experts.gate_up_proj"),
        ({"model.norm.weight": None}, WeightsMissing, "model.norm.weight"),
        ({"model.norm.weight": torch.zeros(63)}, WeightsMismatch, "model.norm.weight"),
        ({"model.extra": torch.zeros(3)}, WeightsMismatch, "model.extra"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Tensor | None], error: type[Exception], said: str, deepseek: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, value in changes.items():
            tensors.pop(name, None)
            tensors |= {} if value is None else {name: value}

    with pytest.raises(error, match=said):
        open_checkpoint(renamed(deepseek, change)).stream()


def test_values_are_counted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmill.capture import shards

    values = torch.zeros(5, 7, dtype=torch.bfloat16)
    values[1, 2], values[4, 6], values[3, 0] = float("nan"), float("inf"), -float("inf")
    fp8 = torch.tensor([1.0, float("nan"), 3.0]).to(torch.float8_e4m3fn)
    save_file({"a": values, "b": torch.arange(4), "c": fp8}, tmp_path / "x.safetensors")
    monkeypatch.setattr(shards, "_PIECE", 6)
    found = Shards([tmp_path / "x.safetensors"])
    assert {name: found.invalid(name) for name in found} == {"a": 3, "b": 0, "c": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_shards_read_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    made = {
        "matrix": (torch.randn(3, 4, 5) * 9).to(dtype),
        "none": torch.zeros(0, 4, dtype=dtype),
        "scalar": torch.tensor(3, dtype=dtype),
    }
    save_file(made, tmp_path / "x.safetensors")
    found = Shards([tmp_path / "x.safetensors"])
    for name, value in made.items():
        assert torch.equal(found.read(name), value)
        assert found.like(name).shape == value.shape
    assert torch.equal(found.read("matrix", 2), made["matrix"][2])


def test_the_model_is_not_loaded_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved("llama", tmp_path / "model")

    def never(self: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(checkpoints.Checkpoint, "load", never)
    compiled = api.optimize(path, dry_run=True, recipe=Recipe(weights="int4"))
    assert compiled.facts["passes"][0]["notes"] == []


def test_a_config_of_another_model_is_refused(deepseek: Path, tmp_path: Path) -> None:
    other = shutil.copytree(deepseek, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(WeightsMissing, match=r"layers\.2"):
        open_checkpoint(other).stream()


def test_remote_configs_are_not_run(tmp_path: Path) -> None:
    """The library's own code is used for a type that it knows, whatever auto_map says."""
    path = saved("llama", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (path / "config.json").write_text(json.dumps(config))
    streamed = open_checkpoint(path).stream()
    assert type(streamed.model) is transformers.LlamaForCausalLM
