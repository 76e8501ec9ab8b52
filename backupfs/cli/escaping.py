"""What stands between a terminal and text that users chose: names and paths may hold anything (pure)."""

from __future__ import annotations


def escaped(text: str) -> str:
    """``text`` with all that does not print (control, direction, odd spaces) as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def printable(text: str) -> str:
    """A name in one line, so that no two names look alike: escaped, backslashes doubled."""
    return escaped(text.replace("\\", "\\\\"))
