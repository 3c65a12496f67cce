"""The command line: ``tokenmill optimize | run | eval | bench | tune | inspect | export | verify | doctor``.

A command prints for people, or with ``--json`` exactly one JSON object, on standard output;
progress, logs and errors go to standard error.  Exit status: 0 done, 1 a defect of tokenmill (or of
the kernels, for ``verify``), 2 bad input (with the remedy), 130 interrupted.  What needs torch is
imported by the commands that need it, so that ``run`` and ``--help`` start at once.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from . import __version__
from .console import answering, bench_view, facts_view, pairs, progress_bar, steps_view, tune_view
from .errors import BadRequest

if TYPE_CHECKING:
    from .api import Progress
    from .recipe import Recipe
    from .runtime import Artifact

app = typer.Typer(
    name="tokenmill",
    help="Compile a language model ahead of time, and run what comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Dir = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact that `optimize` wrote.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where it runs; auto: on a GPU if there is one that it was compiled for."),
]
Extension = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="Import it for kernels of your own; repeatable."),
]
ConfigOnly = Annotated[
    bool,
    typer.Option("--config-only", help="A config.json is enough: no weights are looked for."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def main() -> None:
    """The entry point: a kill cleans up like Ctrl-C does, and libraries' warnings are not shown."""
    signal.signal(signal.SIGTERM, _terminated)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    app(prog_name="tokenmill")


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


# --- commands -------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tokenmill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def optimize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint directory or a hub id.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where the artifact goes.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compile for: cpu (this machine), sm_80, sm_89, sm_90, sm_100, sm_120, "
            "cpu-x86-64-v3, ...; repeatable. Default: cpu."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Format of the weights: fp32, bf16, int8, int4 (or int4-g32, -g64, -g128), fp8. "
            "Default: bf16.",
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT", help="Format of the cache: fp32, bf16, int8, fp8. Default: bf16."
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="How weights are rounded: rtn (to the nearest), clip, gptq. Default: gptq with "
            "--calibration or a budget, else rtn.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text like what the model will see; rounding is fitted to it.",
        ),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Spread outliers by an exact rotation before rounding.")
    ] = False,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance", help="Scale channels by their activations before rounding (AWQ)."
        ),
    ] = False,
    heal_scales: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0.0,
            help="After rounding, train the scales of 4-bit weights for this many minutes.",
        ),
    ] = None,
    kv_compress: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|RANK",
            help="Make attention latent: 50% saves half of the cache; or a rank; or auto, with --max-loss.",
        ),
    ] = None,
    heal_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0.0,
            help="How long --kv-compress trains its weights. Default: 10.",
        ),
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            metavar="LOSS",
            help="Find the smallest formats within this loss on unseen text: 1% of perplexity, or kl=0.01.",
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Find the best formats that fit, weights and cache together: 24GiB.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens in the cache of a --memory-budget. Default: 4096.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="GOAL", help="Within --max-loss, least size or most speed. Default: size."
        ),
    ] = None,
    tiles: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE", help="Sizes of kernels that `tune` measured; one table for a target."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML recipe; the options above override it."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run the model before and after every pass.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")
    ] = False,
    config_only: ConfigOnly = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the artifact at DIR if there is one.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Compile MODEL into the artifact DIR.

    Weights go into formats that are safe by default: with --weights int4 only the routed experts
    get four bits, and what loses most (the router, W_UK and W_UV, norms, embeddings) stays high.
    """
    with answering(as_json) as answer:
        if config_only and not dry_run:
            raise BadRequest(
                reason="an artifact needs weights, and --config-only looks for none",
                advice="add --dry-run, or leave out --config-only",
            )
        if output is None and not dry_run:
            raise BadRequest(reason="no output directory", advice="pass -o DIR, or --dry-run")
        budget = _given(
            max_loss=max_loss, memory=memory_budget, context=context, objective=objective
        )
        compress = _given(heal_minutes=heal_minutes)
        if kv_compress is not None:
            rank = int(kv_compress) if kv_compress.isdigit() else None
            compress |= {"rank": rank, "save": kv_compress if rank is None else None}
        wanted = _recipe(
            recipe, budget, compress, weights=weights, kv=kv, targets=target, rounding=rounding,
            calibration=calibration, rotate=rotate or None, balance=balance or None,
            heal_scales=heal_scales, tiles=tiles,
        )  # fmt: skip
        from . import api

        with progress_bar() as progress:
            compiled = api.optimize(
                model,
                None if dry_run else output,
                recipe=wanted,
                check=check,
                dry_run=dry_run,
                config_only=config_only,
                force=force,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        path = None if dry_run else str(output)
        answer.data = _public(compiled.facts) | {"path": path, "recipe": compiled.recipe.dump()}
        answer.shown = facts_view(compiled.facts)
        answer.shown.append(f"\nwould write {output}" if dry_run and output else "")
        if path:
            answer.shown.append(f"wrote {path} (open {path}/report.html for the details)")


@app.command()
def run(
    directory: Dir,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample among this many of the likeliest tokens; 0: all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Sample among the likeliest tokens that together have this probability.",
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling: the same seed gives the same text.")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; repeatable.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text with the artifact DIR.

    The text appears as it is generated.  With --json: text, tokens, finish_reason, prompt_tokens
    and the seconds that prefill and decoding took.
    """
    with answering(as_json) as answer:
        from .runtime import Session

        how: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "stop": stop or (),
        }
        with Session(directory, device=device) as session:
            if as_json:
                answer.data = asdict(session.generate(prompt, **how)[0])
                return
            for piece in session.stream(prompt, **how):
                answer.stdout.write(piece.text)
                answer.stdout.flush()
            answer.stdout.write("\n")


@app.command("eval")
def eval_(
    directory: Dir,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="UTF-8 text that the model never saw.")
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original: compare with it, run eagerly in fp32."),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are run together.")] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from one window to the next.")] = 256,
    continuations: Annotated[
        int, typer.Option(min=0, help="With --against: how many prompts both continue; 0: none.")
    ] = 16,
    continuation_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens of each continuation.")
    ] = 64,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure how well the artifact DIR predicts a text.

    Gives bits per byte and perplexity; with --against also their increase and its standard error, the
    KL divergence from the original, how often both choose the same token, the largest error of a
    logit, and for how many tokens greedy continuations of the text stay the same.
    """
    with answering(as_json) as answer:
        from .evaluate import evaluate, read_text
        from .runtime import Session

        words = read_text(text)
        with Session(directory, device=device) as session, progress_bar() as progress:
            original = None
            if against is not None:
                from . import api

                original = api.original(against, trust_remote_code=trust_remote_code)
            answer.data = evaluate(
                session,
                words,
                original,
                window,
                stride,
                progress,
                continuations,
                continuation_tokens,
            )
        answer.shown = [pairs({name: f"{value:.6g}" for name, value in answer.data.items()})]


@app.command()
def bench(
    directory: Dir,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original: run it eagerly in bf16, taking turns."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after it.")] = 128,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Also decode this many sequences at once.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: the cores that this process may use.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds, after one to warm up.")] = 5,
    steps: Annotated[
        bool, typer.Option("--steps", help="Instead, time every kernel by itself.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure how fast the artifact DIR runs on this machine.

    Gives tokens/s of the prompt and of decoding, with the GB/s that decoding reads and its fraction
    of this machine's read bandwidth, peak memory and the time to load; all medians over rounds.
    """
    if steps:
        return _bench_steps(directory, prompt, threads, as_json)
    with answering(as_json) as answer:
        from .bench import bench as measure

        with progress_bar() as progress:
            answer.data = measure(
                directory,
                against,
                prompt=prompt,
                tokens=tokens,
                batch=batch,
                threads=threads,
                repeat=repeat,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        answer.shown = bench_view(answer.data)


def _bench_steps(directory: Path, prompt: int, threads: int | None, as_json: bool) -> None:
    with answering(as_json) as answer:
        from .profiling import profile

        answer.data = profile(directory, prompt, threads)
        answer.shown = steps_view(answer.data)


@app.command()
def tune(
    directory: Dir,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="TABLE", help="The table. Default: tiles-TARGET.json."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only kernels whose names contain this text.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="About how long to measure. Default: until everything is measured."
        ),
    ] = None,
    extension: Extension = None,
    as_json: Json = False,
) -> None:
    """Find the sizes with which the kernels of the artifact DIR are fastest on this machine's GPU.

    What is faster goes into TABLE, for `tokenmill optimize --tiles TABLE`; entries that it has stay, so that
    the command goes on where it was.
    """
    with answering(as_json) as answer:
        from .tune import tune as measure

        with progress_bar() as progress:
            answer.data = measure(directory, output, only, seconds, extension or (), progress)
        answer.shown = tune_view(answer.data)


@app.command()
def inspect(
    subject: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="An artifact, or a model to look into.")
    ],
    graph: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Print the graph at this stage.")
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Print the kernels' sources.")] = False,
    config_only: ConfigOnly = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show what an artifact is made of, or what would become of a model.

    Sizes, passes, formats, kernels and the steps that are left to torch.  For a MODEL the compiler
    runs without writing anything.
    """
    with answering(as_json) as answer:
        with progress_bar() as progress:
            found = _look_into(subject, trust_remote_code, progress, config_only)
        answer.data = _public(found.facts)
        answer.shown = facts_view(found.facts)
        if graph is not None:
            if graph not in found.graphs:
                stages = ", ".join(found.graphs)
                raise BadRequest(reason=f"no stage {graph!r}", advice=f"use one of {stages}")
            answer.data["graph"] = found.graphs[graph]
            answer.shown = [found.graphs[graph]]
        if kernels:
            answer.data["sources"] = found.sources
            answer.shown = [f"// {name}\n{text}" for name, text in found.sources.items()]


@app.command()
def export(
    directory: Dir,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Where the export goes.")
    ],
    format: Annotated[
        Literal["onnx", "hf"],
        typer.Option(help="onnx: for onnxruntime; hf: a checkpoint for transformers and others."),
    ],
    provider: Annotated[
        Literal["cpu", "cuda"],
        typer.Option(help="Execution provider of onnxruntime that the model is for."),
    ] = "cpu",
    activations: Annotated[
        Literal["int8", "fp32"],
        typer.Option(
            help="What ONNX kernels on a CPU may round the inputs of INT4 and INT8 weights to."
        ),
    ] = "int8",
    int8_inputs: Annotated[
        bool,
        typer.Option(
            "--int8-inputs",
            help="In a checkpoint: engines are to round the inputs of INT8 matrices to INT8 (W8A8).",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the export at OUT if there is one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the model of the artifact DIR for another engine.

    The result is run and compared with the artifact before it takes its place; OUT/export.json says what was
    measured, and the hash of every file.
    """
    with answering(as_json) as answer, progress_bar() as progress:
        if format == "onnx":
            from .export import onnx

            answer.data = onnx.export(
                directory, output, force=force, provider=provider, activations=activations,
                progress=progress,
            )  # fmt: skip
        else:
            from .export import huggingface

            answer.data = huggingface.export(
                directory, output, force=force, int8_inputs=int8_inputs, progress=progress
            )
        size = sum(file["bytes"] for file in answer.data["files"].values())
        answer.shown = [*answer.data["notes"], f"wrote {output}, {size:,} bytes (see export.json)"]


@app.command()
def verify(
    directory: Dir,
    extension: Extension = None,
    as_json: Json = False,
) -> None:
    """Prove that the artifact DIR is whole and that its kernels come from its plan.

    Every file is compared with its hash, and every kernel is emitted again and compared.  The exit
    status is 1 if the files are whole but this version of tokenmill emits other kernels.
    """
    with answering(as_json) as answer:
        from . import api

        found = api.verify(directory, extension or ())
        answer.data = found
        answer.shown = [pairs({name: str(value) for name, value in found.items()})]
    if not found["reproducible"]:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can build and run, and how to get what is missing."""
    with answering(as_json) as answer:
        from .doctor import diagnose, view

        answer.data = diagnose()
        answer.shown = view(answer.data)


# --- helpers --------------------------------------------------------------------------------------


def _recipe(
    file: Path | None, budget: Mapping[str, Any], compress: Mapping[str, Any], **options: Any
) -> Recipe:
    """The recipe of a file, with the options that were given in its place."""
    from .recipe import Recipe

    base = Recipe.load(file).model_dump(mode="json", exclude_unset=True) if file else {}
    if budget:
        options["budget"] = {**(base.get("budget") or {}), **budget}
    if compress:
        options["kv_compress"] = {**(base.get("kv_compress") or {}), **compress}
    return Recipe.model_validate(base | _given(**options))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class _Subject:
    """What one can see of a compiled model: facts, graphs by stage, kernel sources by file."""

    facts: Mapping[str, Any]
    graphs: Mapping[str, str]
    sources: Mapping[str, str]


def _look_into(
    subject: str, trust_remote_code: bool, progress: Progress | None, config_only: bool = False
) -> _Subject:
    from .runtime import Artifact

    if (Path(subject) / "manifest.json").exists():
        return _artifact_subject(Artifact.open(subject))
    from . import api

    compiled = api.optimize(
        subject,
        dry_run=True,
        config_only=config_only,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return _Subject(compiled.facts, compiled.graphs, compiled.sources)


def _artifact_subject(artifact: Artifact) -> _Subject:
    if not artifact.manifest.report:
        raise BadRequest(
            reason=f"{str(artifact.path)!r} was written without a report",
            advice="compile the model again: tokenmill optimize MODEL -o DIR",
        )
    names = sorted(artifact.manifest.files)
    texts = {
        name: (artifact.path / name).read_text("utf-8")
        for name in names
        if name.startswith("graphs/") or (name.startswith("kernels/") and not _is_binary(name))
    }
    graphs = {Path(n).stem: text for n, text in texts.items() if n.startswith("graphs/")}
    sources = {name: text for name, text in texts.items() if name.startswith("kernels/")}
    return _Subject(artifact.manifest.report, graphs, sources)


def _is_binary(name: str) -> bool:
    return name.endswith((".so", ".cubin"))


def _public(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without the drawing, which only the HTML report uses."""
    return {name: value for name, value in facts.items() if name != "layer"}
