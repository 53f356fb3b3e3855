"""Text that came from elsewhere, made harmless for logs, terminals and Markdown.

A server, a log of a job or a file name can hold anything: line breaks that forge further lines of a log, escape
sequences that write over a terminal, markup that loads pictures. What is shown goes through here; names that files and
remote objects are found by stay as they are.
"""

from __future__ import annotations

import logging
import re
import unicodedata

__all__ = ["Lines", "code_block", "inline", "inline_code", "lines", "logger_of", "one_line", "shown"]

# Control characters, line separators, and what changes the order or the look of the text around it.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SHOWN_AS_THEY_ARE = frozenset({"\t", "\u00ad", "\u200c", "\u200d"})
_MARKUP = re.compile(r"[\\`*\[\]<>|!&]")
# Not every renderer knows a backslash before these.
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_FENCE = re.compile(r"`{3,}")


class Lines(str):
    """Text in which line breaks are meant; each line but the first is indented, so that none looks like a new entry."""

    __slots__ = ()


def one_line(text: object, *, most: int = 10_000) -> str:
    r"""Show a text in one line.

    Args:
        text: Anything.
        most: Number of characters after which it is cut.

    Returns:
        The text with control characters, line breaks included, spelled out, as in `\x1b`.
    """
    said = str(text)
    cut = said if len(said) <= most else f"{said[:most]}…"
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(_visible(character) for character in cut)


def lines(text: object) -> Lines:
    """Show a text of several lines.

    Args:
        text: Anything.

    Returns:
        Its lines without control characters, all but the first indented. The same again when it is made of one.
    """
    first, *others = str(text).split("\n")
    indented = [line if not line or line.startswith("  ") else f"  {line}" for line in map(_long_line, others)]
    return Lines("\n".join([_long_line(first), *indented]))


def shown(value: object) -> object:
    """Make an argument of a log line harmless.

    Args:
        value: The argument.

    Returns:
        Numbers and the like as they are; an error with its lines, everything else in one line.
    """
    if isinstance(value, Lines) or value is None or isinstance(value, bool | int | float):
        return value
    return lines(value) if isinstance(value, BaseException) else one_line(value)


def inline(text: object) -> str:
    """Show a text within a line of Markdown, a cell of a table included.

    Args:
        text: Anything.

    Returns:
        One line in which nothing is markup: no picture, link, code, HTML or border of a cell.
    """
    said = " ".join(one_line(text).split())
    return _MARKUP.sub(lambda found: _ENTITIES.get(found.group(), f"\\{found.group()}"), said)


def inline_code(text: object) -> str:
    """Show a text as code within a line of Markdown; arguments as for `inline`."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def code_block(text: object) -> str:
    """Show a text of several lines as a block of code in Markdown.

    Args:
        text: Anything.

    Returns:
        The block, with a fence that the text does not have.
    """
    body = "\n".join(map(_long_line, str(text).split("\n")))
    fence = "`" * max([3, *(len(found) + 1 for found in _FENCE.findall(body))])
    return f"{fence}\n{body}\n{fence}"


class _Shown(logging.Filter):
    """Makes the arguments of log lines harmless."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(map(shown, record.args))
        elif record.args:
            record.args = {name: shown(value) for name, value in record.args.items()}
        return True


def logger_of(name: str) -> logging.Logger:
    """Get the logger of a module, which shows no argument of its lines raw.

    Args:
        name: Name of the module.

    Returns:
        The logger.
    """
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Shown) for known in logger.filters):
        logger.addFilter(_Shown())
    return logger


def _long_line(text: str) -> str:
    return one_line(text, most=1_000_000)


def _visible(character: str) -> str:
    if character in _SHOWN_AS_THEY_ARE or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode()
