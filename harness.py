"""Artifacts for lm-eval, EleutherAI's lm-evaluation-harness: its tasks, run by a Session.

``pip install 'tokenmill[lm-eval]'``, and then::

    from lm_eval import simple_evaluate
    from tokenmill.harness import TokenmillLM

    found = simple_evaluate(model=TokenmillLM("model.tm"), tasks=["arc_easy", "gsm8k"], limit=100)

Texts become tokens as in lm-eval's own adapter for transformers, so that figures can be compared:
context and continuation are tokenized together and split where the context ends, what is too long
loses its beginning, and a document is scored in windows of all the model's positions, of which only
the last looks back.  :class:`Adapter` does the work and does not need lm-eval.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from .errors import BadRequest, BadToken, MissingExtra
from .evaluate import log_softmax, windows
from .runtime import Session
from .runtime.requests import Logits, Request
from .runtime.session import DeviceChoice

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    LM = object

    def register_model(*names: str) -> Any:
        return lambda kind: kind


T = TypeVar("T")
Ids: TypeAlias = Sequence[int]
Likelihood: TypeAlias = tuple[float, bool]

BATCH = 64  # requests that are given to the session at once
NEW_TOKENS = 256  # where a task does not say how many
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LOG = logging.getLogger(__name__)


class Asked(Protocol):
    """A request of lm-eval, an ``Instance``: all that is used of it."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Pair(NamedTuple):
    """A continuation to be scored after a context of at least one token."""

    context: Ids
    continuation: Ids


class Scoring(Request):
    """Scores ``continuations`` that share all tokens but their last, ``ids``.

    The last ``n`` rows of logits predict a continuation of ``n`` tokens; no others are computed, and
    none is kept.  ``found`` has the log likelihood in nats of each, and whether greedy decoding gives it.
    """

    def __init__(self, ids: Ids, continuations: Sequence[Ids]) -> None:
        super().__init__(ids, limit=len(ids))
        self.found: list[Likelihood] = [(0.0, True)] * len(continuations)
        self._continuations = [np.asarray(c) for c in continuations]
        self._first = len(ids) - max(map(len, continuations))

    @property
    def done(self) -> bool:
        return not self.pending

    def fitting(self, tokens: int, rows: int) -> int:
        return min(self.pending, tokens, self._unwanted + rows)

    def rows(self, count: int) -> range:
        return range(min(self._unwanted, count), count)

    @property
    def _unwanted(self) -> int:
        """Pending tokens whose logits predict nothing."""
        return max(0, self._first - self.computed)

    def take(self, logits: Logits) -> None:
        at = self.computed - len(logits)
        logp, best = log_softmax(logits), logits.argmax(-1)
        for index, continuation in enumerate(self._continuations):
            start = len(self.tokens) - len(continuation)
            rows = np.arange(max(at, start), self.computed)
            wanted = continuation[rows - start]
            nats, greedy = self.found[index]
            nats += float(logp[rows - at, wanted].sum())
            self.found[index] = nats, greedy and bool((best[rows - at] == wanted).all())

    def accept(self, tokens: Sequence[int]) -> None:
        raise TypeError("scoring needs logits")


class Wish(NamedTuple):
    """How a task wants texts to be continued."""

    new: int
    stop: tuple[str, ...]
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, settings: Mapping[str, Any], positions: int) -> Wish:
        """A task's ``generation_kwargs``; raises BadRequest for what a session cannot do.

        >>> Wish.of({"until": "\\n", "max_gen_toks": 8, "do_sample": False}, positions=1024)
        Wish(new=8, stop=('\\n',), temperature=0.0, top_k=0, top_p=1.0)
        """
        left = dict(settings)
        until = left.pop("until", None) or []
        limits = [left.pop(name) for name in _LIMITS if left.get(name) is not None]
        new = int(limits[0]) if limits else min(NEW_TOKENS, positions // 2)
        temperature = left.pop("temperature", None)
        sampled = left.pop("do_sample", None)
        if sampled is None:
            sampled = bool(temperature)
        top_k, top_p = left.pop("top_k", None), left.pop("top_p", None)
        neutral = {"num_beams": 1, "repetition_penalty": 1.0}
        if odd := [f"{k}={v!r}" for k, v in left.items() if v is not None and neutral.get(k) != v]:
            raise BadRequest(
                reason=f"a task asks for {', '.join(odd)}",
                advice="choose another task, or override with generation_kwargs of until, max_gen_toks, "
                "do_sample, temperature, top_k and top_p",
            )
        if not 0 < new < positions:
            raise BadRequest(
                reason=f"a task asks for {new} new tokens, and the model has {positions} positions",
                advice="pass gen_kwargs='max_gen_toks=...' with a smaller number",
            )
        return cls(
            new,
            tuple(s for s in ([until] if isinstance(until, str) else until) if s),
            (1.0 if temperature is None else float(temperature)) if sampled else 0.0,
            int(top_k or 0),
            1.0 if top_p is None else float(top_p),
        )


class Adapter:
    """Answers the three kinds of requests that lm-eval makes.

    ``session`` is an open Session, or the path of an artifact, with the options of one.  A text begins
    with the model's begin token if the tokenizer puts one there, or as ``add_bos_token`` says.
    ``truncated`` counts the requests that lost their beginning.  Raises BadRequest if the artifact has
    no tokenizer.
    """

    def __init__(
        self,
        session: Session | str | os.PathLike[str],
        batch_size: int | str = BATCH,
        seed: int = 0,
        add_bos_token: bool | None = None,
        device: DeviceChoice = "auto",
        threads: int | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        if not isinstance(session, str | os.PathLike):
            self.session = session
        else:
            self.session = Session(session, threads, cache_tokens, device=device)
        try:
            self._tokenizer = self.session.tokenizer
        except BadRequest as error:
            raise BadRequest(
                reason=f"{error.message}, and lm-eval's tasks are texts",
                advice="compile it again from a checkpoint directory that holds tokenizer.json",
            ) from None
        self.truncated = 0
        self._batch = BATCH if batch_size == "auto" else int(batch_size)
        self._seed = seed
        begin = self.session.begin_tokens
        if add_bos_token is None:
            add_bos_token = self._tokenizer.encode("")[:1] == begin
        self._opening = begin if add_bos_token else []
        self._prefix = begin or sorted(self.session.end_tokens)[:1]

    # --- what lm-eval calls ---

    def loglikelihood(
        self, requests: Sequence[Asked], disable_tqdm: bool = False
    ) -> list[Likelihood]:
        """Of each (context, continuation): log likelihood in nats, and whether greedy decoding gives it."""
        pairs = [self.pair(*request.args) for request in requests]
        return self._score(pairs, "loglikelihood", disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Asked], disable_tqdm: bool = False
    ) -> list[float]:
        """The log likelihood in nats of each (text,), from its first token on."""
        owners, pairs = list[int](), list[Pair]()
        for owner, request in enumerate(requests):
            tokens = self._prefixed(self._bare(request.args[0]))
            for pair in rolling(tokens, self.session.positions):
                owners.append(owner)
                pairs.append(pair)
        totals = [0.0] * len(requests)
        found = self._score(pairs, "loglikelihood_rolling", disable_tqdm)
        for owner, (nats, _) in zip(owners, found, strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: Sequence[Asked], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each (context, generation_kwargs), up to the first of its stop strings."""
        groups: dict[Wish, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[Wish.of(request.args[1], self.session.positions)].append(index)
        texts = [""] * len(requests)
        for wish, indices in groups.items():
            room = self.session.positions - wish.new
            for batch in self._batches(indices, f"generate_until {wish.new}", disable_tqdm):
                prompts = [self._cut(self.encode(requests[i].args[0]), room) for i in batch]
                for index, text in zip(batch, self._continued(prompts, wish), strict=True):
                    texts[index] = text
        self._say_truncated(len(requests))
        return texts

    # --- texts to tokens ---

    def encode(self, text: str) -> list[int]:
        """Token ids after what the tokenizer puts before a text, or after the prefix if there is none."""
        ids = self._bare(text)
        ids = ids if ids[: len(self._opening)] == self._opening else self._opening + ids
        return ids or self._prefixed(ids)

    def pair(self, context: str, continuation: str) -> Pair:
        """The tokens of both; spaces at the end of the context go with the continuation."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not continuation:
            return Pair(self.encode(context), [])
        if not kept:
            whole, split = self._prefixed(self._bare(continuation)), 1
        else:
            whole = self.encode(kept + continuation)
            split = min(len(self.encode(kept)), len(whole) - 1)  # a token may span the border
        if not split:
            whole, split = self._prefixed(whole), 1
        return Pair(whole[:split], whole[split:])

    def _bare(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)

    def _prefixed(self, ids: list[int]) -> list[int]:
        """The ids after a token that the first of them can be predicted from."""
        if not self._prefix:
            raise BadRequest(
                reason="a task has an empty context, and the model no begin or end token to start from",
                advice="choose another task, or give generation_config.json a bos_token_id",
            )
        return ids if ids[:1] == self._prefix else self._prefix + ids

    # --- running ---

    def _score(self, pairs: Sequence[Pair], what: str, quiet: bool) -> list[Likelihood]:
        """Log likelihoods of continuations; those that differ in the last token only are run once."""
        positions = self.session.positions
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        found: list[Likelihood] = [(0.0, True)] * len(pairs)
        for index, (context, continuation) in enumerate(pairs):
            if len(continuation) > positions:
                raise BadRequest(
                    reason=f"a continuation has {len(continuation)} tokens, and the model {positions} "
                    "positions",
                    advice="choose a task with shorter texts",
                )
            if continuation:
                alike[tuple(self._cut([*context, *continuation][:-1], positions))].append(index)
        for batch in self._batches(list(alike), what, quiet):
            work = [Scoring(ids, [pairs[i].continuation for i in alike[ids]]) for ids in batch]
            for _ in self.session.drive(work):
                pass
            for ids, scoring in zip(batch, work, strict=True):
                for index, answer in zip(alike[ids], scoring.found, strict=True):
                    found[index] = answer
        self._say_truncated(len(pairs))
        return found

    def _continued(self, prompts: Sequence[Ids], wish: Wish) -> list[str]:
        new, stop, temperature, top_k, top_p = wish
        self._seed += 1  # a prompt that comes again is another sample
        made = self.session.generate(prompts, new, temperature, top_k, top_p, self._seed, stop)
        return [one.text for one in made]

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The last ``room`` of the ids; raises BadToken for one that the model does not know."""
        self.truncated += len(ids) > room
        kept = ids[-room:]
        if (highest := max(kept)) >= self.session.vocab:
            position = kept.index(highest)
            raise BadToken(token=highest, position=position, vocab=self.session.vocab)
        return kept

    def _batches(self, items: Sequence[T], what: str, quiet: bool) -> Iterator[Sequence[T]]:
        from tqdm import tqdm

        with tqdm(total=len(items), desc=what, disable=quiet) as bar:
            for at in range(0, len(items), self._batch):
                batch = items[at : at + self._batch]
                yield batch
                bar.update(len(batch))

    def _say_truncated(self, requests: int) -> None:
        if self.truncated:
            _LOG.warning(
                "%d requests so far were longer than the %d positions and lost their beginning "
                "(the last call had %d requests)", self.truncated, self.session.positions, requests,
            )  # fmt: skip


def rolling(tokens: Ids, positions: int) -> Iterator[Pair]:
    """Windows that together score all but the first token once, each with as much before as fits.

    >>> for pair in rolling(range(11), positions=4):
    ...     print(list(pair.context), list(pair.continuation))
    [0] [1, 2, 3, 4]
    [4] [5, 6, 7, 8]
    [6, 7, 8] [9, 10]
    """
    for cut in windows(len(tokens), positions + 1, positions):
        start = max(0, cut.stop - positions - 1)
        yield Pair(tokens[start : cut.scored], tokens[cut.scored : cut.stop])


@register_model("tokenmill")
class TokenmillLM(Adapter, LM):
    """An artifact as a model of lm-eval, also under the name ``tokenmill`` once this is imported.

    Arguments are those of :class:`Adapter`; lm-eval's ``model_args`` call the artifact ``path``.  Raises
    MissingExtra without lm-eval, and what Session raises.
    """

    def __init__(self, path: Session | str | os.PathLike[str], **options: Any) -> None:
        if LM is object:
            raise MissingExtra(package="lm-eval", purpose="its tasks", extra="lm-eval")
        LM.__init__(self)
        Adapter.__init__(self, path, **options)
