"""Why something failed: one list of categories for all platforms, with the line that shows it and what resolves it.

A category is told by what was really said: a line of a log, a status, an exit code, the class of an error. What fits
none is unknown, and stays so: a wrong diagnosis costs more than none.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    CapacityError,
    ConfigurationError,
    DeadlineExceeded,
    HeldElsewhere,
    JobFailed,
    LaunchInDoubt,
    LedgerError,
    LocalStorageError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    PreflightFailed,
    ServerUnavailable,
    SourceUnreadable,
    StorageFull,
    UnexpectedResponse,
    UnsafeContent,
)
from prefect_biomed.clients.texts import one_line

__all__ = ["Category", "Diagnosis", "diagnose"]

_MAX_EVIDENCE = 300


class Category(StrEnum):
    """Why something failed."""

    CREDENTIALS = "credentials"
    PERMISSION = "permission"
    QUOTA = "quota"
    CAPACITY = "capacity"
    LOCAL_DISK = "local-disk"
    REMOTE_DISK = "remote-disk"
    INPUT_MISSING = "input-missing"
    INPUT_UNREADABLE = "input-unreadable"
    PARAMETERS = "parameters"
    NAME_UNKNOWN = "name-unknown"
    TOOL_FAILED = "tool-failed"
    OUT_OF_MEMORY = "out-of-memory"
    OUT_OF_TIME = "out-of-time"
    NODE_OFFLINE = "node-offline"
    IMAGE_MISSING = "image-missing"
    NOT_ALLOWED_AT_NODE = "not-allowed-at-node"
    ENCRYPTION = "encryption"
    NETWORK = "network"
    PLATFORM_DOWN = "platform-down"
    CANCELLED = "cancelled"
    RECORD = "record"
    UNKNOWN = "unknown"


_ADVICE: dict[Category, tuple[str, str]] = {
    Category.CREDENTIALS: (
        "The platform refused the credentials.",
        "PREFECT_BIOMED_…=… python deployments/setup.py --name lab, then prefect flow-run retry",
    ),
    Category.PERMISSION: (
        "The account may not do this.",
        "ask the platform for the right or the group",
    ),
    Category.QUOTA: (
        "The account's space on the platform is full.",
        "prefect-biomed running, remove what is left",
    ),
    Category.CAPACITY: (
        "The platform runs as many jobs as it allows.",
        "wait; queue_timeout_seconds of waiting bounds it",
    ),
    Category.LOCAL_DISK: (
        "The disk where this ran is full or read-only.",
        "make room, then prefect flow-run retry",
    ),
    Category.REMOTE_DISK: (
        "The disk of the machine that computed is full.",
        "tell its operators, then run it again",
    ),
    Category.INPUT_MISSING: (
        "An input is not where it was named.",
        "check input_dir and input_settings",
    ),
    Category.INPUT_UNREADABLE: (
        "An input is damaged or of another kind.",
        "replace the file that the line names",
    ),
    Category.PARAMETERS: ("A parameter has a value that is not taken.", "prefect-biomed show-pipeline"),
    Category.NAME_UNKNOWN: (
        "Something that was named does not exist there.",
        "check the name",
    ),
    Category.TOOL_FAILED: ("The tool itself ended with an error.", "read its log; try its input on this machine"),
    Category.OUT_OF_MEMORY: (
        "The memory of the machine did not suffice.",
        "use smaller inputs or ask for memory",
    ),
    Category.OUT_OF_TIME: (
        "It took longer than it was allowed to.",
        "prefect-biomed resume",
    ),
    Category.NODE_OFFLINE: ("A node is not connected.", "ask its organization to start it: v6 node start"),
    Category.IMAGE_MISSING: ("The image cannot be had where it should run.", "check its name: docker pull IMAGE"),
    Category.NOT_ALLOWED_AT_NODE: (
        "The node does not allow this image or method.",
        "ask its organization to allow the image in the policies of the node",
    ),
    Category.ENCRYPTION: ("The keys of sender and receiver do not fit.", "give the private key of the organization"),
    Category.NETWORK: (
        "The network between here and the platform failed.",
        "prefect flow-run retry",
    ),
    Category.PLATFORM_DOWN: (
        "The platform is out of order for the moment.",
        "prefect flow-run retry",
    ),
    Category.CANCELLED: ("Somebody ended it.", "run it again, if that was not meant"),
    Category.RECORD: ("A record of this package is held, damaged or of a later version.", "the error says which file"),
    Category.UNKNOWN: ("The reason is not known.", "read the log"),
}

# Most telling first: a tool that runs out of memory fails, too.
_SAID: dict[Category, tuple[str, ...]] = {
    Category.OUT_OF_MEMORY: (
        r"out[- ]of[- ]memory",
        r"\boom[- ]?kill",
        r"memoryerror",
        r"cannot allocate memory",
        r"std::bad_alloc",
        r"outofmemoryerror",
        r"java heap space",
        r"unable to allocate [\d.]+ ?[kmgtp]?i?b",
        r"exceeded (its |the )?memory",
        r"\bexit(ed)?( code| status)?[ :=]+137\b",
        r"signal 9\b",
        r"memory limit",
    ),
    Category.IMAGE_MISSING: (
        r"non-existing docker image",
        r"no such image",
        r"manifest (for .* )?(not found|unknown)",
        r"pull access denied",
        r"image .*not found",
        r"(could not|cannot|failed to|unable to) pull",
        r"repository does not exist",
        r"errimagepull",
        r"imagepullbackoff",
    ),
    Category.NOT_ALLOWED_AT_NODE: (
        r"(image|algorithm|method|docker).{0,60}not allowed",
        r"not allowed.{0,40}(image|node|polic)",
        r"blocked by .*polic",
        r"does not allow (this )?(image|algorithm)",
        r"\bnot allowed$",
    ),
    Category.NODE_OFFLINE: (
        r"\bnode.{0,60}(is |are |not )(offline|disconnected|online|connected)",
        r"no node is online",
        r"offline node",
    ),
    Category.ENCRYPTION: (
        r"decrypt(ion)? failed",
        r"cannot (be )?decrypt",
        r"could not decrypt",
        r"bad decrypt",
        r"public key .*(differ|match)",
        r"private key .*(fit|match|wrong|missing)",
    ),
    Category.QUOTA: (
        r"quota (is |was )?(exceeded|reached|full)",
        r"disk quota",
        r"exceed(s|ed)? .{0,30}quota",
        r"storage is full",
    ),
    Category.REMOTE_DISK: (
        r"no space left on device",
        r"enospc",
        r"disk (is )?full",
        r"not enough (free )?(disk )?space",
    ),
    Category.CREDENTIALS: (
        r"(http|status|error|code)[ :=]+401\b",
        r"invalid (api ?key|token|credentials)",
        r"(api ?key|token|credentials?) (is |are |was |were |has |have )?(expired|refused|invalid|revoked)",
        r"authentication (failed|required)",
        r"invalidaccesskeyid",
        r"signaturedoesnotmatch",
        r"wrong password",
        r"not authenticated",
    ),
    Category.PERMISSION: (
        r"(http|status|error|code)[ :=]+403\b",
        r"permission denied",
        r"access ?denied",
        r"not permitted",
        r"unauthorized",
        r"not a member of",
        r"lack the permission",
    ),
    Category.CAPACITY: (
        r"max(imum)? (number of )?(running )?(executions|jobs|workflows).{0,40}reached",
        r"too many (running )?(jobs|executions|requests)",
        r"limit of running",
        r"throttl",
        r"slowdown",
        r"(http|status|error|code)[ :=]+429\b",
    ),
    Category.OUT_OF_TIME: (
        r"wall ?time",
        r"due to time limit",
        r"time limit (exceeded|reached)",
        r"job (was )?timed out",
        r"timeoutexpired",
        r"exceeded .{0,20}(time|deadline)",
        r"\bexit(ed)?( code| status)?[ :=]+124\b",
        r"stalled",
        r"did not end in time",
    ),
    Category.INPUT_MISSING: (
        r"no such file or directory",
        r"filenotfounderror",
        r"file not found",
        r"cannot (find|open) (input|file)",
        r"input.{0,40}(missing|not found|does not exist)",
        r"could not (find|open|download) .{0,40}(file|input)",
        r"\bexit(ed)?( code| status)?[ :=]+40\b",
        r"nosuchkey",
        r"is missing on",
        r"does not exist locally",
    ),
    Category.INPUT_UNREADABLE: (
        r"not a valid nifti",
        r"imagefileerror",
        r"cannot identify image",
        r"badzipfile",
        r"not a gzip",
        r"truncated",
        r"corrupt(ed)?\b",
        r"unicodedecodeerror",
        r"parsererror",
        r"invalid (dicom|header|image)",
        r"bad magic",
        r"crc check failed",
        r"is damaged",
        r"unexpected end of file",
    ),
    Category.PARAMETERS: (
        r"unrecognized arguments?",
        r"invalid (value|choice|option|argument)",
        r"missing \d* ?required",
        r"required (parameter|argument)",
        r"unexpected keyword argument",
        r"keyerror: ['\x22]",
        r"column .{0,40}(not found|missing|does not exist)",
        r"must be (a|an|one of)\b",
        r"validation error",
    ),
    Category.NETWORK: (
        r"connection (refused|reset|broke|failed|aborted|timed out)",
        r"network is unreachable",
        r"name or service not known",
        r"temporary failure in name resolution",
        r"no answer in time",
        r"no route to host",
        r"ssl.{0,30}(error|certificate)",
        r"broken pipe",
    ),
    Category.PLATFORM_DOWN: (
        r"(http|status|error|code)[ :=]+50[0234]\b",
        r"bad gateway",
        r"service unavailable",
        r"gateway time-?out",
        r"internal server error",
        r"out of order",
        r"(down|closed) for maintenance",
    ),
    Category.CANCELLED: (
        r"killed by (the )?user",
        r"cancel+ed",
        r"\bkilled$",
        r"terminated by user",
        r"\bsigterm\b",
        r"aborted by",
    ),
    Category.TOOL_FAILED: (
        r"exited with status [1-9]",
        r"\bexit(ed)?( code| status)?[ :=]+[1-9]\d*\b",
        r"traceback \(most recent",
        r"segmentation fault",
        r"core dumped",
        r"\berror: ",
        r"exception in thread",
        r"algorithm (failed|crashed)",
        r"assertionerror",
        r"runtimeerror",
        r"non-zero exit",
    ),
}
_PATTERNS = {category: re.compile("|".join(said), re.IGNORECASE) for category, said in _SAID.items()}

# Of errors of ours the class says more than the words, except where a job has failed.
_BY_CLASS: tuple[tuple[type[BiomedError], Category], ...] = (
    (AuthenticationError, Category.CREDENTIALS),
    (PermissionDeniedError, Category.PERMISSION),
    (StorageFull, Category.QUOTA),
    (CapacityError, Category.CAPACITY),
    (ServerUnavailable, Category.PLATFORM_DOWN),
    (NotFoundError, Category.NAME_UNKNOWN),
    (LocalStorageError, Category.LOCAL_DISK),
    (SourceUnreadable, Category.INPUT_UNREADABLE),
    (HeldElsewhere, Category.RECORD),
    (LedgerError, Category.RECORD),
    (DeadlineExceeded, Category.OUT_OF_TIME),
    (NetworkError, Category.NETWORK),
    (LaunchInDoubt, Category.NETWORK),
    (UnsafeContent, Category.INPUT_UNREADABLE),
    (UnexpectedResponse, Category.PLATFORM_DOWN),
)


class Diagnosis(NamedTuple):
    """Why something failed.

    Attributes:
        category: The class of the failure.
        summary: One sentence.
        evidence: The line that shows it; empty when the class of the error does.
        command: What resolves it.
    """

    category: Category
    summary: str
    evidence: str
    command: str

    def as_labels(self) -> dict[str, str]:
        """Give what is told, by name, for an event."""
        return self._asdict() | {"category": self.category.value}

    def __str__(self) -> str:
        seen = f" Seen: {self.evidence}" if self.evidence else ""
        return f"{self.category.value}: {self.summary}{seen} What helps: {self.command}."


def diagnose(failure: BaseException | str) -> Diagnosis:
    """Tell why something failed.

    Args:
        failure: An error, or what a platform and a tool have said: status, messages, last lines of logs.

    Returns:
        The diagnosis; `unknown` when nothing tells.
    """
    if isinstance(failure, BiomedError) and not isinstance(failure, JobFailed | PreflightFailed | ConfigurationError):
        for kind, category in _BY_CLASS:
            if isinstance(failure, kind):
                return _made(category, "")
    if not isinstance(failure, BaseException | str):
        return _made(Category.UNKNOWN, "")
    lines = [line for line in str(failure).splitlines() if line.strip()]
    for category, pattern in _PATTERNS.items():
        for line in lines:
            if pattern.search(line):
                return _made(category, line)
    return _made(Category.PARAMETERS if isinstance(failure, PreflightFailed) else Category.UNKNOWN, "")


def _made(category: Category, line: str) -> Diagnosis:
    summary, command = _ADVICE[category]
    return Diagnosis(category, summary, one_line(line.strip(), most=_MAX_EVIDENCE), command)
