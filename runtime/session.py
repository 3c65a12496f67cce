"""A session: an artifact in memory, and what one does with it."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .. import errors
from .artifact import Artifact
from .batch import Batch
from .cache import PagePool
from .cpu import CpuExecutor
from .layout import Layout
from .manifest import Target
from .requests import Completion, Request, Scoring
from .sampling import Choices, Sampler, Sampling
from .scheduler import Scheduler
from .tokenizer import TextStream, Tokenizer, special_ids

Prompt: TypeAlias = str | Sequence[int]
DeviceChoice: TypeAlias = Literal["auto", "cpu", "cuda"]
TOKENIZER = "tokenizer/tokenizer.json"


@dataclass(frozen=True)
class Generation:
    """What came of one prompt.

    ``tokens`` are the generated ids, an end token and those of a stop string included; ``text``
    leaves both out.  ``finish_reason`` is ``stop`` at either, or ``length``.  Seconds are
    wall-clock, shared with the other prompts of the call: ``prefill_seconds`` from the call to the
    first token, ``decode_seconds`` from there to the last.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float


class Piece(NamedTuple):
    """One step of a stream: a token, and the text that it completes (often none)."""

    text: str
    token: int


class Executor(Protocol):
    """What runs batches of a model on one device, with a cache of ``pages`` pages."""

    layout: Layout
    target: Target
    pages: int

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits ``[rows, vocab]``, valid until the next run."""

    def time_steps(self, batch: Batch) -> list[float]:
        """Seconds of every step of the plan by itself."""

    def close(self) -> None:
        """Free everything; harmless when repeated."""


@runtime_checkable
class Chooser(Protocol):
    """An executor that chooses tokens where the logits are."""

    def choose(self, batch: Batch, choices: Choices) -> NDArray[np.int32]:
        """A token for each row of logits."""


class Session:
    """An artifact, loaded and ready.  A context manager; one caller at a time.

    ``device`` is where it runs: ``auto`` takes a GPU if the artifact has kernels for one and the machine
    has one.  ``threads`` (of a CPU) default to the cores that the process may use; ``cache_tokens`` is the
    room for all sequences together (default: see runtime.cpu.default_cache_tokens); ``verify`` compares
    every file with its hash first.  Raises what Artifact.open and the executors raise.

    >>> with Session("model.tm") as session:                  # doctest: +SKIP
    ...     print(session.generate("def main():", max_new_tokens=32)[0].text)
    """

    def __init__(
        self,
        artifact: Artifact | str | os.PathLike[str],
        threads: int | None = None,
        cache_tokens: int | None = None,
        verify: bool = True,
        device: DeviceChoice = "auto",
    ) -> None:
        _require_positive("threads", threads)
        _require_positive("cache_tokens", cache_tokens)
        opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact, verify)
        self.artifact = opened
        self._executor: Executor | None = open_executor(opened, device, threads, cache_tokens)
        self._layout = self._executor.layout
        pool = PagePool(self._executor.pages)
        self._scheduler = Scheduler(self._layout.tokens, self._layout.rows, pool)

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self._layout.vocab

    @property
    def positions(self) -> int:
        """The longest sequence, prompt and generated tokens together."""
        return self._layout.positions

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises BadRequest if it has none, or MissingExtra."""
        file = self.artifact.file(TOKENIZER)
        if file is None:
            raise errors.BadRequest(
                reason="the artifact has no tokenizer", advice="pass token ids instead of text"
            )
        return Tokenizer(file)

    @cached_property
    def begin_tokens(self) -> list[int]:
        """The id that opens a text, if the model has one: at most one, from where the ends are."""
        return self._special_ids("bos")[:1]

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a text: of generation_config.json, the plan's meta, or the tokenizer."""
        return frozenset(self._special_ids("eos"))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> list[Generation]:
        """Continue prompts (a text, or texts and lists of token ids), all in the same batches.

        Every prompt gets up to ``max_new_tokens`` tokens, until an end token or a string of
        ``stop``.  An empty one starts from the model's beginning-of-text token, if it has one.
        Temperature 0 is greedy; otherwise see runtime.sampling.Sampling.  Raises PromptTooLong,
        EmptyPrompt, BadToken, BadRequest or OutOfCache before anything is computed.
        """
        start = time.perf_counter()
        how = Sampling(temperature, top_k, top_p, seed)
        work = [
            self._completion(prompt, index, max_new_tokens, how, stop)
            for index, prompt in enumerate(_as_prompts(prompts))
        ]
        for _ in self.drive(work):
            pass
        return [_generation(request, start) for request in work]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Like :meth:`generate` for one prompt, piece by piece; the texts join to its text.

        Errors of the request are raised by the call itself, not by the iterator.
        """
        how = Sampling(temperature, top_k, top_p, seed)
        return self._pieces(self._completion(prompt, 0, max_new_tokens, how, stop))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits ``[len(tokens), vocab]`` of the token after each one, for evaluation.

        Raises what :meth:`generate` raises for the prompt.
        """
        return self.logits_of([tokens])[0]

    def logits_of(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """:meth:`logits` of several sequences, computed in the same batches."""
        work = [
            Scoring(self._checked(tokens, index, new=0), self.vocab)
            for index, tokens in enumerate(sequences)
        ]
        for _ in self.drive(work):
            pass
        return [request.logits for request in work]

    def drive(self, work: Sequence[Request]) -> Generator[None, None, None]:
        """Step until all of ``work`` is done; yields after each step, and cleans up when left.

        For those who bring requests of their own, such as tokenmill.bench, and have checked them.
        """
        self._open_executor()
        try:
            for request in work:
                self._scheduler.add(request)
            while not all(request.done for request in work):
                self._step()
                yield
        finally:
            for request in work:
                self._scheduler.cancel(request)

    def close(self) -> None:
        """Free threads and memory; harmless when repeated."""
        if self._executor:
            self._executor.close()
        self._executor = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _step(self) -> None:
        batch, chunks = self._scheduler.schedule()
        executor = self._open_executor()
        samplers = [chunk.request.sampler for chunk in chunks if chunk.rows]
        if samplers and all(samplers) and isinstance(executor, Chooser):
            tokens = executor.choose(batch, Choices.of([s for s in samplers if s]))
            self._scheduler.accept(chunks, tokens.tolist())
        else:
            self._scheduler.postprocess(chunks, executor.run(batch))

    def _pieces(self, request: Completion) -> Iterator[Piece]:
        for _ in self.drive([request]):
            while request.pieces:
                yield Piece(*request.pieces.popleft())

    def _open_executor(self) -> Executor:
        if self._executor is None:
            raise errors.BadRequest(reason="the session is closed", advice="open a new Session")
        return self._executor

    def _completion(
        self, prompt: Prompt, index: int, new: int, how: Sampling, stop: str | Sequence[str]
    ) -> Completion:
        _require_positive("max_new_tokens", new)
        strings = [stop] if isinstance(stop, str) else list(stop)
        if "" in strings:
            raise errors.BadRequest(reason="a stop string is empty", advice="leave it out")
        tokens = self._checked(prompt, index, new)
        text = self._text_stream(tokens, strings, needed=isinstance(prompt, str) or bool(strings))
        return Completion(tokens, new, Sampler(how, index), self.end_tokens, text)

    def _text_stream(
        self, tokens: Sequence[int], stop: list[str], needed: bool
    ) -> TextStream | None:
        """Who works with ids alone can do without a tokenizer, and then gets no text."""
        try:
            return TextStream(self.tokenizer, tokens, stop)
        except (errors.BadRequest, errors.MissingExtra):
            if needed:
                raise
            return None

    def _checked(self, prompt: Prompt, index: int, new: int) -> list[int]:
        """The token ids of a prompt, if the model can take them and ``new`` more."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _as_ids(prompt)
        if not tokens:
            raise errors.EmptyPrompt(index=index)
        for position, token in enumerate(tokens):
            if not 0 <= token < self.vocab:
                raise errors.BadToken(token=token, position=position, vocab=self.vocab)
        if len(tokens) + new > self.positions:
            raise errors.PromptTooLong(tokens=len(tokens), new=new, limit=self.positions)
        return tokens

    def _special_ids(self, name: str) -> list[int]:
        generation = self.artifact.json("tokenizer/generation_config.json")
        config = self.artifact.json("tokenizer/tokenizer_config.json")
        configs = [generation, self._layout.meta, config]
        return special_ids(name, configs, self.artifact.file(TOKENIZER))


def _generation(request: Completion, start: float) -> Generation:
    first, last = request.times
    return Generation(
        text=request.text.text if request.text else "",
        tokens=request.generated,
        finish_reason=cast('Literal["stop", "length"]', request.finish_reason),
        prompt_tokens=request.prompt_tokens,
        prefill_seconds=first - start,
        decode_seconds=last - first,
    )


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single text or list of ids as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):  # an array or a tensor
        prompts = prompts.tolist()
    try:
        items = list(prompts)
    except TypeError as error:
        raise _not_a_prompt() from error
    if items and not any(isinstance(item, str) or hasattr(item, "__len__") for item in items):
        return [cast("Sequence[int]", items)]
    return cast("list[Prompt]", items)


def _as_ids(tokens: Sequence[int]) -> list[int]:
    try:
        return [int(token.__index__()) for token in tokens]
    except (AttributeError, TypeError) as error:
        raise _not_a_prompt() from error


def _not_a_prompt() -> errors.BadRequest:
    reason = "a prompt is neither a text nor a list of token ids"
    return errors.BadRequest(reason=reason, advice="pass str or whole numbers")


def open_executor(
    artifact: Artifact, device: DeviceChoice, threads: int | None, cache_tokens: int | None
) -> Executor:
    """The executor for ``device``; raises BadRequest for another word, and what executors raise."""
    if device not in ("auto", "cpu", "cuda"):
        raise errors.BadRequest(reason=f"no device {device!r}", advice="use auto, cpu or cuda")
    devices = {target.device for target in artifact.targets}
    if device == "cpu" or (device == "auto" and "cuda" not in devices):
        return CpuExecutor(artifact, threads, cache_tokens)
    # Only who runs on a GPU pays for the import of torch.
    from .cuda import CudaDevice, available
    from .gpu import GpuExecutor

    if device == "auto" and "cpu" in devices:
        if not available():
            return CpuExecutor(artifact, threads, cache_tokens)
        try:
            return GpuExecutor(artifact, CudaDevice(), cache_tokens)
        except errors.ForeignTarget:  # there is a card, of another architecture
            return CpuExecutor(artifact, threads, cache_tokens)
    return GpuExecutor(artifact, CudaDevice(), cache_tokens)


def _require_positive(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise errors.BadRequest(reason=f"{name} is {value}", advice="give a whole number from 1 on")
