"""What is not a change: one table of what a text says about when, where and by which version it was made.

Two runs of one program on two days write other times, hosts, process numbers and paths, and the same result. The table
is tried at each place of a text from top to bottom, so what is longer stands first. `Rules.volatile` adds to it.
Numbers and words that no row matches are compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

__all__ = ["ENVIRONMENT_FIELDS", "PATTERNS", "VOLATILE_FIELDS", "FieldKind", "Volatile", "volatile_of"]

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?|JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)"
)
_DAY_NAME = r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?,?"
_YEAR = r"(?:19|20)\d\d"
_ZONE = r"(?:[ -]?(?:Z|UTC|GMT|[CEMPW][ES]?S?T|BST)\b|\s?[+-]\d\d:?\d\d\b)"
_CLOCK = rf"\d{{1,2}}:\d\d(?::\d\d(?:[.,]\d+)?)?(?:\s?[AaPp]\.?[Mm]\b\.?)?{_ZONE}*"
_AT = r"(?:,?\s*(?:at|[-T_,|:.])?\s*)"
_END_OF_PATH = r"[^\s\"'<>,;:)\]}|]*"
_DURATION = r"\d+(?:\.\d+)?(?:\s?(?:hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s|ms|us|days?|d)\b[, :]*(?:and )?)?"

PATTERNS: tuple[tuple[str, str], ...] = (
    # Times.
    (
        "time",
        rf"(?<![\d.]){_YEAR}(?P<s>[-/:.])(?:0?[1-9]|1[0-2])(?P=s)(?:[12]\d|3[01]|0?[1-9])(?:{_AT}{_CLOCK})?(?!\d)",
    ),
    ("time", rf"(?<![\d.]){_YEAR}-\d\d-\d\d[T_ -]\d\d[-.h_]?\d\d(?:[-.m_]?\d\d)?(?:[.,]\d+)?(?:{_ZONE})?(?!\d)"),
    (
        "time",
        rf"(?<!\d){_YEAR}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])[-_T]?(?:[01]\d|2[0-3])[0-5]\d[0-5]\d(?:\.\d+)?Z?"
        rf"(?:[-_][0-9a-f]{{4,12}})?(?![\da-zA-Z])",
    ),
    ("time", rf"(?<=[A-Za-z][-_]){_YEAR}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])(?:[-_][0-9a-f]{{4,12}})?(?![\da-zA-Z])"),
    ("time", rf"(?:\b{_DAY_NAME}\s+)?\b\d{{1,2}}(?:st|nd|rd|th)?[-/ .]+{_MONTH}[-/ .,]+{_YEAR}\b(?:{_AT}{_CLOCK})?"),
    ("time", rf"(?:\b{_DAY_NAME}\s+)?\b\d{{1,2}}-{_MONTH}-\d\d\b(?:{_AT}{_CLOCK})?"),
    ("time", rf"(?:\b{_DAY_NAME}\s+)?\b{_MONTH}\.?\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+{_YEAR}\b(?:{_AT}{_CLOCK})?"),
    ("time", rf"(?:\b{_DAY_NAME}\s+)?\b{_MONTH}\s+\d{{1,2}}\s+{_CLOCK}(?:\s+[A-Z]{{3,4}})?(?:\s+{_YEAR}\b)?"),
    ("time", rf"(?<![\d.])\d{{1,2}}(?P<t>[-/.])\d{{1,2}}(?P=t){_YEAR}(?![\d])(?:{_AT}{_CLOCK})?"),
    ("time", rf"(?<![\d./])\d{{1,2}}/\d{{1,2}}/\d\d,?\s+{_CLOCK}"),
    ("time", r"(?<![\d:.])\d{1,2}:\d\d:\d\d(?:[.,]\d+)?(?:\s?[AaPp][Mm]\b)?" + rf"(?:{_ZONE})?(?![\d:])"),
    ("time", r"(?<![\d:.])\d{1,2}:\d\d\s?(?:[AaPp]\.?[Mm]\b\.?)"),
    ("time", r"(?i:\bat\s+)\d{1,2}:\d\d\b(?![:\d])"),
    (
        "time",
        r"(?i:\b(?:\w*(?:created|creation|modified|generated|timestamp|time|date|epoch|started|finished))\b)"
        r"[\"']?\s*[:=]\s*[\"']?1\d{9}(?:\d{3}){0,3}(?:\.\d+)?\b",
    ),
    # Times that something took, and memory.
    (
        "elapsed",
        rf"(?i:\b(?:elapsed|run[- _]?time|wall(?:[- _]?(?:clock|time))*|(?:cpu|user|sys(?:tem)?|exec(?:ution)?"
        rf"|process(?:ing)?|comput(?:e|ation)|total|real|reconstruction)[- _]time|time[- _](?:taken|elapsed|used))\b"
        rf"(?:[- _](?:time|hours|minutes|seconds|secs?|s|hms?))*)\s*(?:\([^()\d]{{0,20}}\))?\s*(?:is|was|of)?[\s:=~]*"
        rf"(?:\d+:\d\d(?::\d\d)?(?:\.\d+)?\b|(?:{_DURATION}\s*){{1,4}})",
    ),
    (
        "elapsed",
        r"(?i:\btook\s+(?:about\s+)?|\b(?:done|finished|completed|succeeded|converged|processed|computed|ran|terminated)\b[^\n\d]{0,40}"
        r"?\b(?:in|after)\s+)(?:\d+(?:\.\d+)?\s?(?:hours?|hrs?|h|minutes?|mins?|seconds?|secs?|s|ms)\b[, ]*"
        r"(?:and )?){1,4}",
    ),
    ("elapsed", r"(?<![\w.])\d+\s?h(?:ours?)?[ :,]*\d+\s?m(?:in(?:utes?)?)?[ :,]*\d+(?:\.\d+)?\s?s(?:ec(?:onds?)?)?\b"),
    (
        "memory",
        r"(?i:\b(?:peak|max(?:imum)?)[- _](?:rss|mem(?:ory)?(?:[- _]?us(?:age|ed))?|resident[- _]set[- _]size)|"
        r"\bvm(?:peak|hwm|rss))\b[\s:=]*\d+(?:\.\d+)?\s?(?:[kmgKMG]i?[bB]?)?\b",
    ),
    # Who and where.
    ("user", r"(?<![\w.])[A-Za-z][\w.-]*@[A-Za-z][\w.-]*\w"),
    ("user", r"(?i:\bcreated by\s+)\S+(?:\s+on\s+(?=[\w-]*\d)[A-Za-z][\w.-]*\w|(?=\s+(?i:on|at)\b))"),
    (
        "host",
        r"(?i:\b(?:host(?:[- _]?name)?|node[- _]?name|computer(?:[- _]?name)?|machine(?:[- _]?name)?|server|node)\b)"
        r"[\"']?\s*[:=]\s*[\"']?(?=[\w.-]*[A-Za-z])[\w.-]+",
    ),
    ("host", r"(?i:^\s*[#%;]+\s*(?:hostname|machine|nodename)\s+)\S+"),
    (
        "host",
        r"(?i:\b(?:running|run|ran|executed|computed|processed|started|generated|written|produced|created)"
        r"\s+on\s+(?:host|node|machine|server)?\s*)"
        r"(?=[\w.-]*\d)[\w.-]*\w",
    ),
    (
        "user",
        r"(?i:\b(?:user(?:[- _]?name)?|log(?:in|name)|run by|executed by|submitted by)\b)[\"']?\s*[:=]\s*[\"']?[\w.-]+",
    ),
    ("user", r"(?i:^\s*[#%;]+\s*(?:user|username|login)\s+)\S+"),
    # Numbers of processes and jobs.
    ("process", r"(?i:\bp?pid\b\s*[:=#]?\s*)\d+"),
    (
        "process",
        r"(?i:\b(?:process|thread|job|task)(?:[- _]?(?:id|number|no\.?)\s*[:=#]?|\s*#)\s*)\d{2,}\b",
    ),
    ("process", r"(?i:\bprocess\s+)\d{2,}\b"),
    ("process", r"(?<=[a-z])\[\d{2,7}\](?=:)"),
    ("process", r"(?i:\bslurm[-_])\d+\b"),
    # Where files were while it ran.
    (
        "path",
        rf"(?:file://)?(?:/[\w.+@-]+){{0,8}}?/(?:tmp|temp|var/folders|scratch|lscratch|localscratch|dev/shm|run/user"
        rf"|TemporaryItems|work(?:ing)?_?dir)/{_END_OF_PATH}",
    ),
    ("path", r"(?i:\b[A-Z]:\\(?:[^\s\\\"']+\\){0,8}?(?:Te?mp)\\)[^\s\"'<>|]*"),
    ("path", r"(?<![\w.])/(?:home|Users)/[^\s/\"'<>,;:)\]}]+"),
    ("path", r"(?i:\b[A-Z]:\\Users\\)[^\s\\\"']+"),
    ("path", r"\btmp(?:\.[A-Za-z0-9]{6,12}|[a-z0-9_]{8})\b"),
    # Identifiers that are drawn anew each time.
    ("id", r"\b[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\b"),
    ("id", r"(?<![\w.])[0-2]\.\d+(?:\.\d+){5,}(?![\w.])"),
    ("id", r"\b0x[0-9a-fA-F]{7,16}\b"),
    (
        "id",
        r"(?i:\b(?:run|job|session|task|uid|execution|workflow|request|trace|token|instance)(?:[-_ ]?id)?[-_:=# ]+)"
        r"(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{6,31}\b",
    ),
    # Versions, which are told apart from the rest as the environment.
    ("version", r"\$(?:Id|Revision|Header|Date|Author)\b[^$\n]*\$"),
    ("version", r"(?i:\b(?:version|release|revision|build)\b)[\"']?\s*[:=]?\s*[\"']?(?:v|r)?(?=[\w.+-]*\d)[\w.+-]*\w"),
    ("version", r"(?<![\w.])v\d+(?:\.\d+)+[\w.+-]*\w\b|(?<![\w.])v\d+\.\d+\b"),
    ("version", r"(?<![\w./])(?:[A-Za-z]+-)?\d{1,4}\.\d{1,5}\.\d{1,5}(?:[-+._]?[A-Za-z0-9]+)*(?![\w/])"),
    (
        "version",
        r"\b(?:FreeSurfer|FSL|ANTs|AFNI|SPM|MRtrix|LCModel|Python|MATLAB|Matplotlib|matplotlib)[ /-]?v?"
        r"\d+(?:\.\d+)+[\w.+-]*",
    ),
)
"""Name of the kind and regular expression. `version` is reported as environment, the rest not at all."""

VOLATILE_FIELDS: tuple[tuple[str, str], ...] = (
    (
        "elapsed",
        r"(?:\w+_)?elapsed(?:_\w+)?|took(?:_\w+)?|(?:\w+_)?run_?time(?:_\w+)?|(?:\w+_)?wall_?(?:clock|time)(?:_\w+)?"
        r"|(?:cpu|user|sys|system|exec|execution|process|processing|compute|computation|total|real)_time(?:_\w+)?"
        r"|time_(?:taken|used|elapsed)(?:_\w+)?|execution_duration(?:_\w+)?",
    ),
    (
        "memory",
        r"(?:peak|max|maximum)_(?:rss|mem|memory)(?:_\w+)?|(?:mem|memory)_(?:usage|used|peak)(?:_\w+)?|rss_(?:kb|mb|gb|bytes)",
    ),
    ("process", r"p?pid|process_id|thread_id|(?:slurm_)?(?:array_)?job_?id|task_id"),
    ("host", r"host|hostname|host_name|node_?name|computer(?:_?name)?|machine(?:_?name)?|fqdn|ip_?address"),
    ("user", r"user|user_?name|login|logname|submitted_by|run_by|executed_by"),
    ("path", r"(?:tmp|temp|scratch|working|work)_?(?:dir|directory|folder|path)|cwd|pwd"),
    ("id", r"(?:\w+_)?(?:uuid|guid)|run_uid|execution_id|workflow_id|instance_id|random_id|trace_id|request_id|etag"),
)
"""Kind and name of a field, in snake case, whose value says nothing about the result."""

ENVIRONMENT_FIELDS = (
    r"(?:\w+_)?versions?|environment|packages|dependencies|generated_by|provenance_software|language_info|kernelspec"
    r"|(?:git_)?commit(?:_hash)?|git_(?:sha|hash|revision)|(?:docker|container|singularity)_(?:image|digest|tag)"
    r"|platform|os|kernel_(?:release|version)|sysname|producer|creator|created_by"
)
"""Name of a field, in snake case, that belongs to the environment with all that is below it."""

_TIME_FIELD = re.compile(
    r"(?:^|_)(?:time|date|datetime|timestamp|stamp|created|creation|modified|updated|generated|epoch|started|finished"
    r"|ended|start|end|begin|stop|when|mtime|ctime|atime|at|on)(?:_|$)"
)
_EPOCHS = tuple((1e9 * unit, 4.2e9 * unit) for unit in (1.0, 1e3, 1e6, 1e9))
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
# Numbers alone hold no time, host or path; a date has its parts joined by a dash or two dots.
_PLAIN = re.compile(r"[\s\d.+\-eE,;|]*")
_DATE_LIKE = re.compile(r"\d-\d|\.\d+\.|(?<!\d)(?:19|20)\d{6}[-_T]?\d{6}")
_MAX_PIECE = 20_000


class FieldKind(Enum):
    """What the name of a field says about its value."""

    RESULT = "result"
    VOLATILE = "volatile"
    ENVIRONMENT = "environment"


@dataclass(frozen=True)
class Cleaned:
    """A text without what is volatile.

    Attributes:
        text: The text, with the kind of what was taken out in its place, such as `<time>`.
        versions: The versions that were taken out.
    """

    text: str
    versions: tuple[str, ...] = ()


class Volatile:
    """The table, with what the rules add to it.

    Args:
        added: Regular expressions by name.
    """

    def __init__(self, added: Mapping[str, str]) -> None:
        rows = [*added.items(), *PATTERNS]
        self._kinds = [kind for kind, _ in rows]
        self._any = re.compile("|".join(f"(?P<k{i}>{pattern})" for i, (_, pattern) in enumerate(rows)), re.MULTILINE)
        self._has_added = bool(added)
        self._fields = re.compile("|".join(pattern for _, pattern in VOLATILE_FIELDS))
        self._environment = re.compile(ENVIRONMENT_FIELDS)

    def clean(self, text: str) -> Cleaned:
        """Take out what is volatile.

        Args:
            text: A line, a cell, a value.

        Returns:
            The rest.
        """
        if not self._has_added and _PLAIN.fullmatch(text) and not _DATE_LIKE.search(text):
            return Cleaned(text)
        versions: list[str] = []

        def placeholder(match: re.Match[str]) -> str:
            kind = self._kinds[int((match.lastgroup or "k0")[1:])]
            if kind == "version":
                versions.append(" ".join(match.group().split()))
            return f"<{kind}>"

        # Very long lines hold data rather than prose; pieces keep the time linear.
        pieces = [text[start : start + _MAX_PIECE] for start in range(0, len(text), _MAX_PIECE)] or [""]
        return Cleaned("".join(self._any.sub(placeholder, piece) for piece in pieces), tuple(versions))

    def field(self, path: str) -> FieldKind:
        """Tell what the name of a field says.

        Args:
            path: Its name, or the names from the top down to it, separated by `.` or `/`.

        Returns:
            What it says. Only the last name can make a value volatile; each can make it part of the environment.
        """
        names = _names(path)
        if names and self._fields.fullmatch(names[-1]):
            return FieldKind.VOLATILE
        if any(self._environment.fullmatch(name) for name in names):
            return FieldKind.ENVIRONMENT
        return FieldKind.RESULT

    @staticmethod
    def is_epoch(path: str, value: float) -> bool:
        """Tell whether a number is a time since 1970.

        Args:
            path: The name of its field, as in `field`.
            value: The number.

        Returns:
            Whether the field is named like a time and the value lies between 2001 and 2103, in seconds, milli-, micro-
            or nanoseconds.
        """
        names = _names(path)
        return bool(names and _TIME_FIELD.search(names[-1])) and any(low <= value <= high for low, high in _EPOCHS)


@lru_cache(maxsize=1 << 14)
def _names(path: str) -> tuple[str, ...]:
    """The names from the top down to a field; asked anew for the same file of each run."""
    return tuple(_snake(name) for name in re.split(r"[./]|\[\d*\*?\]", path) if name)


def _snake(name: str) -> str:
    return "_".join(part.lower() for part in _WORDS.split(name) if part)


@lru_cache(maxsize=8)
def _made(added: tuple[tuple[str, str], ...]) -> Volatile:
    return Volatile(dict(added))


def volatile_of(added: Mapping[str, str]) -> Volatile:
    """Give the table with additions, made once for each set of them.

    Args:
        added: Regular expressions by name, as in `Rules.volatile`.

    Returns:
        The table.
    """
    return _made(tuple(added.items()))
