"""The text that weights are rounded for, and formats are searched with.

It is cut into sequences that are spread evenly over it.  Each begins as a text does for the model, with its
begin token if it has one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import BadRequest
from .evaluate import read_text
from .runtime.tokenizer import Tokenizer, special_ids
from .units import amount

DEFAULT = Path(__file__).parent / "calibration.txt"
LENGTH = 512  # of a sequence, in tokens
FEWEST_TOKENS = 512


@dataclass(frozen=True)
class Text:
    """Token ids, one int64 tensor ``[T]`` per sequence; ``source`` is what a person calls the text."""

    sequences: Sequence[Tensor]
    source: str = "the caller's token ids"
    notes: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ids, which is what a result depends on."""
        ids = torch.cat([torch.tensor([len(s), *s.tolist()]) for s in self.sequences])
        return hashlib.sha256(ids.numpy().tobytes()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says about it."""
        return {
            "source": self.source, "sequences": len(self.sequences), "tokens": self.tokens,
            "sha256_of_ids": self.digest,
        }  # fmt: skip

    def split(self) -> tuple[Text, Text]:
        """Every other sequence here and there: two texts of one kind that share nothing."""
        halves = (self.sequences[0::2], self.sequences[1::2])
        first, second = (Text(half, self.source, self.notes) for half in halves)
        return first, second

    def hold_out(self, every: int = 16, most: int = 24) -> tuple[list[Tensor], list[Tensor]]:
        """Sequences to learn from, and others here and there to judge by: two at the least, if there are."""
        every = max(2, min(every, len(self.sequences) // 2))
        held = set(range(every - 1, len(self.sequences), every)[:most])
        numbered = list(enumerate(self.sequences))
        return [s for i, s in numbered if i not in held], [s for i, s in numbered if i in held]


def read(source: str | None, model: Path, tokens: int, positions: int) -> Text:
    """Up to ``tokens`` tokens of the file ``source`` (None: the text that comes with tokenmill), in
    sequences no longer than ``positions``, by the tokenizer of the checkpoint in ``model``.

    Raises BadRequest if the file cannot be used: missing, empty, not UTF-8, or shorter than 512 tokens.
    """
    tokenizer = model / "tokenizer.json"
    if not tokenizer.is_file():
        raise BadRequest(
            reason=f"calibration needs a tokenizer, and {str(model)!r} has no tokenizer.json",
            advice="save the model's fast tokenizer beside its weights, or use rounding: rtn",
        )
    path = Path(source) if source else DEFAULT
    text = read_text(path)
    if "\0" in text:
        raise BadRequest(
            reason=f"{str(path)!r} is binary, not text", advice="pass a UTF-8 text file"
        )
    ids = Tokenizer(tokenizer).encode(text)
    name = str(path) if source else "the text that comes with tokenmill"
    if len(ids) < FEWEST_TOKENS:
        raise BadRequest(
            reason=f"{name} has {len(ids)} tokens, too few to calibrate with",
            advice=f"pass at least {FEWEST_TOKENS} tokens of the kind of text that the model will see, "
            "better 30,000",
        )
    notes = []
    if len(ids) < tokens:
        notes.append(f"{name} has only {amount(len(ids))} of the {amount(tokens)} tokens asked for")
    return Text(cut(ids, begin_tokens(model), tokens, min(LENGTH, positions)), name, notes)


def cut(ids: Sequence[int], begin: Sequence[int], tokens: int, length: int) -> list[Tensor]:
    """At most ``tokens`` of the ids in sequences of ``length``, evenly spread, each opened by ``begin``.

    >>> [s.tolist() for s in cut(range(10), [99], 6, 3)]
    [[99, 0, 1], [99, 5, 6]]
    """
    ids = list(ids)
    body = length - len(begin)
    count = max(1, min(tokens // length, len(ids) // body))
    starts = [i * len(ids) // count for i in range(count)]
    return [torch.tensor([*begin, *ids[at : at + body]]) for at in starts]


def begin_tokens(model: Path) -> list[int]:
    """The id that opens a text, as a session of the compiled model will use it: at most one."""
    files = ("generation_config.json", "config.json", "tokenizer_config.json")
    configs = [json.loads((model / f).read_bytes()) if (model / f).is_file() else {} for f in files]
    return special_ids("bos", configs, model / "tokenizer.json")[:1]
