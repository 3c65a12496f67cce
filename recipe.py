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

>>> recipe = Recipe(weights="int4", rules=[Rule(match="model.layers.0.*", format="bf16")])
>>> recipe.format_for(["model.layers.1.mlp.experts.down_proj"], "expert")
'int4-g32'
>>> recipe.format_for(["model.layers.0.mlp.down_proj.weight"], "linear")
'bf16'
"""

from __future__ import annotations

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
CacheFormat: TypeAlias = Literal["fp32", "bf16", "int8"]

ROLES: tuple[Role, ...] = get_args(Role)
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
CACHE_FORMATS: tuple[CacheFormat, ...] = get_args(CacheFormat)

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
        _HIGH,
        "embedding rows are looked up, a few bytes a token: little to save, much to lose",
    ),
}


def _unfit(role: str | None, format: WeightFormat) -> str | None:
    """Why weights of this role must not have this format; None if they may."""
    allowed, why = _SENSITIVE.get(role or "", (WEIGHT_FORMATS, ""))
    if format in allowed:
        return None
    return f"role {role} may be {', '.join(allowed[:-1])} or {allowed[-1]} only: {why}"


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


class Recipe(BaseModel):
    """Everything a user may ask of :func:`tokenmill.optimize`; YAML files have the same fields.

    ``max_step_tokens`` and ``max_step_rows`` bound what one step carries: the tokens that go in and
    the rows of logits that come out.  Working memory is planned for them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Weight = "bf16"
    kv: CacheFormat = "bf16"
    rules: Sequence[Rule] = ()
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
            advice = f"use one of {', '.join(_known(str(detail['loc'][-1])))}"
        case "missing":
            reason, advice = "missing", "a rule needs `match` and `format`"
        case "value_error":
            advice = "change or remove this rule"
        case _:
            reason = f"{reason} (found {detail['input']!r})"
            advice = f"the defaults are {Recipe().dump()}"
    return BadRecipe(where=where, reason=reason, advice=advice)


def _known(field: str) -> tuple[str, ...]:
    return CACHE_FORMATS if field == "kv" else WEIGHT_FORMATS


def _location(loc: tuple[int | str, ...]) -> str:
    """('rules', 0, 'format') -> rules[0].format"""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".") or "as a whole"
