"""The HTML report: what was done to a model, in one file that needs nothing else.

Everything comes from the ``facts`` that :func:`tokenmill.optimize` collects and the artifact keeps,
so a report can be made again at any time.  Two builds of one model give the same bytes: no clock
shows, not even the time that a pass took.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, TypeAlias
from xml.etree.ElementTree import Element, tostring

from .drawing import Axis, Point, draw, el, plot
from .units import amount, ratio, size

Facts: TypeAlias = Mapping[str, Any]
Cell: TypeAlias = Element | str


def render(facts: Facts, sources: Mapping[str, str]) -> str:
    """The report as HTML; ``sources`` maps file names of kernels to their texts."""
    name = facts["model"]["name"]
    page = el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("title", f"{name} – tokenmill report"),
            el("style", files(__package__).joinpath("report.css").read_text("utf-8")),
        ),
        el(
            "body",
            _header(facts),
            _tiles(facts),
            *_compressed(facts),
            *_search(facts.get("search")),
            *_calibration(facts.get("calibration")),
            *_healed_scales(facts.get("heal_scales")),
            *_passes(facts["passes"]),
            *_drawings(facts["layer"]),
            *_formats(facts),
            *_memory(facts.get("memory")),
            *_kernels(facts, sources),
            *_binaries(facts.get("binaries", {})),
            *_sources(sources),
        ),
        lang="en",
    )
    return "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


# --- sections -------------------------------------------------------------------------------------


def _header(facts: Facts) -> Element:
    model = facts["model"]
    about = (
        f"{model['layers']} layers, vocabulary of {model['vocab']}, up to {model['positions']} "
        f"positions. Compiled for {', '.join(facts['targets'])}."
    )
    return el("header", el("h1", model["name"]), el("p", about))


def _tiles(facts: Facts) -> Element:
    weights, original = facts["bytes"]["weights"], facts["bytes"]["original"]
    total, active = facts["parameters"]["total"], facts["parameters"]["active"]
    cached, expanded = facts["kv_bytes_per_token"], facts["kv_bytes_per_token_expanded"]
    steps = sum(_steps(kernel) for kernel in facts["kernels"])
    externs = len(facts["extern_steps"])
    return el(
        "section",
        _tile("Weights", size(weights),
              f"{size(original)} before: {ratio(original, weights)} smaller"),
        _tile("Parameters", amount(total), f"{amount(active)} active per token"),
        _tile("KV cache per token", size(cached),
              f"{size(expanded)} with full keys and values: {ratio(expanded, cached)} smaller"),
        _tile("Kernels", str(len(facts["kernels"])), f"run as {steps} steps"),
        _tile("Steps left to torch", str(externs), "listed below" if externs else "none falls back",
              "bad" if externs else "good"),
        _tile("Peak memory", size(facts["peak_memory_bytes"]),
              f"steps of {facts['capacity']['tokens']} tokens, {facts['capacity']['rows']} rows"),
        class_="tiles",
    )  # fmt: skip


def _tile(name: str, value: str, note: str, mood: str = "") -> Element:
    return el(
        "div",
        el("div", name, class_="name"),
        el("div", value, class_="value"),
        el("div", note, class_="note"),
        class_=f"tile {mood}".strip(),
    )


def _calibration(text: Facts | None) -> list[Element]:
    """What weights were fitted to, and where that was not enough."""
    if text is None:
        return []
    return [
        el("h2", "Calibration"),
        el("p", f"Weights are fitted to {text['tokens']:,} tokens, in {text['sequences']} sequences, of "
                f"{text['source']}."),
        *(el("p", note, class_="bad") for note in text["notes"]),
    ]  # fmt: skip


def _healed_scales(healing: Facts | None) -> list[Element]:
    """What training of the scales got back, after rounding."""
    if not healing:
        return []
    best = min(kl for _, _, _, _, kl, _ in healing["curve"])
    return _healing("Scales of weights in fewer than 8 bits", healing, best)


def _search(found: Facts | None) -> list[Element]:
    """What formats were searched for, what they lose, and what else was there."""
    if found is None:
        return []
    return [
        el("h2", "Formats within a budget"),
        el("p", found["verdict"], class_="good" if found["met"] else "bad"),
        el("figure", el("div", _pareto(found), class_="canvas"), class_="alone"),
        el("p", "Curve: the least loss for each size, predicted from the losses of single weights "
                "and scaled to what was measured. Points: choices that were measured, with their "
                "standard errors. A choice counts as within the budget only with two standard errors "
                "to spare, and its divergence within it too."),
        _measured(found),
        el("h3", "What each weight loses by itself"),
        el("p", f"KL divergence in thousandths of a nat per token when only this one is rounded, to the "
                f"nearest, from {found['forks']} partial runs of the model; the format taken is marked."),
        _sensitivities(found["units"]),
    ]  # fmt: skip


def _pareto(found: Facts) -> Element:
    if found["budget"]["measure"] == "perplexity":
        name, value, error, shown = "perplexity, change in %", "rise", "rise_error", _percent
    else:
        name, value, error, shown = "KL divergence, nats / 1000", "kl", "kl_error", _thousandths
    measured, limit = found["measured"], found["budget"]["nats"]
    scale = _slope([(m["predicted"], m[value]) for m in measured])
    points = [
        Point(m["cost"], shown(m[value]), shown(m[error]), _standing(m),
              f"{size(m['cost'])}, {m['bits_per_weight']:.2f} bits per weight: {_loss_text(m)}")
        for m in measured
    ]  # fmt: skip
    curve = [(p["cost"], shown(scale * p["predicted"])) for p in found["frontier"]]
    axes = Axis(found["cost"], size), Axis(name, lambda y: f"{y:.3g}")
    return plot("Size and loss", axes, curve, points, None if limit is None else shown(limit))


def _percent(nats: float) -> float:
    return 100 * math.expm1(nats)


def _thousandths(nats: float) -> float:
    return 1000 * nats


def _slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Of the line through the origin that is nearest to the pairs (least squares)."""
    squares = sum(x * x for x, _ in pairs)
    slope = sum(x * y for x, y in pairs) / squares if squares else 1.0
    return slope if slope > 0 else 1.0


def _standing(measured: Facts) -> str:
    return "chosen" if measured["chosen"] else "within" if measured["within"] else "beyond"


def _loss_text(found: Facts) -> str:
    percent, error = found["perplexity_percent"], 100 * found["rise_error"]
    return f"perplexity {percent:+.2f}% ± {error:.2f}%"


def _measured(found: Facts) -> Element:
    words = {"chosen": "taken", "within": "within", "beyond": "too much"}
    rows = [
        (
            el("strong", size(m["bytes"])) if m["chosen"] else size(m["bytes"]),
            f"{m['bits_per_weight']:.2f}",
            m["kv"],
            size(m["held_bytes"]),
            size(m["read_bytes"]),
            f"{m['perplexity_percent']:+.2f}% ± {100 * m['rise_error']:.2f}%",
            f"{m['kl']:.2g}",
            words[_standing(m)],
        )
        for m in found["measured"]
    ]
    head = (
        "Weights", "Bits each", "Cache", f"With cache of {found['budget']['context']:,} tokens",
        "Read per token", "Perplexity", "KL, nats", "Verdict",
    )  # fmt: skip
    return _table(head, rows, numbers={0, 1, 3, 4, 5, 6})


def _sensitivities(units: Sequence[Facts]) -> Element:
    """Units in the order in which they lose most; formats from the fewest bits on."""
    searched = [u for u in units if u["searched"] or u["role"] == "cache"]
    sizes: dict[str, float] = {}
    for unit in searched:
        for c in unit["candidates"]:
            bits = c["bytes"] / unit["parameters"] if unit["parameters"] else math.inf
            sizes[c["format"]] = min(bits, sizes.get(c["format"], math.inf))
    formats = sorted(sizes, key=lambda f: (sizes[f], f))
    order = sorted(searched, key=lambda u: -max(c["loss"] for c in u["candidates"]))
    rows = [(_unit_name(u), u["role"], *_cells(u, formats)) for u in order]
    table = _table(("Weights", "Role", *formats), rows, numbers=set(range(2, 2 + len(formats))))
    return el("details", el("summary", f"{len(rows)} weights"), table)


def _unit_name(unit: Facts) -> Cell:
    first, *others = unit["weights"] or ["all layers"]
    more = [el("span", f" and {len(others)} more", class_="soft")] if others else []
    return el("div", el("code", first), *more)


def _cells(unit: Facts, formats: Sequence[str]) -> list[Cell]:
    losses = {c["format"]: f"{1000 * c['loss']:.3g}" for c in unit["candidates"]}
    chosen = unit["chosen"]
    return [el("strong", losses[f]) if f == chosen else losses.get(f, "") for f in formats]


def _compressed(facts: Facts) -> list[Element]:
    """What latent attention instead of keys and values is worth, and what it loses."""
    found = facts.get("kv_compress")
    if not found:
        return []
    layers, before, after = found["layers"], found["bytes_before"], found["bytes_after"]
    kept = facts["model"]["layers"] - len(layers)
    about = (
        f"Attention of {len(layers)} layers is latent: their caches hold {found['values_after']:,} values "
        f"per token, not {found['values_before']:,}. With formats as they are here, the whole model's "
        f"take {size(after)} per token, not {size(before)}: {ratio(before, after)} smaller."
    )
    if kept:
        about += f" {kept} other caches stay as they were."
    return [
        el("h2", "KV compression"),
        el("p", about),
        *_conversion(found.get("steps", ())),
        *(
            _healing("The new weights", found["healing"], found["steps"][-1]["kl"])
            if found.get("healing")
            else ()
        ),
        *_contexts(found, facts["model"]["positions"]),
        *_decode(found, facts["model"]["positions"]),
        el("h3", "Ranks"),
        _ranks(layers),
    ]


def _conversion(steps: Sequence[Facts]) -> list[Element]:
    """The loss after each step, with those before it."""
    if not steps:
        return [el("p", "Nothing was measured: a dry run converts shapes only.")]
    rows = [
        (
            s["step"],
            "yes" if s["exact"] else "no",
            _risen(s["rise"], s["rise_error"]),
            _with_error(s["kl"], s["kl_error"]),
            f"{s['tokens']:,}",
        )
        for s in steps
    ]
    head = ("After the step", "Exact", "Perplexity", "KL, nats / 1000", "Held-out tokens")
    return [
        el("h3", "What each step loses"),
        el("p", "Against the original, on text that was not trained on, with standard errors; each row "
                "has the steps above it too."),
        _table(head, rows, numbers={2, 3, 4}),
    ]  # fmt: skip


def _spent(used: float, healing: Facts) -> str:
    return f"{used:.1f} minutes" if healing["unit"] == "minutes" else f"{used:g} steps"


def _risen(rise: float, error: float) -> str:
    """A change of perplexity; tiny ones keep their digits."""
    shown, off = _percent(rise), 100 * error
    digits = 2 if max(abs(shown), off) >= 0.01 else 4
    return f"{shown:+.{digits}f}%" + ("" if math.isinf(error) else f" ± {off:.{digits}f}%")


def _with_error(nats: float, error: float) -> str:
    spread = "" if math.isinf(error) else f" ± {_thousandths(error):.2g}"
    return f"{_thousandths(nats):.3g}{spread}"


def _healing(what: str, healing: Facts, taken: float) -> list[Element]:
    """How training got back what was lost; the weights that were taken have the divergence ``taken``."""
    points = [
        Point(at, _thousandths(kl), 0.0 if math.isinf(error) else _thousandths(error),
              "chosen" if kl == taken else "within",
              f"{_spent(at, healing)}: KL {_with_error(kl, error)}, perplexity {_risen(rise, off)}")
        for at, _, rise, off, kl, error in healing["curve"]
    ]  # fmt: skip
    about = (
        f"{what} learned from the original for {_spent(healing['used'], healing)}, on "
        f"{healing['tokens']:,} tokens."
    )
    if ending := healing["ending"]:
        about += f" {ending[0].upper()}{ending[1:]}."
    section = [el("h3", "Healing"), el("p", about)]
    if len({point.x for point in points}) < 2:
        return section
    line = [(point.x, point.y) for point in points]
    axes = (
        Axis(healing["unit"], lambda x: f"{x:g}"),
        Axis("KL divergence, nats / 1000", lambda y: f"{y:.3g}"),
    )
    drawing = plot("Loss on held-out text while healing", axes, line, points, None)
    return [*section, el("figure", el("div", drawing, class_="canvas"), class_="alone")]


def _contexts(found: Facts, positions: int) -> list[Element]:
    rows = [
        (size(c["memory_bytes"]), f"{c['before']:,}", f"{c['after']:,}", ratio(c["after"], c["before"]))
        for c in found["contexts"]
    ]  # fmt: skip
    about = (
        "Tokens whose caches fit beside weights and activations, in one sequence or in several. A "
        f"sequence of this model has at most {positions:,}. Before is reckoned, with weights and caches "
        "in the same formats."
    )
    head = ("Memory", "Before", "After", "Longer")
    return [
        el("h3", "Longest context"), el("p", about), _table(head, rows, numbers={1, 2, 3}),
    ]  # fmt: skip


def _decode(found: Facts, positions: int) -> list[Element]:
    rows = [
        (f"{d['context']:,}", size(d["before"]), size(d["after"]), f"{d['before'] / d['after']:.2f}x",
         f"{d['flop_before'] / 1e6:,.1f}", f"{d['flop_after'] / 1e6:,.1f}",
         ratio(d["flop_after"], d["flop_before"]))
        for d in found["decode"]
    ]  # fmt: skip
    added = found["weight_bytes_added"]
    more = f"{size(abs(added))} {'more' if added >= 0 else 'less'}"
    about = (
        "What one sequence costs to decode a token. Bytes: the weights that it visits, and its cache; where "
        "memory's bandwidth is the limit, as on GPUs, decoding is at most so many times faster. Weights are "
        f"{more} than before, which short contexts notice. MFLOP: of attention, in the layers that were "
        "converted; every head works on whole latents, so a CPU, which has less arithmetic for a byte, may "
        "lose there what it gains in bytes. Both are reckoned; tokenmill bench DIR --prompt N measures."
    )
    if rows and found["decode"][-1]["context"] > positions:
        about += f" More than {positions:,} tokens are past this model's positions."
    head = (
        "Tokens in the cache", "Before", "After", "Speed at most",
        "MFLOP before", "After", "More arithmetic",
    )  # fmt: skip
    return [
        el("h3", "Decoding against context"), el("p", about),
        _table(head, rows, numbers={1, 2, 3, 4, 5, 6}),
    ]  # fmt: skip


def _ranks(layers: Sequence[Facts]) -> Element:
    """What the caches hold, as bars and in numbers."""
    widest = max(layer["before"] for layer in layers)
    rows = [
        (
            el("code", layer["path"]),
            _widths(layer["rank"], layer["rotary"], widest),
            str(layer["rank"]),
            str(layer["rotary"]),
            str(layer["before"]),
        )
        for layer in layers
    ]
    head = ("Attention", "Values per token", "Latents", "Rotary", "Keys and values before")
    ranks = sorted({layer["rank"] for layer in layers})
    some = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
    about = f"{len(layers)} layers, {some} latents per token"
    return el(
        "details", el("summary", about), _table(head, rows, numbers={2, 3, 4}), class_="widths"
    )


def _widths(rank: int, rotary: int, widest: int) -> Element:
    parts = {"latent": rank, "rotary": rotary, "saved": max(0, widest - rank - rotary)}
    return el(
        "div", *(el("span", class_=k, style=f"flex:{n}") for k, n in parts.items()), class_="bar"
    )


def _passes(passes: Sequence[Facts]) -> list[Element]:
    rows = [
        (
            _with_note(el("code", p["name"]), p["summary"], *_texts(p.get("notes"))),
            str(p["matches"]),
            f"{p['nodes_before']} → {p['nodes_after']}",
            _error(p),
        )
        for p in passes
    ]
    return [
        el("h2", "Passes"),
        el("p", "In the order in which they ran. The error is that of the logits on sample tokens, "
                "relative to their spread, before against after the pass."),
        _table(("Pass", "Matches", "Graph nodes", "Error"), rows, numbers={1, 2, 3}),
    ]  # fmt: skip


def _error(fact: Facts) -> str:
    if fact["error"] is None:
        return "not checked"
    bound = fact["tolerance"]
    return f"{fact['error']:.1e}" + ("" if bound is None else f" (≤ {bound:.0e})")


def _drawings(layer: Facts) -> list[Element]:
    before, after = layer["before"], layer["after"]
    kinds = sorted({node["kind"] for side in (before, after) for node in side["nodes"]})
    return [
        el("h2", "One layer, before and after"),
        el("p", "Data flows downwards. Point at a box to see where in the model it comes from."),
        el("div", *(_legend(f"node kind-{kind}", kind) for kind in kinds), class_="legend"),
        el("div", _figure("Before", before), _figure("After", after), class_="drawings"),
    ]


def _figure(title: str, side: Facts) -> Element:
    count = f"{title}: {len(side['nodes'])} operations"
    drawing = draw(side["nodes"], side["edges"], count)
    width = int(drawing.attrib["width"])
    # A wide drawing gets more of the page, and shrinks a little before it has to scroll.
    drawing.set("style", f"min-width:{0.75 * width:.0f}px")
    canvas = el("div", drawing, class_="canvas")
    return el("figure", el("figcaption", el("h3", count)), canvas, style=f"flex-grow:{width}")


def _formats(facts: Facts) -> list[Element]:
    shares = sorted(facts["weights_by_format"].items(), key=lambda item: -item[1])
    bar = [el("span", class_=f"fmt-{name}", style=f"flex:{share:.4f}") for name, share in shares]
    keys = [_legend(f"fmt-{name}", f"{name} {share:.1%}") for name, share in shares]
    rows = [
        (el("code", name), role, el("code", fmt), str(count), amount(parameters), size(count_bytes))
        for (name, role, fmt), (count, parameters, count_bytes) in _by_module(facts["formats"])
    ]
    head = ("Weight", "Role", "Format", "Tensors", "Parameters", "Stored")
    return [
        el("h2", "Weight formats"),
        el("p", "Share of the parameters in each format; below, weights of one kind in one row."),
        el("div", *bar, class_="bar"),
        el("div", *keys, class_="legend"),
        *_quantized(facts["quantized"]),
        _table(head, rows, numbers={3, 4, 5}),
    ]


def _quantized(found: Facts) -> list[Element]:
    """How much is in 8 bits or fewer, and what should be but is not."""
    said = el(
        "p",
        f"Quantized: {found['share']:.1%} of the parameters (expected {found['expected']:.1%}); "
        f"{found['bits']:.2f} bits per parameter on average.",
    )
    rows = [
        (el("code", e["weight"]), el("code", e["wanted"]), amount(e["parameters"]), e["reason"])
        for e in found["escaped"]
    ]
    head = ("Stays in fp32", "Wanted", "Parameters", "Why")
    return [said, _table(head, rows, numbers={2})] if rows else [said]


def _by_module(
    formats: Iterable[Facts],
) -> list[tuple[tuple[str, str, str], tuple[int, int, int]]]:
    """Weights that differ only in their numbers (layer, expert) together, in order."""
    groups: dict[tuple[str, str, str], tuple[int, int, int]] = {}
    for fact in formats:
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", fact["weight"]), fact["role"], fact["format"])
        count, parameters, stored = groups.get(key, (0, 0, 0))
        groups[key] = (count + 1, parameters + fact["parameters"], stored + fact["bytes"])
    return list(groups.items())


def _memory(found: Facts | None) -> list[Element]:
    """How many cards hold the model, and how much cache beside it."""
    if found is None or not found["cards"]:
        return []
    rows = [
        (size(c["card_bytes"]), str(c["cards"]), size(c["weight_bytes_per_card"]),
         f"{c['tokens']:,}", f"{c['context']:,}")
        for c in found["cards"]
    ]  # fmt: skip
    about = (
        f"{size(found['weights'])} of weights and {size(found['activations'])} of activations in the "
        "fewest cards of a size, with cache in what is left. An artifact runs on one device: more cards "
        "than one stand for an even split, which tokenmill does not make."
    )
    head = (
        "Memory of a card",
        "Cards",
        "Weights on each",
        "Tokens in the cache",
        "Longest sequence",
    )
    return [el("h2", "Memory"), el("p", about), _table(head, rows, numbers=set(range(5)))]


def _kernels(facts: Facts, sources: Mapping[str, str]) -> list[Element]:
    rows = [
        (el("code", k["symbol"]), k["kind"], _spec(k["spec"]), str(_steps(k)))
        for k in facts["kernels"]
    ]
    section = [
        el("h2", "Kernels"),
        el(
            "p",
            "Each is generated for one shape and format; layers of the same structure share it.",
        ),
        _table(("Symbol", "Kind", "Specialised for", "Steps"), rows, numbers={3}),
    ]
    if facts["extern_steps"]:
        externs = [(el("code", e["op"]), e["where"]) for e in facts["extern_steps"]]
        section += [el("h2", "Steps left to torch"), _table(("Operation", "Where"), externs)]
    return section


def _binaries(built: Mapping[str, Sequence[Facts]]) -> list[Element]:
    """What the GPU kernels became, per architecture."""
    head = (
        "Binary", "Batches up to", "Threads", "Registers", "Spilled", "Shared", "Tensor cores", "Size",
    )  # fmt: skip
    section = []
    for target, facts in built.items():
        rows = [
            (
                el("code", fact["binary"]),
                ", ".join(map(str, fact["buckets"])),
                str(fact["threads"]),
                str(fact["registers"]),
                f"{fact['local_bytes']} B" if fact["local_bytes"] else "none",
                f"{fact['shared_kb']:.1f} KB",
                fact["tensor_cores"] or "none",
                f"{fact['cubin_kb']:.1f} KB",
            )
            for fact in facts
        ]
        if rows:
            about = f"{len(rows)} cubins for {target}, read back after the build."
            section += [el("h2", f"Binaries for {target}"), el("p", about)]
            section += [_table(head, rows, numbers={2, 3, 4, 5, 7})]
    return section


def _sources(sources: Mapping[str, str]) -> list[Element]:
    texts = sorted(name for name in sources if not name.endswith(".json"))
    return [el("h2", "Sources"), *(_source(n, sources[n]) for n in texts)] if texts else []


def _source(name: str, text: str) -> Element:
    lines = el("span", f"  {len(text.splitlines())} lines", class_="soft")
    return el("details", el("summary", el("code", name), lines), el("pre", text))


def _spec(spec: Facts | str) -> Cell:
    if isinstance(spec, str):
        return el("span", spec, class_="mono soft")
    return el("span", _fields(spec), class_="mono soft")


def _fields(spec: Mapping[str, Any]) -> str:
    """What is empty, False or 0 is a feature that a kernel does without."""
    return ", ".join(f"{k}={_short(v)}" for k, v in spec.items() if k != "kind" and v)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value.get('kind', '')}({_fields(value)})"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _steps(kernel: Facts) -> int:
    steps = kernel["steps"]
    return steps if isinstance(steps, int) else len(steps)


# --- pieces ---------------------------------------------------------------------------------------


def _table(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], numbers: Iterable[int] = ()
) -> Element:
    style = [{"class": "num"} if i in numbers else {} for i in range(len(head))]
    return el(
        "div",
        el(
            "table",
            el("thead", el("tr", *(el("th", h, **s) for h, s in zip(head, style, strict=True)))),
            el("tbody", *(
                el("tr", *(el("td", c, **s) for c, s in zip(row, style, strict=True)))
                for row in rows
            )),
        ),
        class_="scroll",
    )  # fmt: skip


def _with_note(main: Element, *notes: str) -> Element:
    return el("div", main, *(el("div", note, class_="note") for note in notes if note))


def _legend(style: str, label: str) -> Element:
    return el("span", el("i", class_=style), label)


def _texts(notes: str | Sequence[str] | None) -> Sequence[str]:
    return [notes] if isinstance(notes, str) else notes or []
