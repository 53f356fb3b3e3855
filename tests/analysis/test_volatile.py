"""Each row of the table of what is not a change, with what it is for and with what it must leave alone."""

from __future__ import annotations

import re
import time

import pytest
from pydantic import ValidationError

from prefect_biomed.analysis import Rules
from prefect_biomed.analysis.volatile import PATTERNS, FieldKind, volatile_of

TABLE = volatile_of({})

# In the order of the table: what a row takes out whole, and what it must not touch.
EXAMPLES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("2026-03-02", "2026/03/02-09:15:07-GMT", "2026-03-02T09:15:07.123456+00:00", "2026-03-02 09:15:07 UTC",
         "2026:03:02 09:15:07", "2026.03.02.09:15", "2026-03-02, 09:15"),
        ("2026-13-02", "12026-03-02", "2026-03", "0.2026-03-02"),
    ),
    (("2026-03-02_09-15-07", "2026-03-02 0915", "2026-03-02T09h15m07"), ("2026-03-02 mean",)),
    (
        ("20260302-091507", "20260302T091507Z", "20260302_091507.123", "20260302091507", "20260302-091507_4f1c"),
        ("20261302-091507", "120260302091507", "20260302-291507"),
    ),
    (("20260302",), ("20260302 voxels",)),
    (
        ("15-May-2026 10:15", "2 March 2026", "Mon, 02 Mar 2026 10:15:00 +0100", "02/Mar/2026:10:15:00",
         "2nd March, 2026", "02-MAR-2026 10:15:00.5"),
        ("15-Max-2026", "May be 2026", "115-May-20261"),
    ),
    (("02-Mar-26 10:15",), ("02-Mar",)),
    (
        ("March 2, 2026 at 09:15", "Mar 2nd 2026", "Monday, March 2, 2026, 9:15 AM", "Mar. 2, 2026"),
        ("March 2, mean 2026.5", "Maria 2, 2026"),
    ),
    (("Mon Mar  2 10:15:00 CET 2026", "Mar  2 10:15:00", "Tue Mar 4 10:11:12 2024"), ("Mar 2 of 10",)),
    (("02.03.2026", "3/2/2026, 9:15 PM", "02-03-2026 09:15:07"), ("1.02.03.2026", "02.03.20261", "2/3/4")),
    (("3/2/26, 9:15 AM", "03/02/26 09:15:07"), ("3/2/26", "1/2/3 4")),
    (("09:15:07", "09:15:07.123", "9:15:07 PM", "09:15:07+01:00"), ("9:15", "1:2:3", "0:10:20:30")),
    (("9:15 AM", "09:15 p.m."), ("9:15 ml",)),
    (("at 09:15",), ("ratio 09:15", "at 9")),
    (
        ("created: 1772442907", "timestamp=1772442907.25", 'start_time": 1772442907123', "mtime_epoch = 1772442907"),
        ("volume: 1772442907", "created: 12", "onset time 1772"),
    ),
    (
        ("elapsed time: 12.5 s", "Elapsed 00:12:07", "runtime 3 hours 5 minutes", "wall clock = 17.2",
         "CPU time (s): 12", "wall-clock time 2 min 3 s", "run-time-hours 4.32", "total time is 2h"),
        ("echo time: 30 ms", "repetition time = 2.5", "time 2.5", "relaxation time: 80"),
    ),
    (
        ("took 12.3 seconds", "Finished registration in 3 min 2 s", "done in 5 s", "converged after 2.5 minutes"),
        ("took 3 subjects", "converged after 12 iterations", "found in 3 subjects"),
    ),
    (("1h 23m 4s", "0 hours, 2 minutes, 3.5 seconds"), ("1h", "4m 3s", "h1 2m 3s")),
    (("peak memory: 12.5 GB", "maximum resident set size = 1234", "VmPeak: 123 kB", "max rss 12M"),
     ("peak 12.5", "rss 3")),
    (("alice@node12", "alice.b@lab.example.org"), ("3@4", "alice @ node")),
    (("created by alice on node12.cluster",), ("created by hand", "created by 3 of")),
    (("hostname: node12", "Host = a.b.c", 'node_name": "n1', "machine: gpu-3"),
     ("host of 12", "node: 12", "ghost: 3x")),
    (("# hostname node12", "% machine x86_64"), ("hostname", "the hostname is")),
    (("Running on node12", "executed on host gpu3.lab", "ran on server a1"), ("run on Linux", "based on node")),
    (("user: alice", "username=bob", "run by: alice", "LOGNAME=x"), ("user friendly", "users: 3")),
    (("# user     alice", "; username bob"), ("# users 3", "the user alice")),
    (("pid 1234", "PID: 1234", "[pid 7"), ("rapid 3", "lipid: 12")),
    (("process id: 1234", "job-id=12345", "thread_id 77", "Job #123"), ("jobs: 12", "task: 12", "process: mean")),
    (("process 1234",), ("process 1", "processes 12")),
    (("[1234]",), ("row [12]", "a[3]", "a[34] = 1")),
    (("slurm-123456", "SLURM_12"), ("slurm job",)),
    (
        ("/tmp/tmpabc123/work/a.nii", "/scratch/alice/x", "/var/folders/xy/T/a", "/data/lab/tmp/j1/out.nii",
         "file:///tmp/a", "/dev/shm/x"),
        ("/data/atlas/tmpl.nii", "a/b/c", "/template/x"),
    ),
    (("C:\\Users\\al\\AppData\\Local\\Temp\\x1\\a.txt", "D:\\temp\\y"), ("C:\\data\\a.txt",)),
    (("/home/alice", "/Users/bob"), ("/data/home", "a/home/x")),
    (("C:\\Users\\alice",), ("C:\\Windows",)),
    (("tmpab12cd34", "tmp.Xy12Zw"), ("template", "tmp", "tmp_1")),
    (("123e4567-e89b-42d3-a456-426614174000",), ("123e4567-e89b", "12345678-1234-1234-1234-12345678901")),
    (("1.2.840.113619.2.55.3.12345", "2.25.1.2.3.4.5.6"), ("1.2.3", "3.2.840.113619.2.55.3.12345")),
    (("0x7f8a2c001d30",), ("0x1f", "0xzzzzzzzz")),
    (("run_4f1c9a2b", "session-id: 0a1b2c3d", "job=9f8e7d6c5b"),
     ("run_12345678", "task-rest", "run-abcdef", "sub-4f1c9a2b")),
    (("$Id: mri.c,v 1.2 2016/05/31 greve Exp $", "$Revision: 1.9 $"), ("$CONC 26 lines", "$5")),
    (("version 7.4", "Version: 20.2.1+5.gab", "release 2", "build: 1234abcd"),
     ("version of record", "conversion 3", "rebuild 2")),
    (("v1.2.3", "v2.0"), ("v2", "rev1.2.3", "1.2")),
    (("20.2.1", "5.15.0-91-generic", "freesurfer-7.4.1", "3.9.2rc1"), ("20.2", "1.2e3", "12.5 3")),
    (("FSL 6.0.5", "Python 3.11", "matplotlib/3.9"), ("FSL mask", "Python code", "SPM 12")),
)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "examples", "counter_examples"),
    [
        pytest.param(row, *pair, id=f"{number}-{row[0]}")
        for number, (row, pair) in enumerate(zip(PATTERNS, EXAMPLES, strict=True))
    ],
)
def test_each_row_takes_what_it_is_for(
    row: tuple[str, str], examples: tuple[str, ...], counter_examples: tuple[str, ...]
) -> None:
    # What stands before belongs to the conditions of some rows.
    before = {3: "run_", 28: "prog"}.get(PATTERNS.index(row), "")
    after = {28: ":"}.get(PATTERNS.index(row), "")
    for example in examples:
        found = re.search(row[1], before + example + after, re.MULTILINE)
        assert found is not None, example
        assert found.group().strip() == example.lstrip("[") or found.group() == example, (example, found.group())
    for example in counter_examples:
        assert not re.search(row[1], example, re.MULTILINE), example


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" Data of: 15-May-2026 10:15", " Data of: <time>"),
        ("QC of March 2, 2026 at 09:15", "QC of <time>"),
        ("# CreationTime 2026/03/02-09:15:07-GMT", "# CreationTime <time>"),
        ("run_20260302-091507_4f1c", "run_<time>"),
        ("mean 3.14 mm, sd 2e-05", "mean 3.14 mm, sd 2e-05"),
        ("Left-Hippocampus 4012.5", "Left-Hippocampus 4012.5"),
        ("1 2 3 -4.5e-3", "1 2 3 -4.5e-3"),
        ("sub-01_ses-02_T1w.nii.gz", "sub-01_ses-02_T1w.nii.gz"),
        ("p < 0.05, t(19) = 2.1", "p < 0.05, t(19) = 2.1"),
        ("slices 10:20, ratio 1:2", "slices 10:20, ratio 1:2"),
    ],
)
def test_texts_keep_their_results(text: str, cleaned: str) -> None:
    assert TABLE.clean(text).text == cleaned


def test_versions_are_told_apart() -> None:
    found = TABLE.clean("fMRIPrep 23.2.1 on Python 3.11, mean 3.14")
    assert found.versions == ("23.2.1", "Python 3.11")
    assert found.text == "fMRIPrep <version> on <version>, mean 3.14"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("$.provenance.hostname", FieldKind.VOLATILE),
        ("$.elapsedSeconds", FieldKind.VOLATILE),
        ("$.wall_time_s", FieldKind.VOLATILE),
        ("$.run_uuid", FieldKind.VOLATILE),
        ("$.PID", FieldKind.VOLATILE),
        ("peak_memory_gb", FieldKind.VOLATILE),
        ("$.software_version", FieldKind.ENVIRONMENT),
        ("$.GeneratedBy[0].Name", FieldKind.ENVIRONMENT),
        ("$.packages.numpy", FieldKind.ENVIRONMENT),
        ("$.kernel_release", FieldKind.ENVIRONMENT),
        ("$.smoothing.kernel[2]", FieldKind.RESULT),
        ("$.rss", FieldKind.RESULT),
        ("$.duration", FieldKind.RESULT),
        ("$.RepetitionTime", FieldKind.RESULT),
        ("$.host.volume", FieldKind.RESULT),
        ("$.conversion", FieldKind.RESULT),
    ],
)
def test_names_of_fields(path: str, kind: FieldKind) -> None:
    assert TABLE.field(path) is kind


@pytest.mark.parametrize(
    ("path", "value", "is_time"),
    [
        ("$.created", 1772442907.0, True),
        ("$.startTime", 1772442907123, True),
        ("$.created", 12.0, False),
        ("$.volume", 1772442907.0, False),
        ("$.RepetitionTime", 2.5, False),
    ],
)
def test_seconds_since_1970_only_in_fields_named_so(path: str, value: float, is_time: bool) -> None:
    assert TABLE.is_epoch(path, value) is is_time


def test_rules_add_to_the_table() -> None:
    added = volatile_of(Rules(volatile={"scanner": r"SCN-\d+"}).volatile)
    assert added.clean("at SCN-17 on 2026-03-02").text == "at <scanner> on <time>"
    with pytest.raises(ValidationError, match="is no regular expression"):
        Rules(volatile={"broken": "("})


def test_no_text_makes_it_slow() -> None:
    began = time.process_time()
    for text in (
        "1" * 50_000,
        "a" * 50_000,
        "/a" * 25_000,
        "1.1" * 20_000,
        "run " * 12_000,
        "2026-" * 10_000,
        "x@" * 25_000,
    ):
        TABLE.clean(text)
    assert time.process_time() - began < 10.0
