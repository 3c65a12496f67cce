"""How well an artifact predicts a text, and how far it is from the model that it was made of.

The protocol: the text is tokenized as one sequence, after the model's begin token if it has one,
and cut into windows of ``window`` tokens of which each starts ``stride`` tokens after the last.
Every token is scored exactly once, in the first window that holds it, so all but those of the first
window are predicted from at least ``window - stride`` tokens of context.  Bits per byte is the sum
of ``-log2 p(token)`` over the UTF-8 bytes of the scored text; unlike perplexity it does not depend
on the tokenizer.

Next to an original, both models score the same windows.  The increase of bits per byte is a ratio of
two sums over windows, the bits ``d`` that the artifact needs more over the bits ``b`` that the
original needs; its standard error is that of a ratio estimator (Cochran, Sampling Techniques, ch. 6),
``sqrt(n / (n - 1) sum (d - r b)^2) / sum b``, so that a loss can be told from the text's own spread.

Continuations: prompts of up to ``PROMPT_TOKENS`` tokens are cut out of the text at regular places, after
the begin token, none overlapping another.  The artifact continues each greedily; the original reads
prompt and continuation once.  It would have written the same up to the first token that is not its
own first choice there, and the number of tokens before that is the agreement of this continuation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import BadRequest
from .runtime import Session

if TYPE_CHECKING:
    from .api import Progress

Logits: TypeAlias = NDArray[np.float32]

BATCH_BYTES = 128 << 20  # of logits that are held at once
BLOCK_VALUES = 1 << 22  # of logits that are worked on at once, in float64
PROMPT_TOKENS = 128


class Window(NamedTuple):
    """Tokens ``start:stop`` go in; of them ``scored:stop`` are scored."""

    start: int
    stop: int
    scored: int


def windows(tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Cut a sequence; its first token has nothing that predicts it.

    >>> [tuple(w) for w in windows(10, window=6, stride=3)]
    [(0, 6, 1), (3, 9, 6), (6, 10, 9)]
    """
    scored, context = 1, max(1, window - stride)
    while scored < tokens:
        start = max(0, scored - context) if scored > 1 else 0
        stop = min(start + window, tokens)
        yield Window(start, stop, scored)
        scored = stop


def evaluate(
    session: Session,
    text: str | Sequence[int],
    against: Any = None,
    window: int = 512,
    stride: int = 256,
    progress: Progress | None = None,
    continuations: int = 0,
    continuation_tokens: int = 64,
) -> dict[str, float | int]:
    """Score ``text`` (or its token ids); the module's docstring states the protocol.

    Gives ``bits_per_byte``, ``perplexity``, and how many ``tokens`` and ``bytes`` were scored.
    With ``against``, an eager model that maps ids ``[B, T]`` to ``.logits``, also:

    - ``original_bits_per_byte``; ``bits_per_byte_increase_percent`` with its
      ``standard_error_percent`` (from two windows on); ``perplexity_increase_percent``;
    - ``kl_mean`` (KL(original || artifact), nats per token), ``top1_agreement``,
      ``max_abs_logit_error``, and for its scale ``logit_spread``, the standard deviation of the
      original's logits;
    - with ``continuations`` prompts of which each is continued by ``continuation_tokens``:
      ``continuations`` (fewer where the text is short), and ``greedy_agreement_mean`` and
      ``greedy_agreement_median``, in tokens that both write alike before the first difference, and
      ``greedy_agreement_to_the_end``, the share of continuations without one.
    """
    window = min(window, session.positions)
    tokens, size = _tokens(session, text)
    score, original, gap, increase = _Score(), _Score(), _Gap(), _Increase()
    cuts = list(windows(len(tokens), window, stride))
    batch = max(1, BATCH_BYTES // (4 * window * session.vocab))
    for at in range(0, len(cuts), batch):
        chosen = cuts[at : at + batch]
        pieces = [tokens[cut.start : cut.stop] for cut in chosen]
        for cut, piece, logits in zip(chosen, pieces, session.logits_of(pieces), strict=True):
            first = cut.scored - cut.start
            rows = slice(first - 1, len(piece) - 1)
            bits = score.add(logits[rows], piece[first:])
            if against is not None:
                eager = _eager_logits(against, piece, session.vocab)
                increase.add(bits, original.add(eager[rows], piece[first:]))
                gap.add(eager[rows], logits[rows])
            if progress:
                progress("evaluate", cut.stop, len(tokens))
    found = {
        "bits_per_byte": score.bits / size,
        "perplexity": 2 ** min(score.bits / score.tokens, 1000.0),  # 2^1024 overflows
        "tokens": score.tokens,
        "bytes": size,
    }
    if against is None:
        return found
    found |= {"original_bits_per_byte": original.bits / size}
    found |= increase.result(score.tokens) | gap.result()
    if continuations:
        new = min(continuation_tokens, session.positions // 2)
        prompts = cut_prompts(session, tokens, continuations, new)
        found |= _agreement(session, against, prompts, new, progress)
    return found


def cut_prompts(session: Session, tokens: Sequence[int], most: int, new: int) -> list[list[int]]:
    """Up to ``most`` prompts with room for ``new`` tokens, from regular places of a text.

    Each begins with the begin token, if the model has one.
    """
    begin = session.begin_tokens
    text = tokens[len(begin) :] if list(tokens[: len(begin)]) == begin else tokens
    room = min(PROMPT_TOKENS, session.positions - new) - len(begin)
    length = max(1, min(room, len(text)))
    count = min(most, max(1, len(text) // length))
    starts = (i * (len(text) - length) // max(1, count - 1) for i in range(count))
    return [begin + list(text[start : start + length]) for start in starts]


def read_text(path: str | Path) -> str:
    """The text of a file; raises BadRequest if it is missing, empty or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        reason, advice = f"cannot read {str(path)!r}: {error.strerror}", "pass a text file"
    except UnicodeDecodeError as error:
        reason = (
            f"{str(path)!r} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
        )
        advice = "convert it, for example with iconv -t UTF-8"
    else:
        if text:
            return text
        reason, advice = f"{str(path)!r} is empty", "pass a file with some text in it"
    raise BadRequest(reason=reason, advice=advice)


def _tokens(session: Session, text: str | Sequence[int]) -> tuple[list[int], int]:
    """The ids to run, and the UTF-8 bytes of those that are scored: all but the first."""
    tokens = session.tokenizer.encode(text) if isinstance(text, str) else list(text)
    begin = session.begin_tokens
    if tokens[: len(begin)] != begin:
        tokens = begin + tokens
    if len(tokens) < 2:
        raise BadRequest(
            reason="the text has no token that another one predicts", advice="pass a longer text"
        )
    unscored = session.tokenizer.decode(tokens[:1])
    whole = text if isinstance(text, str) else session.tokenizer.decode(tokens)
    return tokens, len(whole.encode()) - len(unscored.encode())


def _eager_logits(model: Any, tokens: Sequence[int], vocab: int) -> Logits:
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([list(tokens)])).logits[0].float().numpy()
    if logits.shape[-1] != vocab:
        raise BadRequest(
            reason=f"the original has {logits.shape[-1]} token ids and the artifact {vocab}",
            advice="compare with the model that the artifact was made of",
        )
    return np.asarray(logits, np.float32)


def _agreement(
    session: Session,
    original: Any,
    prompts: Sequence[Sequence[int]],
    new: int,
    progress: Progress | None,
) -> dict[str, float | int]:
    """How long greedy continuations of the prompts stay the same; see the module's docstring."""
    say = progress or (lambda what, done, total: None)
    say("continue", 0, len(prompts))
    alike, whole = [], 0
    for made, prompt in zip(session.generate(prompts, new), prompts, strict=True):
        ids = [*prompt, *made.tokens]
        choices = _eager_logits(original, ids[:-1], session.vocab)[len(prompt) - 1 :].argmax(-1)
        differing = np.flatnonzero(choices != made.tokens)
        alike.append(int(differing[0]) if differing.size else len(made.tokens))
        whole += not differing.size
        say("continue", len(alike), len(prompts))
    return {
        "continuations": len(alike),
        "greedy_agreement_mean": float(np.mean(alike)),
        "greedy_agreement_median": float(np.median(alike)),
        "greedy_agreement_to_the_end": whole / len(alike),
    }


@dataclass
class _Score:
    """Running sums over scored tokens."""

    bits: float = 0.0
    tokens: int = 0

    def add(self, logits: Logits, targets: Sequence[int]) -> float:
        """Count the tokens in; returns their bits."""
        wanted, bits = np.asarray(targets), 0.0
        for block in _blocks(*logits.shape):
            nats = -np.take_along_axis(log_softmax(logits[block]), wanted[block, None], -1).sum()
            bits += float(nats) / math.log(2)
        self.bits += bits
        self.tokens += len(targets)
        return bits


@dataclass
class _Increase:
    """Bits that the artifact and the original need, window by window."""

    windows: list[tuple[float, float]] = field(default_factory=list)

    def add(self, artifact: float, original: float) -> None:
        self.windows.append((artifact, original))

    def result(self, tokens: int) -> dict[str, float | int]:
        ours, theirs = np.array(self.windows).T
        more, count = ours - theirs, len(theirs)
        ratio = more.sum() / theirs.sum()
        found = {
            "bits_per_byte_increase_percent": 100 * float(ratio),
            "perplexity_increase_percent": 100 * (2 ** min(float(more.sum()) / tokens, 1000.0) - 1),
        }
        if count > 1:
            residual = more - ratio * theirs
            error = math.sqrt(count / (count - 1)) * np.linalg.norm(residual) / theirs.sum()
            found["standard_error_percent"] = 100 * float(error)
        return found


@dataclass
class _Gap:
    """Running sums over the differences of two models' logits."""

    kl: float = 0.0
    agreed: int = 0
    worst: float = 0.0
    rows: int = 0
    values: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, original: Logits, artifact: Logits) -> None:
        for block in _blocks(*original.shape):
            a, b = original[block].astype(np.float64), artifact[block]
            logp, logq = log_softmax(a), log_softmax(b)
            self.kl += float((np.exp(logp) * (logp - logq)).sum())
            self.agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
            self.worst = max(self.worst, float(np.abs(a - b).max()))
            self.total += float(a.sum())
            self.squares += float((a * a).sum())
        self.rows += len(original)
        self.values += original.size

    def result(self) -> dict[str, float | int]:
        mean = self.total / self.values
        return {
            "kl_mean": self.kl / self.rows,
            "top1_agreement": self.agreed / self.rows,
            "max_abs_logit_error": self.worst,
            "logit_spread": math.sqrt(max(0.0, self.squares / self.values - mean * mean)),
        }


def _blocks(rows: int, vocab: int) -> Iterator[slice]:
    step = max(1, BLOCK_VALUES // vocab)
    return (slice(at, at + step) for at in range(0, rows, step))


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """In float64; ``logits`` is ``[rows, vocab]``."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
