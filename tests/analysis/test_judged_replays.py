"""What a replay has shown: digests first, contents after."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from hashlib import md5
from pathlib import Path

import numpy as np

from prefect_biomed.analysis.models import Rules, Tolerance
from prefect_biomed.analysis.replay import Published, Replay, ReplayOutcome, judge_replay

PUBLISHED = {"table.csv": b"region,volume\nbrain,100.0\n", "text.txt.gz": gzip.compress(b"words", mtime=1)}


def published(
    folder: Path,
    now: Mapping[str, bytes],
    *,
    then: Mapping[str, bytes] = PUBLISHED,
    only_digests: tuple[str, ...] = (),
    name: str = "workflow-a",
) -> Published:
    places: dict[str, dict[str, Path]] = {}
    for side, files in (("then", then), ("now", now)):
        for file, content in files.items():
            place = folder / name / side / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            places.setdefault(side, {})[file] = place
    return Published(
        name=name,
        pipeline="Volumes/1.0",
        group="one",
        digests={file: md5(content).hexdigest() for file, content in then.items()},
        places={file: place for file, place in places["then"].items() if file not in only_digests},
        replayed=places.get("now", {}),
    )


def outcome(folder: Path, now: Mapping[str, bytes], **more: tuple[str, ...]) -> Replay:
    return judge_replay([published(folder, now, **more)])  # type: ignore[arg-type]


def test_digests_come_first_and_contents_after(tmp_path: Path) -> None:
    same = outcome(tmp_path / "same", PUBLISHED)
    assert same.outcome is ReplayOutcome.REPRODUCED
    assert same.executions[0].identical == tuple(PUBLISHED)
    stamped = PUBLISHED | {"text.txt.gz": gzip.compress(b"words", mtime=2)}
    later = outcome(tmp_path / "later", stamped)
    assert later.outcome is ReplayOutcome.REPRODUCED
    assert later.executions[0].equal == ("text.txt.gz",)
    moved = PUBLISHED | {"table.csv": b"region,volume\nbrain,110.0\n"}
    other = outcome(tmp_path / "other", moved)
    assert other.outcome is ReplayOutcome.DIFFERS
    assert "table.csv, column volume: 1 of 1 points differ, at most by 10" in other.sentence
    allowed = Rules(tolerances={"*.csv": Tolerance(relative=0.2)})
    assert judge_replay([published(tmp_path / "allowed", moved)], rules=allowed).outcome is ReplayOutcome.REPRODUCED


def test_nothing_is_reproduced_by_absence(tmp_path: Path) -> None:
    lacking = outcome(tmp_path / "lacking", {"table.csv": PUBLISHED["table.csv"]})
    assert lacking.outcome is ReplayOutcome.DIFFERS
    assert "missing: text.txt.gz" in lacking.sentence
    moved = PUBLISHED | {"table.csv": b"region,volume\nbrain,110.0\n"}
    withheld = outcome(tmp_path / "withheld", moved, only_digests=("table.csv",))
    assert withheld.outcome is ReplayOutcome.NOT_JUDGED
    assert "the file itself was not published" in withheld.sentence
    opaque = {"state.bin": b"\x00\x01\xff" * 40}
    unknown = judge_replay([published(tmp_path / "opaque", {"state.bin": b"\x00\x02\xff" * 40}, then=opaque)])
    assert unknown.outcome is ReplayOutcome.NOT_JUDGED
    empty = Published(name="workflow-a", pipeline="Volumes/1.0", group="one", digests={}, places={})
    assert judge_replay([empty]).outcome is ReplayOutcome.NOT_JUDGED
    assert judge_replay([]).outcome is ReplayOutcome.NOT_JUDGED
    logs = {"run.log": b"one"}
    ignored = judge_replay([published(tmp_path / "ignored", {"run.log": b"two"}, then=logs)])
    assert ignored.outcome is ReplayOutcome.NOT_JUDGED


def test_noise_is_judged_by_the_published_runs_where_there_are_enough(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)

    def numbers(shift: float = 0.0) -> dict[str, bytes]:
        values = 100.0 + shift + generator.standard_normal(200)
        return {"values.csv": ("value\n" + "\n".join(f"{value:.6f}" for value in values)).encode()}

    def replay(runs: int, shift: float = 0.0) -> Replay:
        folder = tmp_path / f"{runs} {shift}"
        return judge_replay(
            [published(folder, numbers(shift), then=numbers(), name=f"workflow-{number}") for number in range(runs)]
        )

    assert replay(5).outcome is ReplayOutcome.REPRODUCED
    assert replay(5, shift=2.0).outcome is ReplayOutcome.DIFFERS
    single = replay(1)
    assert single.outcome is ReplayOutcome.DIFFERS
    assert "Too few runs were published to tell whether that is numerical noise" in single.sentence
