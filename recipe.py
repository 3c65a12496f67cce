"""What the user asks for: a typed recipe, in Python or YAML.

A preset gives every weight a format by its *role*; rules change single weights.  The presets keep
high what is small and sensitive, and save where most of the bytes are:

=========  ======  =============  ===============  =========  ============
weights    expert  linear         head, latent_up  embedding  router, norm
=========  ======  =============  ===============  =========  ============
int4[-gG]  int4    int8           int8             bf16       fp32
int8       int8    int8           int8             bf16       fp32
fp8        fp8     fp8            bf16             bf16       fp32
bf16       bf16    bf16           bf16             bf16       fp32
fp32       fp32    fp32           fp32             fp32       fp32
=========  ======  =============  ===============  =========  ============

Only a rule puts embeddings in INT8.

>>> recipe = Recipe(weights="int4", rules=[Rule(match="model.layers.0.*", format="bf16")])
>>> recipe.format_for(["model.layers.1.mlp.experts.down_proj"], "expert")
'int4-g32'
>>> recipe.format_for(["model.layers.0.mlp.down_proj.weight"], "linear")
'bf16'
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from .errors import BadRecipe

Role: TypeAlias = Literal["embedding", "head", "linear", "expert", "router", "latent_up", "norm"]
WeightFormat: TypeAlias = Literal[
    "fp32", "bf16", "int8", "int4", "int4-g32", "int4-g64", "int4-g128", "fp8"
]
CacheFormat: TypeAlias = Literal["fp32", "bf16", "int8", "fp8"]

Rounding: TypeAlias = Literal["rtn", "clip", "gptq"]
Objective: TypeAlias = Literal["size", "speed"]

ROLES: tuple[Role, ...] = get_args(Role)
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
CACHE_FORMATS: tuple[CacheFormat, ...] = get_args(CacheFormat)
# The values of fields that name one of a few, other than the formats of weights.
_KNOWN: dict[str, tuple[str, ...]] = {
    "kv": CACHE_FORMATS,
    "rounding": get_args(Rounding),
    "objective": get_args(Objective),
}

_HIGH: tuple[WeightFormat, ...] = ("fp32", "bf16")
# What these roles may be, whatever a rule says, and why.
_SENSITIVE: dict[str, tuple[tuple[WeightFormat, ...], str]] = {
    "router": (_HIGH, "a rounded gate sends tokens to other experts"),
    "norm": (_HIGH, "norm weights scale whole rows and are too few to save anything"),
    "latent_up": (
        (*_HIGH, "int8"),
        "W_UK and W_UV enter every attention score and lose far more than 4 or 8 floating bits save",
    ),
    "embedding": (
        (*_HIGH, "int8"),
        "embedding rows are looked up, a few bytes a token: little to save, much to lose",
    ),
}


def allowed(role: str | None) -> tuple[WeightFormat, ...]:
    """The formats that weights of this role may have."""
    return _SENSITIVE.get(role or "", (WEIGHT_FORMATS, ""))[0]


def _unfit(role: str | None, format: WeightFormat) -> str | None:
    """Why weights of this role must not have this format; None if they may."""
    formats = allowed(role)
    if format in formats:
        return None
    why = _SENSITIVE[role or ""][1]
    return f"role {role} may be {', '.join(formats[:-1])} or {formats[-1]} only: {why}"


def _spell_out(name: WeightFormat) -> WeightFormat:
    return "int4-g32" if name == "int4" else name


Weight = Annotated[WeightFormat, AfterValidator(_spell_out)]


class Rule(BaseModel):
    """The format of the weights that ``match`` names.

    ``match`` is a pattern over parameter names of the checkpoint (``model.layers.0.*``), or
    ``role:`` and a role (``role:expert``).  The first rule that matches wins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = Field(min_length=1)
    format: Weight

    @model_validator(mode="after")
    def _check_role(self) -> Rule:
        role = self.role
        if role is not None and role not in ROLES:
            raise ValueError(f"unknown role {role!r}: one of {', '.join(ROLES)}")
        if why := _unfit(role, self.format):
            raise ValueError(why)
        return self

    @property
    def role(self) -> str | None:
        """The role that this rule is about, if it is about a role."""
        return self.match.removeprefix("role:") if self.match.startswith("role:") else None

    def applies(self, names: Sequence[str], role: Role) -> bool:
        if self.role is not None:
            return self.role == role
        return any(fnmatchcase(name, self.match) for name in names)


_MAX_LOSS = re.compile(r"(?P<percent>\d+(\.\d+)?)\s*%|kl\s*=\s*(?P<kl>\d+(\.\d+)?(e-?\d+)?)")
_MEMORY = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kKMGT]?i?B)")
_UNITS = {
    f"{p}{i}B": b**n for i, b in (("", 1000), ("i", 1024)) for n, p in enumerate(("", *"KMGT"))
}


class Budget(BaseModel):
    """What may be lost or spent; formats are searched for within it, and ``Recipe.rules`` found.

    ``max_loss`` is a rise of perplexity on held-out text (``1%``) or a mean KL divergence in nats
    (``kl=0.01``); ``memory`` (``24GiB``) holds the weights and the cache of ``context`` tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_loss: str | None = None
    memory: str | None = None
    context: int = Field(default=4096, ge=1)
    objective: Objective = "size"

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if self.max_loss is None and self.memory is None:
            raise ValueError("a budget needs max_loss or memory")
        if self.max_loss is not None and not _MAX_LOSS.fullmatch(self.max_loss):
            raise ValueError(f"max_loss {self.max_loss!r} is neither like 1% nor like kl=0.01")
        if self.memory is not None and self.memory_bytes is None:
            raise ValueError(f"memory {self.memory!r} is not like 24GiB or 800MB")
        return self

    @property
    def measure(self) -> Literal["perplexity", "kl"]:
        """What ``max_loss`` bounds."""
        return "kl" if (self.max_loss or "").startswith("kl") else "perplexity"

    @property
    def nats(self) -> float | None:
        """The loss per token that may be added: of the log likelihood, or as KL divergence."""
        match = _MAX_LOSS.fullmatch(self.max_loss or "")
        if match is None:
            return None
        if match["kl"]:
            return float(match["kl"])
        return math.log1p(float(match["percent"]) / 100)

    @property
    def memory_bytes(self) -> int | None:
        match = _MEMORY.fullmatch(self.memory or "")
        return match and int(float(match["number"]) * _UNITS[match["unit"].replace("k", "K")])


class Recipe(BaseModel):
    """Everything a user may ask of :func:`tokenmill.optimize`; YAML files have the same fields.

    ``rounding`` is how the stored numbers are chosen: to the nearest (``rtn``), so with INT4 ranges that
    are clipped where that pays (``clip``), or so that outputs change least (``gptq``, the default where
    ``calibration`` names a text or ``budget`` a limit).  The last two measure inputs on
    ``calibration_tokens`` of that text, or of the one that comes with tokenmill.  ``rotate`` and ``balance``
    change the weights before, exactly, so that less is lost: by an orthogonal map of the residual stream, by
    factors that inputs and weights share.

    ``max_step_tokens`` and ``max_step_rows`` bound what one step carries: the tokens that go in and
    the rows of logits that come out.  Working memory is planned for them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Weight = "bf16"
    kv: CacheFormat = "bf16"
    rules: Sequence[Rule] = ()
    rounding: Rounding = "rtn"
    calibration: str | None = None
    calibration_tokens: int = Field(default=32768, ge=1, strict=True)
    rotate: bool = False
    balance: bool = False
    budget: Budget | None = None
    targets: Annotated[Sequence[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = (
        "cpu",
    )
    disable: Sequence[str] = ()
    max_step_tokens: int = Field(default=512, ge=1, le=1 << 20, strict=True)
    max_step_rows: int = Field(default=64, ge=1, le=1 << 20, strict=True)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, build: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """Turn pydantic's report into the one error that users of tokenmill know."""
        try:
            return build(data)
        except ValidationError as error:
            raise _bad_recipe(error.errors()[0]) from None

    @model_validator(mode="before")
    @classmethod
    def _text_is_to_be_used(cls, data: Any) -> Any:
        wanted = ("calibration", "budget")
        if isinstance(data, dict) and any(data.get(name) is not None for name in wanted):
            return {"rounding": "gptq"} | data
        return data

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file; a mistake in it is a :class:`BadRecipe` that names file and field."""
        data = _read_yaml(Path(path))
        try:
            return cls.model_validate(data)
        except BadRecipe as error:
            raise BadRecipe(**error.facts | {"where": f"{path}, {error.facts['where']}"}) from None

    def dump(self) -> dict[str, Any]:
        """The canonical form, all fields spelled out: equal recipes give equal dicts."""
        return self.model_dump(mode="json")

    def format_for(self, names: Sequence[str], role: Role) -> str:
        """The format of a weight that comes from the original parameters ``names``."""
        for index, rule in enumerate(self.rules):
            if not rule.applies(names, role):
                continue
            if why := _unfit(role, rule.format):
                raise BadRecipe(
                    where=f"rules[{index}]",
                    reason=f"{rule.match!r} puts {names[0]} in {rule.format}: {why}",
                    advice="narrow the pattern, or put before it a rule with match: role:"
                    f"{role} and format: fp32 or bf16",
                )
            return rule.format
        return _preset(self.weights, role)


def _preset(weights: WeightFormat, role: Role) -> str:
    """The table at the head of this file."""
    if weights == "fp32":
        return "fp32"
    match role:
        case "router" | "norm":
            return "fp32"
        case "embedding":
            return "bf16"
        case "expert":
            return weights
        case "linear":
            return "int8" if weights.startswith("int4") else weights
        case "head" | "latent_up":
            return "int8" if weights.startswith("int") else "bf16"


# --- reading, and saying what is wrong ------------------------------------------------------------


def _read_yaml(path: Path) -> Any:
    try:
        data = yaml.safe_load(path.read_bytes())
    except OSError as error:
        reason, advice = f"cannot be read: {error.strerror}", "pass the path of a YAML file"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = f"is not YAML: {' '.join(str(error).split())}"
        advice = "write it as `field: value` lines"
    else:
        if isinstance(data, dict):
            return data
        reason = "is empty" if data is None else f"holds a {type(data).__name__}, not fields"
        advice = "write at least one `field: value` line, such as `weights: int4`"
    raise BadRecipe(where=path, reason=reason, advice=advice)


def _bad_recipe(detail: ErrorDetails) -> BadRecipe:
    where = _location(detail["loc"])
    reason = detail["msg"].removeprefix("Value error, ")
    match detail["type"]:
        case "extra_forbidden":
            owner = Rule if where.startswith("rules[") else Recipe
            reason, advice = "unknown field", f"known fields: {', '.join(owner.model_fields)}"
        case "literal_error":
            reason = f"unknown value {detail['input']!r}"
            advice = f"use one of {', '.join(_KNOWN.get(str(detail['loc'][-1]), WEIGHT_FORMATS))}"
        case "missing":
            reason, advice = "missing", "a rule needs `match` and `format`"
        case "value_error":
            advice = "change or remove it"
        case _:
            reason = f"{reason} (found {detail['input']!r})"
            advice = f"the defaults are {Recipe().dump()}"
    return BadRecipe(where=where, reason=reason, advice=advice)


def _location(loc: tuple[int | str, ...]) -> str:
    """('rules', 0, 'format') -> rules[0].format"""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".") or "as a whole"
