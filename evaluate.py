"""How well an artifact predicts a text, and how far it is from the model that it was made of.

The protocol: the text is tokenized as one sequence, after the model's begin token if it has one,
and cut into windows of ``window`` tokens of which each starts ``stride`` tokens after the last.
Every token is scored exactly once, in the first window that holds it, so all but those of the first
window are predicted from at least ``window - stride`` tokens of context.  Bits per byte is the sum
of ``-log2 p(token)`` over the UTF-8 bytes of the scored text; unlike perplexity it does not depend
on the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
) -> dict[str, float | int]:
    """Score ``text`` (or its token ids); the module's docstring states the protocol.

    Gives ``bits_per_byte``, ``perplexity``, and how many ``tokens`` and ``bytes`` were scored.
    With ``against``, an eager model that maps ids ``[B, T]`` to ``.logits``, also
    ``original_bits_per_byte``, ``kl_mean`` (KL(original || artifact), nats per token),
    ``top1_agreement``, ``max_abs_logit_error``, and for its scale ``logit_spread``, the standard
    deviation of the original's logits.
    """
    window = min(window, session.positions)
    tokens, size = _tokens(session, text)
    score, original, gap = _Score(), _Score(), _Gap()
    cuts = list(windows(len(tokens), window, stride))
    batch = max(1, BATCH_BYTES // (4 * window * session.vocab))
    for at in range(0, len(cuts), batch):
        chosen = cuts[at : at + batch]
        pieces = [tokens[cut.start : cut.stop] for cut in chosen]
        for cut, piece, logits in zip(chosen, pieces, session.logits_of(pieces), strict=True):
            first = cut.scored - cut.start
            rows = slice(first - 1, len(piece) - 1)
            score.add(logits[rows], piece[first:])
            if against is not None:
                eager = _eager_logits(against, piece, session.vocab)
                original.add(eager[rows], piece[first:])
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
    return found | {"original_bits_per_byte": original.bits / size} | gap.result()


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


@dataclass
class _Score:
    """Running sums over scored tokens."""

    bits: float = 0.0
    tokens: int = 0

    def add(self, logits: Logits, targets: Sequence[int]) -> None:
        wanted = np.asarray(targets)
        for block in _blocks(*logits.shape):
            logp = _log_softmax(logits[block])
            nats = -np.take_along_axis(logp, wanted[block, None], -1).sum()
            self.bits += float(nats) / math.log(2)
        self.tokens += len(targets)


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
            logp, logq = _log_softmax(a), _log_softmax(b)
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


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
