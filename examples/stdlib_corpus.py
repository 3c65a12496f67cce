"""The text that the tiny example models learn from: Python's own standard library.

It is on every machine that can run the training scripts, so they download nothing.  Whole files
are held out, chosen by a hash of their path: the choice needs no list to be reproduced, and a file
of another Python version stays on the same side of the split.

Other Python versions have other text, so a part of the held-out files is kept in the repository,
with the names and sums of all of them.  `python examples/stdlib_corpus.py` writes both again, and the text
that tokenmill calibrates with by default: of the other files, and of Python's documentation.
"""

import gzip
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ONE_IN = 33
HELD_OUT_FOLDER = Path(__file__).resolve().parent / "tiny_deepseek"
HELD_OUT_LIST = HELD_OUT_FOLDER / "heldout_files.json"
HELD_OUT_TEXT = HELD_OUT_FOLDER / "heldout.txt"
HELD_OUT_TEXT_BYTES = 150_000
CALIBRATION_TEXT = HELD_OUT_FOLDER.parent.parent / "calibration.txt"
CALIBRATION_BYTES = 150_000  # of prose, and as many of code
CALIBRATION_HEADING = (
    "Parts of the documentation and of the standard library of Python, Copyright (c) 2001 Python\n"
    "Software Foundation; All Rights Reserved.  Licensed under the PSF License Agreement.\n\n"
)

# Generated tables (encodings), another project's code (site-packages) and a frozen copy of other
# files (lib2to3) would make the held-out score flatter or less about Python.
_SKIPPED_DIRS = frozenset({"__pycache__", "encodings", "lib2to3", "site-packages"})
# Tests are worth training on, but too repetitive to measure a model by.
_TEST_DIRS = frozenset({"idle_test", "test", "tests"})
# Written when Python is built: it names the machine that built it.
_BUILD_RECORD_PREFIX = "_sysconfigdata"


@dataclass(frozen=True)
class SourceFile:
    """One module of the standard library; `name` is its path below the library's root."""

    name: str
    text: str

    @property
    def data(self) -> bytes:
        return self.text.encode("utf-8")

    @property
    def is_test(self) -> bool:
        return not _TEST_DIRS.isdisjoint(self.name.split("/"))


@dataclass(frozen=True)
class Corpus:
    """The files to train on and the files to measure on; no text is in both."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]


def _source_files() -> Iterator[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_DIRS & set(relative.parts) or path.name.startswith(_BUILD_RECORD_PREFIX):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue
        if text:
            yield SourceFile(relative.as_posix(), text)


def _is_held_out(file: SourceFile) -> bool:
    if file.is_test:
        return False
    digest = hashlib.sha256(file.name.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def load_corpus() -> Corpus:
    """Reads the running Python's standard library and splits it by file."""
    files = tuple(_source_files())
    held_out = tuple(file for file in files if _is_held_out(file))
    held_out_texts = {file.text for file in held_out}
    train = tuple(file for file in files if file.text not in held_out_texts)
    return Corpus(train, held_out)


def train_tokenizer(files: Sequence[SourceFile], max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every byte is a token, so that any text comes back exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (file.text for file in files),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(
    tokenizer: PreTrainedTokenizerFast, files: Sequence[SourceFile]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """All files one after another, each opened by the end-of-text token."""
    pieces: list[list[int]] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch([file.text for file in files]):
        pieces += [[tokenizer.eos_token_id], encoding.ids]
    return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])


def gzip_bits_per_byte(files: Sequence[SourceFile]) -> tuple[float, float]:
    """What `gzip -9` needs: file by file, and over all the files as one stream."""

    def bits(data: bytes) -> int:
        return 8 * len(gzip.compress(data, compresslevel=9, mtime=0))

    total = sum(len(file.data) for file in files)
    each = sum(bits(file.data) for file in files)
    return each / total, bits(b"".join(file.data for file in files)) / total


def _describe(held_out: Sequence[SourceFile]) -> dict[str, dict[str, int | str]]:
    return {
        file.name: {"bytes": len(file.data), "sha256": hashlib.sha256(file.data).hexdigest()}
        for file in held_out
    }


def is_listed_split(held_out: Sequence[SourceFile]) -> bool:
    """Whether these are, byte for byte, the held-out files that the repository lists."""
    return bool(json.loads(HELD_OUT_LIST.read_text())["files"] == _describe(held_out))


def committed_text() -> SourceFile:
    """The held-out text that is in the repository: the same on every machine."""
    return SourceFile(HELD_OUT_TEXT.name, HELD_OUT_TEXT.read_bytes().decode("utf-8"))


def _write_held_out() -> None:
    held_out = load_corpus().held_out
    chosen: list[SourceFile] = []
    for file in held_out:
        if sum(len(other.data) for other in chosen) < HELD_OUT_TEXT_BYTES:
            chosen.append(file)
    HELD_OUT_TEXT.write_bytes(b"".join(file.data for file in chosen))
    record = {
        "python": platform.python_version(),
        "in_heldout_txt": [file.name for file in chosen],
        "files": _describe(held_out),
    }
    HELD_OUT_LIST.write_text(json.dumps(record, indent=2) + "\n")


def _write_calibration() -> None:
    """Topics and modules in turn, whole, as many as fit; evenly chosen over the alphabet."""
    code = [f for f in load_corpus().train if not f.is_test and len(f.data) < 12_000]
    prose = [SourceFile(name, text + "\n\n") for name, text in sorted(topics.items())]
    texts = zip(_evenly(prose), _evenly(code), strict=False)
    CALIBRATION_TEXT.write_text(CALIBRATION_HEADING + "".join(a.text + b.text for a, b in texts))


def _evenly(files: Sequence[SourceFile]) -> list[SourceFile]:
    step = max(1, sum(len(file.data) for file in files) // CALIBRATION_BYTES)
    return list(files[::step])


if __name__ == "__main__":
    _write_held_out()
    _write_calibration()
