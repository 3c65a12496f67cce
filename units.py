"""Numbers for people."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in decimal units.

    >>> size(512), size(18_724_160), size(1.3e12)
    ('512 B', '18.7 MB', '1300 GB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:.0f} GB"


def amount(count: float) -> str:
    """A count of things, rounded.

    >>> amount(431), amount(9_363_456), amount(671e9)
    ('431', '9.36 M', '671 B')
    """
    if count < 10_000:
        return f"{count:.0f}"
    for unit in ("k", "M", "B"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count:.0f} B"


def seconds(time: float) -> str:
    """
    >>> seconds(0.0004), seconds(0.25), seconds(75)
    ('0.4 ms', '250 ms', '75.0 s')
    """
    return f"{time * 1000:.3g} ms" if time < 1 else f"{time:.1f} s"


def ratio(before: float, after: float) -> str:
    """
    >>> ratio(100, 25), ratio(0, 1)
    ('4.0x', '-')
    """
    return f"{before / after:.1f}x" if before and after else "-"
