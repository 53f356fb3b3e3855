"""Judge runs on the shell: `python -m prefect_biomed.analysis judge REFERENCES RUNS`.

Exit codes: 0 within, 1 changed, 2 not judged, 3 when it could not be done. Needs neither Prefect nor a platform, so it
fits into any continuous integration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

from pydantic import ValidationError

from prefect_biomed.analysis import (
    Judgement,
    Outcome,
    Report,
    Rules,
    Variability,
    compare_runs,
    judge_runs,
    judge_variability,
    write_report,
)
from prefect_biomed.analysis.comparison import runs_below, series_below
from prefect_biomed.analysis.models import PipelineReport, Verdict
from prefect_biomed.analysis.stability import series_of
from prefect_biomed.clients.errors import BiomedError, ConfigurationError
from prefect_biomed.clients.files import atomic_write

__all__ = ["junit", "main"]

EXIT_CODES = {Outcome.WITHIN: 0, Outcome.CHANGED: 1, Outcome.NOT_JUDGED: 2}
FAILED = 3


class _Parser(argparse.ArgumentParser):
    """Ends with a code of its own: 2, argparse's, means *not judged* here."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Its arguments; those of the process when None.

    Returns:
        The exit code.
    """
    given = _parser().parse_args(arguments)
    try:
        rules = Rules.model_validate_json(given.rules.read_bytes()) if given.rules else Rules()
        references, runs = _runs(given.references, given.unit), _runs(given.runs, given.unit)
        if given.unit == "series" and set(references) & set(runs):
            # Two series of one name are two series.
            runs = {f"{given.runs.name}/{name}": folder for name, folder in runs.items()}
        if given.perturbed and given.unit == "series":
            raise ConfigurationError("Perturbed references are no series; leave --unit or --perturbed out.")
        if given.perturbed:
            checks = Variability(mask=given.mask, smoothing=given.smoothing)
            judgement = judge_variability(references, runs, rules=rules, level=given.level, variability=checks)
        else:
            units = series_of(references, runs) if given.unit == "series" else None
            judgement = judge_runs(references, runs, rules=rules, level=given.level, units=units)
        _write(judgement, given, runs, rules)
    except (BiomedError, OSError, ValidationError) as error:
        print(f"judge: {error}", file=sys.stderr)
        return FAILED
    print(judgement.sentence)
    return EXIT_CODES[judgement.outcome]


def _parser() -> _Parser:
    parser = _Parser(prog="python -m prefect_biomed.analysis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="judge")
    judge = commands.add_parser("judge", help="judge new runs by reference runs", description=__doc__)
    judge.add_argument("references", type=Path, help="folder whose sub-folders hold one reference run each")
    judge.add_argument("runs", type=Path, help="folder whose sub-folders hold one new run each")
    judge.add_argument("--level", type=_level, default=0.05, help="probability of a false alarm (default: 0.05)")
    judge.add_argument("--rules", type=Path, help="JSON file with what is not compared, and tolerances")
    judge.add_argument(
        "--unit",
        choices=["run", "series"],
        default="run",
        help="what is exchanged; with series the folders hold series, and these the runs (default: run)",
    )
    judge.add_argument("--perturbed", action="store_true", help="ask whether the runs are inside perturbed references")
    judge.add_argument("--mask", type=Path, help="with --perturbed: image whose non-zero voxels alone count")
    judge.add_argument("--smoothing", type=float, default=0.0, help="with --perturbed: width in voxels")
    judge.add_argument("--json", type=Path, help="file for the judgement")
    judge.add_argument("--junit", type=Path, help="file for the judgement as JUnit XML, one test case for each file")
    judge.add_argument("--report", type=Path, help="folder for report.html, report.md and report.json")
    return parser


def _level(text: str) -> float:
    level = float(text)
    if not 0.0 < level < 0.5:
        raise argparse.ArgumentTypeError("a number between 0 and 0.5 is needed")
    return level


def _runs(folder: Path, unit: str) -> dict[str, Path]:
    return runs_below(folder) if unit == "run" else series_below(folder)


def _write(judgement: Judgement, given: argparse.Namespace, runs: dict[str, Path], rules: Rules) -> None:
    if given.json:
        _put(given.json, judgement.model_dump_json(indent=2).encode())
    if given.junit:
        _put(given.junit, junit(judgement))
    if given.report:
        name = given.runs.resolve().name
        part = PipelineReport(
            pipeline=name,
            comparison=compare_runs(runs, rules=rules),
            baseline=str(given.references),
            against_baseline=judgement,
        )
        report = Report(
            title="Judgement of runs", series=name, created=datetime.now(UTC), level=given.level, pipelines=(part,)
        )
        write_report(report, given.report, runs={name: runs}, rules=rules)


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)


def junit(judgement: Judgement) -> bytes:
    """Write a judgement as JUnit XML.

    Args:
        judgement: The judgement.

    Returns:
        One suite with a case for the whole, and one for each file that varies or is not judged: changed is a failure,
        not judged is skipped. Agreement and precision of each measure are the output of its file's case.
    """
    changed: dict[str, str] = {}
    for verdict in judgement.verdicts:
        if verdict.changed:
            changed.setdefault(verdict.file, f"{verdict.measure}: p = {verdict.p or 0.0:.2g}. {verdict.reason}".strip())
    skipped: dict[str, str] = {}
    for left in judgement.not_judged:
        skipped.setdefault(left.file, f"{left.part}: {left.reason.value}. {left.detail}".strip(": "))
    names = dict.fromkeys([verdict.file for verdict in judgement.verdicts] + list(changed) + list(skipped))
    suite = ElementTree.Element("testsuite", name="repeatability")
    _case(
        suite,
        "all files",
        judgement.sentence if judgement.outcome is Outcome.CHANGED else None,
        judgement.sentence if judgement.outcome is Outcome.NOT_JUDGED else None,
    )
    for name in names:
        case = _case(suite, name, changed.get(name), skipped.get(name))
        said = [_said(verdict) for verdict in judgement.verdicts if verdict.file == name and verdict.effect is not None]
        if said:
            ElementTree.SubElement(case, "system-out").text = "\n".join(said)
    cases = list(suite)
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
    written: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return written


def _said(verdict: Verdict) -> str:
    """Agreement and precision of one measure."""
    effect = verdict.effect
    if effect is None:
        return ""
    low, high = effect.limits or (None, None)
    columns = {
        "p": verdict.p,
        "bias": effect.bias,
        "lower limit": low,
        "upper limit": high,
        "significant bits of the references": effect.bits_before,
        "significant bits of the new runs": effect.bits,
    }
    return f"{verdict.measure}: " + ", ".join(
        f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in columns.items()
    )


def _case(suite: ElementTree.Element, name: str, changed: str | None, left: str | None) -> ElementTree.Element:
    case = ElementTree.SubElement(suite, "testcase", classname="repeatability", name=name)
    if changed is not None:
        ElementTree.SubElement(case, "failure", message=changed)
    elif left is not None:
        ElementTree.SubElement(case, "skipped", message=left)
    return case


if __name__ == "__main__":
    sys.exit(main())
