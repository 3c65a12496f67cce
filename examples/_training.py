"""Training, measuring and saving, shared by the example models' `train.py`.

The schedule follows the clock: the learning rate falls to zero over `--minutes` however fast the
machine is, so that a run always ends with a finished model.
"""

import argparse
import copy
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from stdlib_corpus import (
    Corpus,
    SourceFile,
    committed_text,
    gzip_bits_per_byte,
    is_listed_split,
    load_corpus,
    token_stream,
    train_tokenizer,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TRAIN_LENGTH = 512
# A few steps on the longest window teach the positions that the usual steps never reach.
LONG_STEP_EVERY = 16
WARM_UP = 0.03
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0
LOG_EVERY_STEPS = 20
# The fastest of the implementations in transformers on a processor, once compiled.
EXPERTS = "grouped_mm"

EVAL_WINDOW = 512
EVAL_CONTEXT = 256
EVAL_BATCH = 8
# Enough text for a trend while training; the score that is written down is over all of it.
QUICK_EVAL_BYTES = 40_000

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
TRAINING_RECORD = "training.json"
# Fine-grained sums: the router compares scores that differ by less than a bfloat16 step.
_KEPT_IN_FP32 = "e_score_correction_bias"


AfterStep = Callable[[float], None]


@dataclass(frozen=True)
class Score:
    """Bits per UTF-8 byte of held-out text, by the model and by `gzip -9`."""

    bytes: int
    tokens: int
    model_bits_per_byte: float
    gzip_each_file_bits_per_byte: float
    gzip_concatenated_bits_per_byte: float


@dataclass(frozen=True)
class Recipe:
    """What one example adds to the common training loop.

    `prepare` gets the new model and returns what to run after every optimizer step, with the
    learning rate as a fraction of its peak.  `router_aux_loss` adds the model's own load-balancing
    loss, for routers that are not balanced otherwise.
    """

    folder: Path
    config: PreTrainedConfig
    peak_learning_rate: float
    prepare: Callable[[PreTrainedModel], AfterStep] = lambda model: lambda rate: None
    router_aux_loss: bool = False


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _nll_bits(model: PreTrainedModel, ids: Tensor, first_scored: Tensor) -> float:
    """Bits that a batch of windows costs; each window is scored from its own position on."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    position = torch.arange(1, ids.shape[1]).expand(ids.shape[0], -1)
    scored = position >= first_scored[:, None]
    return float(nll.view_as(scored)[scored].double().sum()) / math.log(2)


@torch.inference_mode()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, files: Sequence[SourceFile]
) -> Score:
    """Scores every token of every file exactly once.

    A file is read after one end-of-text token, in windows of EVAL_WINDOW tokens.  The first window
    is scored whole; each later one starts EVAL_CONTEXT tokens before the first token it scores.
    """
    windows: dict[int, list[tuple[list[int], int]]] = {}
    tokens = 0
    for file in files:
        ids = [tokenizer.eos_token_id, *tokenizer.backend_tokenizer.encode(file.text).ids]
        tokens += len(ids) - 1
        scored = 1
        while scored < len(ids):
            start = max(0, scored - EVAL_CONTEXT)
            window = ids[start : start + EVAL_WINDOW]
            windows.setdefault(len(window), []).append((window, scored - start))
            scored = start + len(window)
    bits = 0.0
    for same_length in windows.values():
        for i in range(0, len(same_length), EVAL_BATCH):
            batch = same_length[i : i + EVAL_BATCH]
            bits += _nll_bits(
                model,
                torch.tensor([window for window, _ in batch]),
                torch.tensor([first for _, first in batch]),
            )
    total = sum(len(file.data) for file in files)
    return Score(total, tokens, bits / total, *gzip_bits_per_byte(files))


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a bfloat16 checkpoint; every file appears whole or not at all."""
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    for name, tensor in model.named_buffers():
        if name.endswith(_KEPT_IN_FP32):
            router = narrow.get_submodule(name.removesuffix(f".{_KEPT_IN_FP32}"))
            setattr(router, _KEPT_IN_FP32, tensor.float().clone())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        narrow.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name in CHECKPOINT_FILES:
            os.replace(Path(temporary) / name, folder / name)
    sums = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in CHECKPOINT_FILES
    ]
    (folder / "SHA256SUMS").write_text("".join(sums))


def _batch(stream: Tensor, tokens: int, length: int) -> Tensor:
    starts = torch.randint(len(stream) - length, (tokens // length,))
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def _optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def _learning_rate_fraction(elapsed: float) -> float:
    """Linear warm-up, then linear decay to zero; `elapsed` is the fraction of the time used."""
    return max(0.0, min(elapsed / WARM_UP, (1.0 - elapsed) / (1.0 - WARM_UP)))


def _train(
    recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> tuple[PreTrainedModel, int]:
    """Returns the trained model and the number of tokens it saw."""
    files = [file for file in corpus.train if not (args.without_tests and file.is_test)]
    stream = torch.from_numpy(token_stream(tokenizer, files))
    _say(f"{len(files)} training files, {len(stream)} tokens")
    options = {"dtype": torch.float32}
    if hasattr(recipe.config, "num_experts_per_tok"):
        options["experts_implementation"] = EXPERTS
    if args.start_from is None:
        model = AutoModelForCausalLM.from_config(recipe.config, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.start_from, **options)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    _say(f"{sum(p.numel() for p in model.parameters())} parameters")
    after_step = recipe.prepare(model)
    optimizer = _optimizer(model, args.learning_rate)
    sample: list[SourceFile] = []
    for file in corpus.held_out:
        if sum(len(other.data) for other in sample) < QUICK_EVAL_BYTES:
            sample.append(SourceFile(file.name, file.text[: QUICK_EVAL_BYTES // 4]))

    def loss_of(ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(
                input_ids=ids,
                use_cache=False,
                output_router_logits=recipe.router_aux_loss,
            )
        loss = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        if recipe.router_aux_loss:
            return loss, loss + recipe.config.router_aux_loss_coef * output.aux_loss
        return loss, loss

    compiled = torch.compile(loss_of, dynamic=False)
    # Both shapes are compiled before the clock starts.
    long_length = recipe.config.max_position_embeddings
    for length in (TRAIN_LENGTH, long_length):
        compiled(_batch(stream, args.batch_tokens, length))[1].backward()
    optimizer.zero_grad()
    after_step(0.0)
    _say("compiled")

    begin = last_save = time.monotonic()
    step = 0
    average = math.nan
    while (elapsed := (time.monotonic() - begin) / (60 * args.minutes)) < 1:
        rate = _learning_rate_fraction(elapsed)
        for group in optimizer.param_groups:
            group["lr"] = rate * args.learning_rate
        step += 1
        length = long_length if step % LONG_STEP_EVERY == 0 else TRAIN_LENGTH
        ids = _batch(stream, args.batch_tokens, length)
        loss, objective = compiled(ids)
        objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        after_step(rate)
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        if step % LOG_EVERY_STEPS == 0:
            speed = step * args.batch_tokens / (time.monotonic() - begin)
            _say(f"step {step}  {100 * elapsed:.1f}%  loss {average:.3f}  {speed:.0f} tokens/s")
        if time.monotonic() - last_save > 60 * args.save_every_minutes:
            last_save = time.monotonic()
            _save(model, tokenizer, args.work_dir)
            _say(f"held-out sample: {score(model, tokenizer, sample).model_bits_per_byte:.3f} bpb")
    return model, step * args.batch_tokens


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The saved checkpoint, its bfloat16 weights widened to float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _evaluate(folder: Path, corpus: Corpus) -> dict[str, object]:
    model, tokenizer = load(folder)
    return {
        "python": platform.python_version(),
        "files_are_the_listed_ones": is_listed_split(corpus.held_out),
        "held_out_files": asdict(score(model, tokenizer, corpus.held_out)),
        "heldout_txt": asdict(score(model, tokenizer, [committed_text()])),
    }


def run(recipe: Recipe, *, description: str | None) -> None:
    """The command line of a `train.py`: trains a checkpoint, or measures the one there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint and stop")
    parser.add_argument("--output", type=Path, default=recipe.folder, help="checkpoint folder")
    parser.add_argument("--minutes", type=float, default=55.0, help="length of the training")
    parser.add_argument("--threads", type=int, default=1, help="processor threads to use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="a multiple of 2048")
    parser.add_argument("--learning-rate", type=float, default=recipe.peak_learning_rate)
    parser.add_argument("--start-from", type=Path, help="checkpoint to train further")
    parser.add_argument("--without-tests", action="store_true", help="train on no test files")
    parser.add_argument("--save-every-minutes", type=float, default=5.0)
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / recipe.folder.name,
        help="where unfinished checkpoints are kept",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus = load_corpus()
    if args.evaluate:
        print(json.dumps(_evaluate(args.output, corpus), indent=2))
        return
    torch.manual_seed(args.seed)
    started_from = None
    if args.start_from is None:
        tokenizer = train_tokenizer(corpus.train, recipe.config.max_position_embeddings)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.start_from)
        started_from = json.loads((args.start_from / TRAINING_RECORD).read_text())
    model, tokens = _train(recipe, corpus, tokenizer, args)
    _save(model, tokenizer, args.work_dir)
    record = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{_processor()}, {args.threads} thread(s)",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": args.minutes,
        "batch_tokens": args.batch_tokens,
        "peak_learning_rate": args.learning_rate,
        "without_tests": args.without_tests,
        "seed": args.seed,
        "training_tokens": tokens,
        "evaluation": _evaluate(args.work_dir, corpus),
        "started_from": started_from,
    }
    (args.work_dir / TRAINING_RECORD).write_text(json.dumps(record, indent=2) + "\n")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in (*CHECKPOINT_FILES, "SHA256SUMS", TRAINING_RECORD):
        shutil.copy2(args.work_dir / name, args.output / f"{name}.new")
        os.replace(args.output / f"{name}.new", args.output / name)
    _say(json.dumps(record, indent=2))
