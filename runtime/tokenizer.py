"""Text to token ids and back, through the `tokenizers` library, imported when text is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

BROKEN = "\ufffd"  # what a decoder writes for bytes that are not UTF-8, or not yet
LONGEST_HOLD = 3  # bytes of an unfinished UTF-8 character
CONTEXT = 8  # tokens decoded before the new ones: some decoders treat a text's first token apart


class Tokenizer:
    """``tokenizer.json`` at ``path``; raises MissingExtra without the library, or TokenizerDamaged."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise errors.MissingExtra(package="tokenizers", purpose="text", extra="hf") from error
        try:
            self._library: Library = Library.from_file(str(path))
        except Exception as error:  # the library has no type of its own for it
            raise errors.TokenizerDamaged(file=str(path), reason=str(error)) from error

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that the model expects around a text unless ``special``."""
        return list(self._library.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._library.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """Text of a growing list of tokens, in pieces that stay as they are.

    A piece never ends within a UTF-8 character, nor within what may become one of the strings
    ``stop``; at a stop string the text ends before it.  ``text`` is all pieces so far, and
    continues the text of ``prompt`` exactly.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._held = ""
        self._window = list(prompt[-CONTEXT:])
        self._seen = len(tokenizer.decode(self._window).rstrip(BROKEN))

    def push(self, token: int) -> str:
        """The piece that ``token`` completes, often empty while it is the start of something."""
        self._window.append(token)
        decoded = self._tokenizer.decode(self._window)
        whole = max(self._seen, len(decoded.rstrip(BROKEN)), len(decoded) - LONGEST_HOLD)
        fresh = decoded[self._seen : whole]
        self._seen = whole
        if len(self._window) > 2 * CONTEXT:
            self._slide()
        return self._emit(fresh, last=False)

    def flush(self) -> str:
        """What is still held back when no token follows; a broken character shows as U+FFFD."""
        return self._emit(self._tokenizer.decode(self._window)[self._seen :], last=True)

    def _slide(self) -> None:
        """Forget all but the last tokens, so that a step costs the same however long the text.

        Not while they decode to broken characters, which more context might mend.
        """
        context = self._window[-CONTEXT:]
        decoded = self._tokenizer.decode(context)
        if BROKEN not in decoded:
            self._window, self._seen = context, len(decoded)

    def _emit(self, fresh: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + fresh
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        held = 0 if self.stopped or last else _overlap(text, self._stop)
        piece, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += piece
        return piece


def _overlap(text: str, stop: Iterable[str]) -> int:
    """Length of the longest end of ``text`` with which a stop string begins."""
    sizes = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(sizes, default=0)


def special_ids(
    name: str, configs: Sequence[Mapping[str, Any]], tokenizer_json: Path | None
) -> list[int]:
    """The ids of the special token ``name`` (``bos``, ``eos``); empty if there is none.

    The first config with ``eos_token_id`` (an id or several) decides; else one that has the token
    as text, ``eos_token``, whose id is looked up among the added tokens of tokenizer.json.

    >>> special_ids("eos", [{}, {"eos_token_id": [2, 3]}, {"eos_token_id": 9}], None)
    [2, 3]
    """
    for config in configs:
        listed = config.get(f"{name}_token_id")
        if listed is not None:
            return [listed] if isinstance(listed, int) else list(listed)
    for config in configs:
        token = config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content and tokenizer_json:
            added = json.loads(tokenizer_json.read_bytes()).get("added_tokens", [])
            return [fact["id"] for fact in added if fact["content"] == content]
    return []
