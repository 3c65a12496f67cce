"""Artifacts as checkpoints: the same integers under the old names, and the same logits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenmill.capture.checkpoint import open_checkpoint
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.shards import Source
from tokenmill.cli import app
from tokenmill.errors import ExportDiffers, OutputExists, OutputForeign, Unsupported
from tokenmill.export import _hf_check, huggingface
from tokenmill.export._hf_config import W8A8, quantization_config, targets
from tokenmill.export._hf_tensors import pack
from tokenmill.export.huggingface import Plan, export, write
from tokenmill.export.parameters import describe
from tokenmill.ir import quant
from tokenmill.ir.program import Program, Weights
from tokenmill.ir.provenance import ZEROS, Rows, compose, rearranged, trace
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe, Rule
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from .models import CONFIGS, pretrained
from .test_packed import words

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]


# --- rows ---------------------------------------------------------------------------------------------


def like(*sizes: int) -> Tensor:
    return torch.empty(sizes, device="meta")


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Matrices of one width, and a chain of steps that only move their rows."""
    width = draw(st.integers(1, 5))
    given = [torch.randn(draw(st.integers(1, 6)), width) for _ in range(draw(st.integers(1, 3)))]
    rows = sum(len(g) for g in given)
    order = torch.tensor(draw(st.permutations(range(rows))))
    kept = order[: draw(st.integers(1, rows))]
    begin = draw(st.integers(0, len(kept) - 1))
    stacked, filled = draw(st.booleans()), draw(st.booleans())

    def function(*parts: Tensor) -> Tensor:
        made = torch.cat(parts)[kept][begin:]
        if filled:
            made = torch.cat((made, made.new_zeros(2, made.shape[1])))
        return made.unflatten(0, (-1, 1)) if stacked else made

    return given, function


@given(moves())
@settings(deadline=None, max_examples=60)
def test_rows_are_found_wherever_they_go(case: tuple[list[Tensor], Callable[..., Tensor]]) -> None:
    given, function = case
    sources = {f"s{i}": like(*g.shape) for i, g in enumerate(given)}
    made = function(*given)
    found = rearranged(function, sources, like(*made.shape))
    assert found is not None
    assert not found.transposed
    assert Rows.of(found.runs()).runs() == found.runs()
    rows = made.flatten(0, -2)
    for at, (owner, row) in enumerate(zip(found.owner.tolist(), found.row.tolist(), strict=True)):
        source = found.sources[owner]
        zeros = source == ZEROS
        assert torch.equal(
            rows[at], torch.zeros(rows.shape[1]) if zeros else given[int(source[1:])][row]
        )


COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda w: 2 * w,
    "shifted": lambda w: w + 1,
    "mixed": lambda w: w.flip(-1),
    "summed": lambda w: w + w.roll(1, 0),
    "one row scaled": lambda w: torch.cat((w[:1] * 3, w[1:])),
    "some columns": lambda w: w[:, [0, 1, 0, 1]],
}


@pytest.mark.parametrize("case", COMPUTED)
def test_what_is_computed_is_not_taken_for_moved(case: str) -> None:
    for sizes in ((6, 4), (4, 4)):
        assert rearranged(COMPUTED[case], {"w": like(*sizes)}, like(*sizes)) is None
    if case in ("scaled", "shifted", "summed"):
        assert rearranged(COMPUTED[case], {"w": like(300)}, like(300)) is None


def test_transposed_experts() -> None:
    found = rearranged(lambda w: w.transpose(1, 2), {"w": like(2, 3, 5)}, like(2, 5, 3))
    assert found is not None
    assert found.transposed
    assert found.runs() == [("w", 0, 1, 0, 10)]
    back = compose(found, lambda name: found)
    assert back is not None
    assert not back.transposed


def test_a_chain_of_derivations() -> None:
    weights = Weights({"q": torch.randn(4, 3), "k": torch.randn(2, 3), "gain": torch.randn(3)})
    weights.derive("turned", lambda w: w[[1, 0, 3, 2]], "q")
    weights.derive("scaled", lambda w, g: w * g, "turned", "gain", origins=["turned"])
    weights.derive("qk", lambda *w: torch.cat(w), "scaled", "k")
    weights.derive("odd", lambda w: w @ w.T, "q")
    rows = trace(weights, "qk")
    assert rows is not None
    assert rows.runs() == [("q", 1, -1, 0, 2), ("q", 3, -1, 2, 2), ("k", 0, 1, 4, 2)]
    assert trace(weights, "odd") is None


# --- words and names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 4, 7, 64])
def test_words_are_those_of_the_format(columns: int) -> None:
    q = torch.randint(-127, 128, (3, columns), dtype=torch.int8)
    assert torch.equal(pack(q, quant.parse("int8")), words(q.long() + 128, 8, 1))
    if columns % 8 == 0:
        w = torch.randint(-8, 8, (3, columns)).float()
        fmt = quant.parse("int4-g32")
        assert torch.equal(pack(quant.pack(w, fmt), fmt), words(w.long() + 8, 4, 1))


MODULES = st.dictionaries(
    st.tuples(
        st.integers(0, 12), st.sampled_from(["q", "k", "experts.0.up", "experts.11.up", "gate"])
    ),
    st.sampled_from(["int8", "int4-g32", "bf16", W8A8]),
    min_size=1,
    max_size=24,
)


@given(MODULES)
@settings(deadline=None)
def test_expressions_tell_formats_apart(drawn: dict[tuple[int, str], str]) -> None:
    modules = {f"model.layers.{layer}.{name}": f for (layer, name), f in drawn.items()}
    experts = [m for m in modules if ".experts." in m]
    for format in set(modules.values()):
        found = [t.removeprefix("re:") for t in targets(modules, format)]
        for module, actual in modules.items():
            hits = [t for t in found if re.match(t, module)]
            assert bool(hits) == (actual == format)
    config = quantization_config("compressed-tensors", modules, experts)
    narrow = set(modules.values()) - {"bf16"}
    assert (config is None) == (not narrow)
    if config and (routed := {modules[e] for e in experts} - {"bf16"}):
        first = config["config_groups"]["group_0"]
        assert "experts" in first["targets"][0]
        assert first["weights"]["num_bits"] in {4 if f == "int4-g32" else 8 for f in routed}


# --- there and back -----------------------------------------------------------------------------------


@dataclass
class Captured:
    """A checkpoint, traced once; ``compiled`` is what an artifact of it holds, without kernels."""

    path: Path
    program: Program
    sources: Mapping[str, Source]
    config: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Captured:
        checkpoint = open_checkpoint(path)
        streamed = checkpoint.stream()
        assert streamed.sources
        program = capture_pretrained(streamed.model, path.name, streamed.sources)
        return cls(path, program, streamed.sources, checkpoint.config)

    def compiled(self, recipe: Recipe) -> tuple[Program, dict[str, Any]]:
        program = self.program.copy()
        run_passes(program, pipeline(recipe))
        return program, json.loads(json.dumps(describe(program, self.sources)))

    def read_from(self, path: Path) -> Captured:
        """The same graph over the weights of another checkpoint, which saves tracing it."""
        checkpoint = open_checkpoint(path)
        sources, program = checkpoint.stream().sources, self.program.copy()
        weights = Weights({})
        for name in self.program.weights:
            if (source := sources.get(name)) is not None:
                parts = {f"{name}.{part}": s for part, s in source.stored.items()}
                for each, s in {name: source, **parts}.items():
                    weights.read(each, s.like, s.whole, s.member)
            else:
                weights.add(name, self.program.weights[name])
        program.weights = weights
        return Captured(path, program, sources, checkpoint.config)


def quiet(what: str, done: int, total: int) -> None: ...


def assert_same_weights(a: Program, b: Program) -> None:
    assert a.used_weights() == b.used_weights()
    for name in a.used_weights():
        if name.endswith(".scale"):
            torch.testing.assert_close(a.weights[name], b.weights[name], rtol=1e-6, atol=0)
        else:
            assert torch.equal(a.weights[name].float(), b.weights[name].float()), name


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Captured]:
    root, made = tmp_path_factory.mktemp("models"), dict[str, Captured]()

    def get(name: str) -> Captured:
        if name not in made:
            pretrained(name).save_pretrained(root / name)
            made[name] = Captured.of(root / name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """DeepSeek-V3 with matrices that FP8 blocks and INT4 groups fit."""
    config = CONFIGS["deepseek_v3"]()
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank"):
        setattr(config, name, 128)
    config.v_head_dim = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    path = tmp_path_factory.mktemp("models") / "blocks"
    model.save_pretrained(path)
    return Captured.of(path)


def exported(model: Captured, out: Path, recipe: Recipe) -> tuple[Program, Plan, dict[str, Any]]:
    program, record = model.compiled(recipe)
    plan = Plan(program, record, model.config)
    out.mkdir()
    return program, plan, write(out, plan, 1 << 40, quiet)


INT4_DENSE = [Rule(match="role:linear", format="int4"), Rule(match="role:head", format="int4")]
TRIPS: dict[str, tuple[str, Recipe]] = {
    "llama-bf16": ("llama", Recipe(weights="bf16", kv="fp32")),
    "llama-rotated": ("llama", Recipe(weights="fp32", kv="fp32", rotate=True)),
    "mixtral-int4": ("mixtral", Recipe(weights="int4", kv="fp32", rules=INT4_DENSE)),
    "qwen3_moe-int8": ("qwen3_moe", Recipe(weights="int8", kv="fp32")),
    "deepseek_v3-int4": ("", Recipe(weights="int4-g128", kv="fp32")),
}


@pytest.mark.parametrize("case", TRIPS)
def test_there_and_back(
    case: str, captured: Callable[[str], Captured], blocks: Captured, tmp_path: Path
) -> None:
    name, recipe = TRIPS[case]
    model = captured(name) if name else blocks
    before, plan, facts = exported(model, tmp_path / "out", recipe)
    assert facts["otherwise"] == []
    assert plan.untied == []
    again = model.read_from(tmp_path / "out")
    after, _ = again.compiled(recipe)
    if not recipe.rotate:  # rotated twice, it is another model of the same function
        assert_same_weights(before, after)
    torch.testing.assert_close(after.run(IDS), before.run(IDS), rtol=1e-4, atol=1e-4)
    narrow = {"int4-g32", "int4-g128", "int8"} & set(facts["formats"])
    assert facts["convention"] == ("compressed-tensors" if narrow else "plain")
    assert len(again.config.get("quantization_config", {}).get("config_groups", ())) == len(narrow)


def test_a_head_in_a_format_of_its_own(captured: Callable[[str], Captured], tmp_path: Path) -> None:
    """Embeddings that were tied to it are no more."""
    recipe = Recipe(weights="int8", kv="fp32")
    before, plan, _ = exported(captured("llama"), tmp_path / "out", recipe)
    assert plan.untied == ["model.embed_tokens.weight"]
    again = Captured.of(tmp_path / "out")
    assert again.config["tie_word_embeddings"] is False
    after, _ = again.compiled(recipe)
    head = "lm_head.weight.int8.q"
    assert torch.equal(after.weights[head], before.weights["model.embed_tokens.weight.int8.q"])
    torch.testing.assert_close(after.run(IDS), before.run(IDS), rtol=1e-4, atol=1e-4)


def test_experts_that_do_not_fit_groups(
    captured: Callable[[str], Captured], tmp_path: Path
) -> None:
    model = captured("qwen3_moe")
    table = Rule(match="role:embedding", format="int8")
    program, record = model.compiled(Recipe(weights="int4", kv="fp32", rules=[table]))
    plan = Plan(program, record, model.config, int8_inputs=True)
    why = {t["reason"]: t["tensors"] for t in plan.otherwise()}
    assert why == {
        "its rows are no whole groups of 32": 16,
        "other experts of its block cannot be quantized": 32,
        "loaders look embeddings up in 16 or 32 bits": 1,
    }
    facts = write(tmp_path, plan, 1 << 40, quiet)
    assert facts["checks"]["tokenmill"]["error_median"] < 0.03
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    group = plan.config["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["strategy"] == "token"
    assert any("one scale a token" in note for note in plan.notes())


def test_fp8_experts_follow_deepseek(blocks: Captured, tmp_path: Path) -> None:
    program, record = blocks.compiled(Recipe(weights="fp8"))
    plan = Plan(program, record, blocks.config)
    facts = write(tmp_path, plan, 1 << 18, quiet)
    assert (facts["convention"], facts["otherwise"]) == ("fp8", [])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    found = {name: t for file in files for name, t in load_file(tmp_path / file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    experts = program.weights["model.layers.1.mlp.experts.gate_up_proj.fp8.q"].view(torch.uint8)
    up = found["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert torch.equal(up.view(torch.uint8), experts[5, len(up) :])
    # The gate's sigmoid and bias: transformers takes them for granted, engines ask.
    assert json.loads((tmp_path / "config.json").read_text())["topk_method"] == "noaux_tc"
    stored = blocks.read_from(tmp_path).sources["model.layers.1.mlp.experts.gate_up_proj"].stored
    assert torch.equal(stored["fp8.q"].whole().view(torch.uint8), experts)


def test_every_map_needs_a_group(blocks: Captured, tmp_path: Path) -> None:
    exported(blocks, tmp_path / "out", Recipe(weights="int4-g128"))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    groups = config["quantization_config"]["config_groups"]
    for target, said in (("re:nothing", "no group"), ("re:(", "no regular expression")):
        groups["group_0"]["targets"] = [target]
        file.write_text(json.dumps(config))
        with pytest.raises(Unsupported, match=said):
            open_checkpoint(file.parent).stream()
    groups["group_0"]["targets"] = ["Linear"]  # after all that are named
    file.write_text(json.dumps(config))
    assert open_checkpoint(file.parent).stream().note == ""


def test_what_is_not_there_is_refused(blocks: Captured) -> None:
    program, record = blocks.compiled(Recipe(weights="bf16"))
    gone = "model.layers.1.self_attn.o_proj.weight"
    rest = [s for s in record["stored"] if s["name"] != gone]
    half = [
        s | {"rows": [[gone, 0, 1, 0, 3]]} if s["name"] == gone else s for s in record["stored"]
    ]
    for stored in (rest, half):
        with pytest.raises(Unsupported, match=re.escape(gone)):
            Plan(program, record | {"stored": stored}, blocks.config)


def test_a_module_has_no_names() -> None:
    bare: Any = SimpleNamespace(
        json=lambda name: {},
        path="model.tm",
        file=lambda name: Path(name),
        manifest=SimpleNamespace(),
    )
    with pytest.raises(Unsupported, match="came as a module"):
        huggingface._source(bare)


def test_from_the_shell(int4_artifact: Path, tmp_path: Path, tiny_deepseek: Path) -> None:
    out = tmp_path / "hf"
    arguments = ["export", str(int4_artifact), "--format", "hf", "-o", str(out), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    manifest = json.loads((out / "export.json").read_text())
    assert json.loads(done.stdout)["files"] == manifest["files"]
    assert {p.name for p in out.iterdir()} - {"export.json"} == set(manifest["files"])
    for name, fact in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == fact["sha256"]
    assert (out / "tokenizer.json").read_bytes() == (tiny_deepseek / "tokenizer.json").read_bytes()
    assert manifest["checks"]["tokenmill"]["top1_agreement"] > 0.9
    assert set(manifest["formats"]) == {"int4-g32", "int8", "bf16", "fp32"}
    with pytest.raises(OutputExists):
        export(int4_artifact, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(OutputForeign):
        export(int4_artifact, tmp_path / "mine", force=True)


def test_what_differs_is_not_kept(
    int4_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = _hf_check.values
    monkeypatch.setattr(
        _hf_check,
        "values",
        lambda t, w: wrong(t, w) + (1 if t.name.endswith("experts.3.down_proj.weight") else 0),
    )
    with pytest.raises(ExportDiffers, match=r"experts\.3\.down_proj"):
        export(int4_artifact, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
