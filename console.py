"""How commands talk: one answer on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich import progress
from rich.console import Console, RenderableType
from rich.table import Table

from .errors import TokenmillError
from .units import amount, ratio, seconds, size

if TYPE_CHECKING:
    from .api import Progress


class Answer:
    """What a command says: ``data`` with --json, else ``shown``; ``stdout`` takes streamed text."""

    def __init__(self, stdout: TextIO) -> None:
        self.stdout = stdout
        self.data: dict[str, Any] = {}
        self.shown: list[RenderableType] = []


@contextmanager
def answering(as_json: bool) -> Iterator[Answer]:
    """Print the answer at the end, or the error.  What libraries print meanwhile goes to stderr."""
    answer = Answer(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield answer
    except TokenmillError as error:
        if as_json:
            print(json.dumps({"error": error.message, "remedy": error.advice}))
        _complain(error)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(answer.data, allow_nan=False))
        return
    console = Console(highlight=False, markup=False)
    for shown in answer.shown:
        console.print(shown, soft_wrap=isinstance(shown, str))


def _complain(error: TokenmillError) -> None:
    console = Console(stderr=True, highlight=False, markup=False)
    parts = (("error", "bold red", error.message), ("remedy", "bold", error.advice))
    for label, style, text in parts:
        if text:
            console.print(f"{label}: ", style=style, end="")
            console.print(text, soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callback that draws a bar of what is being done; in a log, a line for each thing that begins."""
    console = Console(stderr=True)
    if not console.is_terminal:
        begun: set[str] = set()

        def log(what: str, done: int, total: int) -> None:
            if what not in begun:
                begun.add(what)
                print(what, file=sys.stderr, flush=True)

        yield log
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("start", total=None)

        def report(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield report


# --- views ----------------------------------------------------------------------------------------


def pairs(values: Mapping[str, str]) -> Table:
    """Names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        table.add_row(name.replace("_", " "), value)
    return table


def facts_view(facts: Mapping[str, Any]) -> list[RenderableType]:
    """What was, or would be, done to a model: sizes, passes, kernels."""
    searched = search_view(facts["search"]) if facts.get("search") else []
    fitted = _fitted(facts["calibration"]) if facts.get("calibration") else []
    compressed = _compressed(facts["kv_compress"]) if facts.get("kv_compress") else []
    return [
        "",
        _sizes(facts),
        *compressed,
        *fitted,
        *_healed(facts.get("heal_scales")),
        *searched,
        "",
        _passes(facts),
        "",
        _kernels(facts),
    ]


def _compressed(found: Mapping[str, Any]) -> list[RenderableType]:
    """What latent attention saves, and the loss after each step."""
    before, after = found["bytes_before"], found["bytes_after"]
    saved = f"KV compression: {size(before)} -> {size(after)} per token ({ratio(before, after)} smaller)"
    lost = [
        f"{s['step']} {s['perplexity_increase_percent']:+.2f}% (KL {s['kl']:.2g})"
        for s in found.get("steps", ())
    ]
    return [
        "",
        saved,
        "  perplexity after each step: " + ", ".join(lost) if lost else "  not measured",
    ]


def _healed(found: Mapping[str, Any] | None) -> list[RenderableType]:
    """What training the scales got back."""
    if not found:
        return []
    losses = [kl for _, _, _, _, kl, _ in found["curve"]]
    learned = f"{found['used']:.3g} {found['unit']}, {found['tokens']:,} tokens"
    return [
        "",
        f"scales healed for {learned}: KL {losses[0]:.2g} -> {min(losses):.2g} on text held back",
    ]


def _fitted(text: Mapping[str, Any]) -> list[RenderableType]:
    """What weights were fitted to, and where that was not enough."""
    warnings = [f"warning: {note}" for note in text["notes"]]
    return ["", f"fitted to {text['tokens']:,} tokens of {text['source']}", *warnings]


def search_view(found: Mapping[str, Any]) -> list[RenderableType]:
    """What a search within a budget found, and which choices it measured."""
    table = Table("weights", box=None, pad_edge=False)
    for name in ("bits each", "cache", "perplexity", "KL, nats", ""):
        table.add_column(name, justify="right")
    for m in found["measured"]:
        rise = f"{m['perplexity_percent']:+.2f}% ± {100 * m['rise_error']:.2f}%"
        verdict = "taken" if m["chosen"] else "within" if m["within"] else "too much"
        bits = f"{m['bits_per_weight']:.2f}"
        table.add_row(size(m["bytes"]), bits, m["kv"], rise, f"{m['kl']:.2g}", verdict)
    label = "budget: " if found["met"] else "warning: "
    return ["", label + found["verdict"], "", table]


def _sizes(facts: Mapping[str, Any]) -> Table:
    stored, original = facts["bytes"]["weights"], facts["bytes"]["original"]
    cached, expanded = facts["kv_bytes_per_token"], facts["kv_bytes_per_token_expanded"]
    model, parameters = facts["model"], facts["parameters"]
    shares = sorted(facts["weights_by_format"].items(), key=lambda item: -item[1])
    return pairs({
        "model": f"{model['name']}: {model['layers']} layers, {model['positions']} positions",
        "parameters": f"{amount(parameters['total'])}, {amount(parameters['active'])} active",
        "weights": f"{size(original)} -> {size(stored)} ({ratio(original, stored)} smaller)",
        "formats": ", ".join(f"{name} {share:.1%}{_stored(facts, name)}" for name, share in shares),
        "quantized": _quantized(facts.get("quantized")),
        "KV per token": f"{size(cached)} ({size(expanded)} with full keys and values)",
        "peak memory": size(facts["peak_memory_bytes"]),
        **_cards(facts.get("memory")),
        "targets": ", ".join(facts["targets"]),
    })  # fmt: skip


def _stored(facts: Mapping[str, Any], format: str) -> str:
    stored = facts.get("bytes_by_format", {}).get(format)
    return "" if stored is None else f" ({size(stored)})"


def _cards(found: Mapping[str, Any] | None) -> dict[str, str]:
    """How many cards of a size hold weights and cache, and for how long a sequence."""
    if found is None or not found["cards"]:
        return {}
    lines = [
        f"{c['cards']} x {size(c['card_bytes'])}: {size(c['weight_bytes_per_card'])} of weights on each, "
        f"cache for {c['tokens']:,} tokens, sequences of {c['context']:,}"
        for c in found["cards"]
    ]
    if any(c["cards"] > 1 for c in found["cards"]):
        lines.append("(more than one: an even split, which an artifact does not run as yet)")
    return {"fits in": "\n".join(lines)}


def _quantized(found: Mapping[str, Any] | None) -> str:
    """How much is in 8 bits or fewer, and what should be but is not."""
    if found is None:
        return "unknown: an older tokenmill made this"
    share, expected = f"{found['share']:.1%}", f"{found['expected']:.1%}"
    head = (
        f"{share} of the parameters (expected {expected}), {found['bits']:.2f} bits each on average"
    )
    missed = [f"not {e['wanted']}: {e['weight']}, {e['reason']}" for e in found["escaped"]]
    idle = [
        f"warning: rule {pattern!r} matches no weight that has a format"
        for pattern in found.get("idle_rules", ())
    ]
    return "\n".join([head, *missed, *idle])


def _passes(facts: Mapping[str, Any]) -> Table:
    table = Table("pass", box=None, pad_edge=False)
    for name in ("matches", "nodes", "time", "error"):
        table.add_column(name, justify="right")
    for fact in facts["passes"]:
        nodes = f"{fact['nodes_before']} -> {fact['nodes_after']}"
        error = "" if fact["error"] is None else f"{fact['error']:.1e}"
        time = "" if fact["seconds"] is None else seconds(fact["seconds"])
        table.add_row(fact["name"], str(fact["matches"]), nodes, time, error)
    return table


def _kernels(facts: Mapping[str, Any]) -> str:
    externs = facts["extern_steps"]
    lines = [f"{len(facts['kernels'])} kernels, {len(externs)} steps left to torch"]
    lines += [
        f"  for {target}: {found.get('binaries', found['kernels'])} "
        f"{'binaries' if 'binaries' in found else 'kernels'}, {size(found['bytes'])} of source"
        for target, found in facts.get("emitted", {}).items()
    ]
    return "\n".join(lines + [f"  {step['op']} at {step['where']}" for step in externs])


def bench_view(found: Mapping[str, Any]) -> list[RenderableType]:
    """How fast an artifact is, and what that says of the machine."""
    machine, memory, load = found["hardware"], found["memory"], found["load"]
    facts = pairs({
        "machine": f"{machine['processor']}, {found['threads']} threads",
        "read bandwidth": f"{found['bandwidth']['gb_per_s']:.1f} GB/s ({_range(found['bandwidth'])})",
        "peak memory": f"{size(memory['peak_bytes'])}, {memory['ratio']:.2f} times weights and cache "
        f"({size(memory['packed_bytes'])})",
        "first token": f"{seconds(load['first_token_s'])} after opening, "
        f"{seconds(load['process_s'])} after the process starts",
    })  # fmt: skip
    shown: list[RenderableType] = ["", _speeds(found), ""]
    if "against" in found:
        shown += [_comparison(found), ""]
    return [*shown, facts]


def steps_view(found: Mapping[str, Any]) -> list[RenderableType]:
    """The time of every kernel, in the prompt's step and in one of decoding."""
    shown: list[RenderableType] = []
    for phase, kernels in found.items():
        total = sum(kernel["seconds"] for kernel in kernels)
        table = Table(f"{phase}, {total * 1e3:.3g} ms", box=None, pad_edge=False)
        for name in ("calls", "ms", "share", "weights", "GB/s"):
            table.add_column(name, justify="right")
        for k in kernels:
            read = (
                (size(k["weight_bytes"]), f"{k['gb_per_s']:.1f}") if k["weight_bytes"] else ("", "")
            )
            share = f"{k['seconds'] / total:.1%}"
            table.add_row(k["kernel"], str(k["calls"]), f"{k['seconds'] * 1e3:.3f}", share, *read)
        shown += ["", table]
    return shown


def tune_view(found: Mapping[str, Any]) -> list[RenderableType]:
    """Which sizes of kernels are faster than those in force, and by how much."""
    table = Table("kernel", box=None, pad_edge=False)
    for name in ("rows", "µs", "with", "faster"):
        table.add_column(name, justify="right" if name != "with" else "left")
    for b in found["better"]:
        before, best = (f"{1e6 * b['seconds'][when]:.1f}" for when in ("before", "best"))
        changed = ", ".join(f"{k}={v}" for k, v in b["best"].items() if v != b["before"].get(k))
        table.add_row(
            b["kernel"], str(b["rows"]), f"{before} -> {best}", changed, f"{b['speedup']:.2f}x"
        )
    counts = (
        f"{found['measured']} launches measured on {found['card']} for {found['target']}, with "
        f"{found['tried']} sizes ({found['failed']} failed, {found['wrong']} wrong)"
    )
    left = f"{found['left']} are left: run the command again" if found["left"] else ""
    path = found["path"]
    done = f"wrote {path}: tokenmill optimize MODEL --tiles {path}" if path else "nothing is faster"
    shown: list[RenderableType] = [""]
    if found["better"]:
        shown += [table, ""]
    return [*shown, *filter(None, (counts, left, done))]


def _speeds(found: Mapping[str, Any]) -> Table:
    table = Table("", box=None, pad_edge=False)
    for name in ("tokens/s", "lowest..highest", "step reads", "GB/s", "of bandwidth"):
        table.add_column(name, justify="right")
    for name, title in _titles(found).items():
        table.add_row(title, *_rate(found[name]), *_traffic(found[name]))
    return table


def _comparison(found: Mapping[str, Any]) -> Table:
    table = Table("transformers, bf16", box=None, pad_edge=False)
    for name in ("tokens/s", "lowest..highest", "the artifact has"):
        table.add_column(name, justify="right")
    for name, title in _titles(found).items():
        times = f"{found['speedup'][name]:.1f}x"
        table.add_row(title, *_rate(found["against"][name]), times)
    return table


def _titles(found: Mapping[str, Any]) -> dict[str, str]:
    work = found["workload"]
    titles = {
        "prefill": f"prefill {work['prompt']}",
        "decode": f"decode {work['tokens']} after {work['prompt']}",
    }
    if "batched" in found:
        titles["batched"] = f"the same, {found['batched']['sequences']} sequences"
    return titles


def _rate(speed: Mapping[str, Any]) -> tuple[str, str]:
    return amount(speed["tokens_per_s"]), _range(speed)


def _range(measured: Mapping[str, Any]) -> str:
    return "..".join(
        f"{value:.3g}" if value < 1000 else amount(value) for value in measured["spread"]
    )


def _traffic(speed: Mapping[str, Any]) -> tuple[str, str, str]:
    if "gb_per_s" not in speed:  # a prompt is bound by arithmetic
        return "", "", ""
    read = size(sum(speed["bytes_per_step"].values()))
    return read, f"{speed['gb_per_s']:.1f}", f"{speed['fraction']:.0%}"
