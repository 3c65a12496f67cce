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

import json
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

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

# Names of formats that extensions registered, beside WEIGHT_FORMATS.
_ADDED: dict[str, None] = {}

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


def add_format(name: str) -> None:
    """Let recipes name a format that :func:`tokenmill.extend.register_format` adds."""
    _ADDED[name] = None


def allowed(role: str | None) -> tuple[str, ...]:
    """The formats that weights of this role may have."""
    return _SENSITIVE.get(role or "", ((*WEIGHT_FORMATS, *_ADDED), ""))[0]


def _unfit(role: str | None, format: str) -> str | None:
    """Why weights of this role must not have this format; None if they may."""
    formats = allowed(role)
    if format in formats:
        return None
    why = _SENSITIVE[role or ""][1]
    return f"role {role} may be {', '.join(formats[:-1])} or {formats[-1]} only: {why}"


def _spell_out(name: str) -> str:
    if name not in (*WEIGHT_FORMATS, *_ADDED):
        raise PydanticCustomError("unknown_format", "unknown value")
    return "int4-g32" if name == "int4" else name


Weight = Annotated[str, AfterValidator(_spell_out)]


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


class UserPass(BaseModel):
    """A pass of the user's own: ``use`` is its class as ``module:Class``, which is imported.

    It runs right ``before`` or ``after`` the pass of that name; ``options`` are its fields.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    before: str | None = None
    after: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_place(self) -> UserPass:
        if (self.before is None) == (self.after is None):
            raise ValueError("needs one of before and after, with the name of a pass")
        return self


class TileTable(BaseModel):
    """Sizes of kernels that `tokenmill tune` measured for ``target``, or as they come with tokenmill.

    ``tiles`` are, for a kernel and the most rows of a launch, the fields that say how its work is cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    tiles: dict[str, dict[str, dict[str, StrictBool | StrictInt]]]

    @classmethod
    def load(cls, path: str | Path) -> TileTable:
        """Read a JSON file; raises BadRecipe, which names file and field."""
        advice = "pass a file that `tokenmill tune` wrote"
        try:
            return cls.model_validate(json.loads(Path(path).read_bytes()))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        except ValidationError as error:
            detail = error.errors()[0]
            reason = f"is not a table of tiles: {_location(detail['loc'])}: {detail['msg']}"
        except ValueError as error:
            reason = f"is not JSON: {error}"
        raise BadRecipe(where=path, reason=reason, advice=advice)


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

    def less(self, nats: float) -> Budget:
        """What is left once so much of ``max_loss`` is lost."""
        left = max(0.0, (self.nats or 0.0) - nats)
        loss = (
            f"{100 * math.expm1(left):.6f}%" if self.measure == "perplexity" else f"kl={left:.8f}"
        )
        return self.model_copy(update={"max_loss": loss})

    @property
    def memory_bytes(self) -> int | None:
        match = _MEMORY.fullmatch(self.memory or "")
        return match and int(float(match["number"]) * _UNITS[match["unit"].replace("k", "K")])


_PERCENT = re.compile(r"(?P<percent>\d+(\.\d+)?)\s*%")


class KvCompress(BaseModel):
    """Latent attention instead of keys and values per head, with a smaller cache.

    ``save`` is the share of the cache that goes away (``50%``), or ``auto``, the largest that ``max_loss``
    (``1%`` of perplexity, or ``kl=0.01``) allows; a ``rank`` gives the latents per token of every layer
    instead, beside ``rotary`` values that RoPE turns (left out: chosen by measuring).  Afterwards the new
    weights are trained for ``heal_minutes``, or for ``heal_steps``, which gives the same result every time.
    A conversion that loses more than ``max_loss`` is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    save: str | None = None
    rank: int | None = Field(default=None, ge=1, strict=True)
    rotary: int | None = Field(default=None, ge=2, multiple_of=2, strict=True)
    max_loss: str | None = None
    heal_minutes: float = Field(default=10.0, ge=0)
    heal_steps: int | None = Field(default=None, ge=0, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        """``50%``, ``auto`` and a number stand for themselves."""
        if isinstance(data, int):
            return {"rank": data}
        return {"save": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _check(self) -> KvCompress:
        if (self.save is None) == (self.rank is None):
            raise ValueError("kv_compress needs one of save and rank")
        if self.save not in (None, "auto"):
            match = _PERCENT.fullmatch(self.save or "")
            if match is None or not 0 < float(match["percent"]) < 100:
                raise ValueError(f"save {self.save!r} is neither like 50% nor auto")
        if self.max_loss is not None and not _MAX_LOSS.fullmatch(self.max_loss):
            raise ValueError(f"max_loss {self.max_loss!r} is neither like 1% nor like kl=0.01")
        return self

    @property
    def share(self) -> float | None:
        """The share of the cache that goes away, if it is given."""
        match = _PERCENT.fullmatch(self.save or "")
        return match and float(match["percent"]) / 100

    @property
    def limit(self) -> Budget | None:
        """``max_loss`` as a budget."""
        return None if self.max_loss is None else Budget(max_loss=self.max_loss)


class Healing(BaseModel):
    """A training for so many ``minutes``, or for ``steps``, which gives the same result every time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: float = Field(default=10.0, gt=0)
    steps: int | None = Field(default=None, ge=1, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        """A number stands for minutes."""
        number = isinstance(data, int | float) and not isinstance(data, bool)
        return {"minutes": data} if number else data


class Recipe(BaseModel):
    """Everything a user may ask of :func:`tokenmill.optimize`; YAML files have the same fields.

    ``rounding`` is how the stored numbers are chosen: to the nearest (``rtn``), so with INT4 ranges that
    are clipped where that pays (``clip``), or so that outputs change least (``gptq``, the default where
    ``calibration`` names a text or ``budget`` a limit).  The last two measure inputs on
    ``calibration_tokens`` of that text, or of the one that comes with tokenmill.  ``rotate`` and ``balance``
    change the weights before, exactly, so that less is lost: by an orthogonal map of the residual stream, by
    factors that inputs and weights share.  ``heal_scales`` trains the scales of weights in fewer than 8 bits
    afterwards, all together, towards the original's answers on the calibration text.

    ``kv_compress`` turns attention with keys and values per head into latent attention.

    ``extensions`` are modules with formats and kernels of the user's own, imported before the rest is read;
    ``passes`` are passes of the user's own (see :mod:`tokenmill.extend`).

    ``tiles`` are tables that ``tokenmill tune`` wrote, or their files, one for a target.

    ``max_step_tokens`` and ``max_step_rows`` bound what one step carries: the tokens that go in and
    the rows of logits that come out.  Working memory is planned for them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Weight = "bf16"
    kv: CacheFormat = "bf16"
    kv_compress: KvCompress | None = None
    rules: Sequence[Rule] = ()
    rounding: Rounding = "rtn"
    calibration: str | None = None
    calibration_tokens: int = Field(default=32768, ge=1, strict=True)
    rotate: bool = False
    balance: bool = False
    heal_scales: Healing | None = None
    budget: Budget | None = None
    targets: Annotated[Sequence[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = (
        "cpu",
    )
    disable: Sequence[str] = ()
    extensions: Sequence[str] = ()
    passes: Sequence[UserPass] = ()
    tiles: Sequence[TileTable] = ()
    max_step_tokens: int = Field(default=512, ge=1, le=1 << 20, strict=True)
    max_step_rows: int = Field(default=64, ge=1, le=1 << 20, strict=True)

    @field_validator("tiles", mode="before")
    @classmethod
    def _read_tiles(cls, data: Any) -> Any:
        files = [data] if isinstance(data, str | Path) else data
        if not isinstance(files, list | tuple):
            return data
        return [TileTable.load(f) if isinstance(f, str | Path) else f for f in files]

    @model_validator(mode="after")
    def _tiles_are_for_targets(self) -> Recipe:
        tuned = [table.target for table in self.tiles]
        for target in tuned:
            if target not in self.targets:
                known = ", ".join(self.targets)
                raise ValueError(f"a table of tiles is for {target!r}, and the targets are {known}")
            if tuned.count(target) > 1:
                raise ValueError(f"{tuned.count(target)} tables of tiles are for {target!r}")
        return self

    @model_validator(mode="after")
    def _auto_has_a_limit(self) -> Recipe:
        found = self.conversion
        if found is not None and found.save == "auto" and found.max_loss is None:
            raise ValueError("kv_compress: auto needs a max_loss to stay within")
        return self

    @model_validator(mode="after")
    def _a_verdict_is_about_what_was_measured(self) -> Recipe:
        if self.heal_scales is not None and self.budget is not None:
            raise ValueError(
                "heal_scales changes weights after a budget's search has measured them: "
                "search first, then heal with the rules that were found"
            )
        return self

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
    def _extend(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("extensions"), list | tuple):
            for index, name in enumerate(data["extensions"]):
                load_module(name, f"extensions[{index}]")
        return data

    @model_validator(mode="before")
    @classmethod
    def _text_is_to_be_used(cls, data: Any) -> Any:
        wanted = ("calibration", "budget")
        if isinstance(data, dict) and any(data.get(name) is not None for name in wanted):
            return {"rounding": "gptq"} | data
        return data

    @property
    def conversion(self) -> KvCompress | None:
        """``kv_compress``, its loss bounded by the budget: by half of it where it chooses how much."""
        wanted, budget = self.kv_compress, self.budget
        if wanted is None or wanted.max_loss or budget is None or budget.nats is None:
            return wanted
        allowed = budget.less(budget.nats / 2) if wanted.save == "auto" else budget
        return wanted.model_copy(update={"max_loss": allowed.max_loss})

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


def load_module(name: str, where: str) -> Any:
    """Import a module that a recipe names; raises BadRecipe."""
    try:
        return import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            reason = f"there is no module {name!r}"
        else:
            reason = f"importing {name!r} failed: {type(error).__name__}: {error}"
        raise BadRecipe(
            where=where, reason=reason,
            advice="put the directory that it lies in on PYTHONPATH, or install it",
        ) from error  # fmt: skip


def _preset(weights: str, role: Role) -> str:
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


_OWNERS: dict[str, type[BaseModel]] = {
    "rules": Rule,
    "passes": UserPass,
    "budget": Budget,
    "kv_compress": KvCompress,
    "heal_scales": Healing,
    "tiles": TileTable,
}


def _bad_recipe(detail: ErrorDetails) -> BadRecipe:
    where = _location(detail["loc"])
    field = re.split(r"[.\[]", where)[0]
    reason = detail["msg"].removeprefix("Value error, ")
    match detail["type"]:
        case "extra_forbidden":
            owner = _OWNERS.get(field, Recipe)
            reason, advice = "unknown field", f"known fields: {', '.join(owner.model_fields)}"
        case "literal_error" | "unknown_format":
            reason = f"unknown value {detail['input']!r}"
            known = _KNOWN.get(str(detail["loc"][-1]), (*WEIGHT_FORMATS, *_ADDED))
            advice = f"use one of {', '.join(known)}"
            if detail["type"] == "unknown_format":
                advice += "; one of your own is known once its module is among extensions"
        case "missing":
            needs = {"passes": "a pass needs `use`", "tiles": "a table needs `target` and `tiles`"}
            reason, advice = "missing", needs.get(field, "a rule needs `match` and `format`")
        case "value_error":
            advice = "change or remove it"
        case _:
            reason = f"{reason} (found {detail['input']!r})"
            advice = f"the default of {field} is {json.dumps(Recipe().dump()[field])}"
            if field in _OWNERS:
                advice = f"known fields: {', '.join(_OWNERS[field].model_fields)}"
    return BadRecipe(where=where, reason=reason, advice=advice)


def _location(loc: tuple[int | str, ...]) -> str:
    """('rules', 0, 'format') -> rules[0].format"""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".") or "as a whole"
