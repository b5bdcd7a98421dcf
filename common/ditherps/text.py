"""What others said, as it may stand in a log line or on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The same on one line: what cannot be printed (line ends, terminals' commands) is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def one_line(text: str, limit: int = 500) -> str:
    """`printable`, and cut off behind `limit` characters."""
    shown = printable(text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."
