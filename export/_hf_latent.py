"""A checkpoint of a model whose attention was made latent, in a class of transformers that has all of it.

Without experts that is DeepSeek-V3, which every loader knows; with them Mistral4, whose router is a softmax.
Attention is what :mod:`._hf_latent_attention` makes of it; the rest keeps its numbers.  Weights that are
quantized in the artifact are written as the numbers that they stand for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import Progress
from ..capture.checkpoint import open_checkpoint
from ..capture.shards import Shards
from ..errors import ArtifactTooOld, ExportDiffers
from ..ir.ops import load_router
from ..ir.program import Program
from ..ir.serialize import DTYPES
from ..passes.base import calls, mill
from ..runtime.tensors import TensorSpec
from . import _hf_check as check
from ._hf_latent_attention import LAYER, attention_of, constant, down, refused, up
from ._hf_tensors import Form, Original, Writable, originals, plain_dtype, values

DENSE, ROUTED = "DeepseekV3ForCausalLM", "Mistral4ForCausalLM"
# Families that are these classes but for attention, and what Mixtral calls otherwise.
_FAMILIES = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings",
    "rms_norm_eps", "hidden_act", "initializer_range",
)  # fmt: skip
_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # which the class would give numbers of its own
_NAMED = 8  # tensors in a list of the manifest


def is_converted(program: Program, config: Mapping[str, Any]) -> bool:
    """Whether its latents are the compiler's doing, and not the model's."""
    return "kv_lora_rank" not in config and any(calls(program, mill.cached_latent_attention))


@dataclass(frozen=True)
class _Made:
    """A tensor of the checkpoint, and those of the artifact that it is made of."""

    shape: tuple[int, ...]
    sources: Sequence[Original]
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    def data(self) -> Tensor:
        return self.compute().to(self.dtype)

    @property
    def formats(self) -> set[str]:
        return {h.use.format for source in self.sources for h in source.holders}


class LatentPlan:
    """Every tensor of the checkpoint, and config.json; what :class:`.huggingface.Plan` is for others.

    ``record`` is what :func:`.parameters.describe` gives, ``config`` the config.json of the original.  Raises
    Unsupported for what the class has no place for, ArtifactTooOld for a record of an earlier version.
    """

    convention = "plain"

    def __init__(
        self, program: Program, record: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        if "made" not in record:
            raise ArtifactTooOld(
                path=program.name, built_by="an earlier version", missing="where latents come from"
            )
        self.family = str(config.get("model_type"))
        if self.family not in _FAMILIES:
            raise refused(
                f"no class with latent attention is laid out like {self.family}", "config.json"
            )
        self.program = program
        self.kind = ROUTED if any(calls(program, mill.route)) else DENSE
        made = record["made"]
        found, self.untied = originals(
            {
                "tensors": record["tensors"] | made["tensors"],
                "stored": record["stored"] + made["stored"],
                "tied": record["tied"],
            }
        )
        self._named = {t.name: t for t in found if t.holders}
        self.attention = attention_of(program)
        self.config = self._config(config)
        self.made = {name: self._make(name, wanted) for name, wanted in self._skeleton().items()}
        self._refuse_left(record["tensors"])

    # --- what it says of itself

    def writables(self) -> Iterator[Writable]:
        for name, made in self.made.items():
            yield Writable(TensorSpec(name, DTYPES[made.dtype], made.shape), made.data)

    def formats(self) -> dict[str, Any]:
        """Tensors and parameters by format."""
        count: Counter[str] = Counter()
        parameters: Counter[str] = Counter()
        for made in self.made.values():
            format = _format(made.dtype)
            count[format] += 1
            parameters[format] += math.prod(made.shape)
        return {f: {"tensors": n, "parameters": parameters[f]} for f, n in sorted(count.items())}

    def otherwise(self) -> list[dict[str, Any]]:
        """What is not in the artifact's format, and why."""
        found: dict[tuple[str, str], list[str]] = {}
        for name, made in self.made.items():
            if made.formats - {"fp32", "bf16"}:
                was = ", ".join(sorted(made.formats))
                found.setdefault((was, _format(made.dtype)), []).append(name)
        reason = f"{self.kind} is written in 16 and 32 bits"
        return [
            {"artifact": was, "checkpoint": now, "reason": reason, "tensors": len(names),
             "names": names[:_NAMED]}
            for (was, now), names in found.items()
        ]  # fmt: skip

    def notes(self) -> list[str]:
        """What a person should know before loading it."""
        latents = self.attention.latents
        notes = [
            f"{self.family} became {self.kind}, whose attention is latent",
            f"its caches hold {latents} + {self.attention.rotary} values per token in every layer: each has "
            f"the largest rank, {latents - 1}, and a latent that is constant",
        ]
        if self.kind == ROUTED:
            notes += [
                f"load it with {self.kind}: AutoModelForCausalLM may not list that class",
                "its shared expert is zero, since the class has one and the model had none",
            ]
        if self.otherwise():
            notes.append("quantized weights are written as the numbers that they stand for")
        tied = "is tied no more: as a head it has another format"
        return notes + [f"{name} {tied}" for name in self.untied]

    def compare(self, stage: Path, say: Progress) -> dict[str, Any]:
        """Measured errors, for the manifest; raises ExportDiffers as :func:`._hf_check.logits` does."""
        checkpoint = open_checkpoint(stage)
        reader = Shards(checkpoint.shards)
        for number, (name, made) in enumerate(self.made.items()):
            if not torch.equal(reader.read(name).float(), made.data().float()):
                raise ExportDiffers(
                    path=self.program.name, reason=f"{name} reads back as other numbers"
                )
            say("comparing", number + 1, len(self.made))
        exact = all(made.formats <= {"fp32"} for made in self.made.values())
        found = {"weights": "every tensor read back equal to what is made of the artifact's"}
        return found | check.logits(checkpoint, self.program, exact, say)

    # --- config.json

    def _config(self, original: Mapping[str, Any]) -> dict[str, Any]:
        layers = original["num_hidden_layers"]
        if (count := len(self.attention.ranks)) != layers:
            raise refused(
                f"{count} of {layers} attentions are latent: {self.kind} has no other", "attention"
            )
        return {
            "architectures": [self.kind],
            "model_type": {DENSE: "deepseek_v3", ROUTED: "mistral4"}[self.kind],
            "dtype": str(self._dtype).removeprefix("torch."),
            **{name: original[name] for name in _KEPT if name in original},
            **{name: original.get(name) for name in _TOKENS},
            "tie_word_embeddings": bool(original.get("tie_word_embeddings")) and not self.untied,
            **self.attention.config(original["max_position_embeddings"], self.kind == ROUTED),
            **self._experts(layers),
        }

    @property
    def _dtype(self) -> torch.dtype:
        """That of most of the checkpoint."""
        layer = f"model.layers.{min(self.attention.ranks)}"
        return _widest(self._of(f"{layer}.self_attn.q_proj.weight.latent"))

    def _experts(self, layers: int) -> dict[str, Any]:
        """Which layers have experts, how many, and how they are chosen."""
        dense = [f"model.layers.{i}.mlp.gate_proj.weight" in self._named for i in range(layers)]
        first = sum(dense)
        if not all(dense[:first]):
            raise refused(
                f"in {self.kind} no layer without experts follows one with them", "config.json"
            )
        if first == layers:
            return {"first_k_dense_replace": layers}
        gate, expert = (
            self._of(self._old_name(f"model.layers.{first}.mlp.{part}.weight"))
            for part in ("gate", "experts.0.gate_proj")
        )
        return {
            "first_k_dense_replace": first,
            "n_routed_experts": gate.shape[0],
            "moe_intermediate_size": expert.shape[0],
            "n_shared_experts": 1,  # of zeros: the class has one, and no quantizer takes none
            **self._routing(),
        }

    def _routing(self) -> dict[str, Any]:
        """The class has a softmax of all scores, or that of those chosen, which is the same renormalised."""
        specs = {load_router(str(node.args[2])) for node in calls(self.program, mill.route)}
        spec = next(iter(specs))
        softmax = (spec.score, spec.after) in {("softmax", "identity"), ("identity", "softmax")}
        # What it adds to a sum of probabilities, fp32 does not show.
        if len(specs) > 1 or not softmax or spec.bias or spec.groups > 1 or spec.epsilon > 1e-9:
            raise refused(
                f"{self.kind} chooses experts by a softmax of their scores alone", "router"
            )
        return {
            "num_experts_per_tok": spec.top_k,
            "norm_topk_prob": spec.renormalize or spec.after == "softmax",
            "routed_scaling_factor": spec.scale,
            "n_group": 1,
            "topk_group": 1,
        }

    # --- tensors

    def _skeleton(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that the class loads."""
        import transformers

        with torch.device("meta"):
            kind = getattr(transformers, self.kind)
            model = kind(kind.config_class(**self.config))
        found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        if self.config["tie_word_embeddings"]:
            del found["lm_head.weight"]
        return found

    def _make(self, name: str, wanted: tuple[int, ...]) -> _Made:
        layer, part = LAYER.match(name), name.split(".", 3)[-1]
        if layer and part.startswith("self_attn."):
            made = self._attended(layer[0], part.removeprefix("self_attn."))
        elif layer and part.startswith("mlp.shared_experts."):
            made = _Made(wanted, (), self._dtype, partial(torch.zeros, wanted))
        elif layer and part.startswith("mlp.experts."):
            made = self._stack(name, wanted[0])
        else:
            source = self._of(self._old_name(name))
            made = _Made(source.shape, (source,), _plain(source), partial(self._values, source))
        if made.shape != wanted:
            raise refused(f"{name} is {list(made.shape)}, in {self.kind} {list(wanted)}", name)
        for source in made.sources:
            source.places()
        return made

    def _stack(self, name: str, count: int) -> _Made:
        """``gate_up_proj`` or ``down_proj`` of all experts of a layer."""
        prefix, last = name.rsplit(".", 1)
        parts = ["down_proj"] if last == "down_proj" else ["gate_proj", "up_proj"]
        names = [f"{prefix}.{e}.{part}.weight" for e in range(count) for part in parts]
        sources = [self._of(self._old_name(n)) for n in names]
        rows, columns = sources[0].shape
        shape = (count, len(parts) * rows, columns)

        def compute() -> Tensor:
            return torch.cat([self._values(s) for s in sources]).reshape(shape)

        return _Made(shape, sources, _plain(sources[0]), compute)

    def _attended(self, layer: str, part: str) -> _Made:
        """A tensor of one layer's attention; ``layer`` is the path of it, with a dot."""
        of = {
            name: self._of(f"{layer}self_attn.{name}")
            for name in (
                "q_proj.weight.latent", "k_proj.weight.latent", "k_proj.weight.rotary",
                "k_proj.weight.w_uk", "v_proj.weight.w_uv", "o_proj.weight",
            )
        }  # fmt: skip
        query, latent, rotary, keys, of_values, output = of.values()
        if (bias := f"{query.name}.bias") in self._named:
            raise refused(f"its queries have a bias, those of {self.kind} none", bias)
        gain = self._of(f"{layer}input_layernorm.weight")
        size, wide = self.attention.latents, _widest(latent)

        def balance() -> tuple[float, float]:
            return constant(self._values(latent), self._values(gain), size)

        def down_bias() -> Tensor:
            bias = torch.zeros(size + rotary.shape[0])
            bias[size - 1] = balance()[0]
            bias[size:] = self._optional(f"{rotary.name}.bias", rotary.shape[0])
            return bias

        def projected() -> Tensor:
            return down(self._values(latent), self._values(rotary), size)

        def lifted() -> Tensor:
            return up(self._values(keys), self._values(of_values), size)

        lines = size + rotary.shape[0]
        if part == "q_proj.weight":
            scale = self.attention.query_scale
            return _Made(query.shape, [query], _widest(query), lambda: self._values(query) * scale)
        if part == "kv_a_proj_with_mqa.weight":
            return _Made((lines, latent.shape[1]), [latent, rotary], wide, projected)
        if part == "kv_a_proj_with_mqa.bias":
            return _Made((lines,), [], wide, down_bias)
        if part == "kv_a_layernorm.weight":
            return _Made((size,), [], wide, lambda: torch.full((size,), balance()[1]))
        if part == "kv_b_proj.weight":
            count = keys.shape[0] * (keys.shape[1] + of_values.shape[1])
            return _Made((count, size), [keys, of_values], _widest(keys), lifted)
        if part == "o_proj.weight":
            return _Made(output.shape, [output], _widest(output), partial(self._values, output))
        assert part == "o_proj.bias", part
        rows, bias = output.shape[0], f"{output.name}.bias"
        return _Made((rows,), [], torch.float32, partial(self._optional, bias, rows))

    def _optional(self, name: str, size: int) -> Tensor:
        """A bias, or none."""
        return self._values(self._named[name]) if name in self._named else torch.zeros(size)

    def _values(self, source: Original) -> Tensor:
        return values(source, self.program.weights)

    def _of(self, name: str) -> Original:
        if name not in self._named:
            raise refused(f"the artifact has no {name}, which {self.kind} needs", name)
        return self._named[name]

    def _old_name(self, name: str) -> str:
        """What the family of the original calls a tensor of the class."""
        if self.family != "mixtral" or ".mlp." not in name:
            return name
        *path, last, _ = name.replace(".mlp.", ".block_sparse_moe.").split(".")
        return ".".join([*path, _MIXTRAL.get(last, last), "weight"])

    def _refuse_left(self, tensors: Mapping[str, Any]) -> None:
        """Raise Unsupported for a tensor of the original that is read, and has no place in the class."""
        used = {source.name for made in self.made.values() for source in made.sources}
        left = [n for n in tensors if n in self._named and n not in used]
        if left:
            raise refused(f"{self.kind} has no place for {left[0]}", left[0])


def _plain(source: Original) -> torch.dtype:
    """That of the checkpoint where it loses nothing, else that of the artifact."""
    return plain_dtype(source, Form(_format(_widest(source))))


def _widest(source: Original) -> torch.dtype:
    """fp32 if any of it is in the artifact, else bf16."""
    wide = any(h.use.format == "fp32" for h in source.holders)
    return torch.float32 if wide else torch.bfloat16


def _format(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16"}.get(dtype, "bf16")
