"""The three values of a verdict, and why something is not judged: what readers of files and the judgement agree on.

A reader turns one file of one run into a `Content` (see `comparators`). It holds three kinds of parts, each by a name
that is the same in every run:

- `measures`: arrays of numbers. They are tested point by point, over all runs at once.
- `facts`: words, header entries, shapes, anything that is text. Equal or not is all that can be said of them.
- `digests`: what the reader cannot look into, as SHA-256: the whole file when its format is unknown or the reader
  failed, or the part of it that is opaque. `note` says why.

A reader never decides that something does not matter and never raises for the content of a file: what it leaves out is
left out by `Rules`, what it cannot read is a digest. All parts go through one test. What that test cannot see, because
the references themselves disagree about it or lack it, is a `NotJudged` with one `Reason`, and a judgement that is not
*changed* and has any is *not judged*, never *within*.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

__all__ = ["NotJudged", "Outcome", "Reason"]


class Outcome(StrEnum):
    """What a judgement comes to."""

    WITHIN = "within"
    """Nothing has changed that the references do not show themselves, and nothing is left that could hide a change."""
    CHANGED = "changed"
    """Something has changed, at the level that was set."""
    NOT_JUDGED = "not judged"
    """No change was found, and one could be hidden in what is not judged."""


class Reason(StrEnum):
    """Why a part of a file is not judged."""

    OPAQUE = "its format is unknown and the references differ"
    """Nothing but digests, and the references have several."""
    UNREADABLE = "it cannot be read and the references differ"
    """A reader failed, so that there are only digests, and the references have several."""
    WORDS = "the references differ in words, and a new run has others"
    """A fact with several values in the references, and with one in a new run that no reference has."""
    SHAPE = "its shape varies"
    """Numbers that cannot be laid side by side."""
    ABSENT = "some references lack it"
    """A file, a measure or a field that is not in all references."""
    MISSING = "some new runs lack it"
    """The references have it, some new runs do not, and that alone is no evidence of a change."""
    ELSEWHERE = "it leads out of the run or is no file"
    """A link to another place or to nothing, a pipe, a socket: not looked at."""
    NOT_FINITE = "some references have no number there"
    """Points that are NaN or infinite in some references and numbers in others."""
    CONSTANT = "the references are all the same, and only some new runs differ"
    """A part without any noise in the references, from which too few new runs differ to tell."""
    ODD = "only some new runs are far from all references"
    """Many times further than these are from each other, or without numbers, in too few runs to tell."""
    LEFT_OUT = "the references fail their own test"
    """More references than chance allows are outside the variability of the others."""
    TOO_FEW = "there are too few runs"
    """The number of ways to exchange runs does not reach the level."""


class NotJudged(BaseModel):
    """A part of a file that is not judged.

    Attributes:
        file: The file.
        part: Measure, field or digest within it; empty for the whole file.
        reason: Why.
        detail: The same with the numbers of this case, in words; may be empty.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    part: str = ""
    reason: Reason
    detail: str = ""
