"""Judging on the shell, as a continuous integration does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from prefect_biomed.analysis import Judgement
from prefect_biomed.analysis.__main__ import main


def write(folder: Path, count: int, *, shift: float = 0.0, is_opaque: bool = False) -> Path:
    generator = np.random.default_rng([count, int(shift * 100)])
    for number in range(1, count + 1):
        run = folder / f"run {number}"
        run.mkdir(parents=True)
        np.save(run / "brain.npy", np.linspace(50, 150, 600) + generator.standard_normal(600) + shift)
        if is_opaque:
            (run / "private.bin").write_bytes(b"\xff\x00" + generator.bytes(40))
    return folder


@pytest.mark.parametrize(
    ("count", "shift", "is_opaque", "code"),
    [(5, 0.0, False, 0), (5, 3.0, False, 1), (5, 0.0, True, 2), (1, 3.0, False, 2)],
)
def test_the_exit_code_is_the_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, shift: float, is_opaque: bool, code: int
) -> None:
    references = write(tmp_path / "references", 6, is_opaque=is_opaque)
    runs = write(tmp_path / "runs", count, shift=shift, is_opaque=is_opaque)
    files = [f"--json={tmp_path / 'out' / 'j.json'}", f"--junit={tmp_path / 'out' / 'j.xml'}"]
    assert main(["judge", str(references), str(runs), *files]) == code
    said = capsys.readouterr().out.strip()
    judgement = Judgement.model_validate(json.loads((tmp_path / "out" / "j.json").read_text()))
    assert said == judgement.sentence
    suite = ElementTree.fromstring((tmp_path / "out" / "j.xml").read_bytes())
    whole = suite.find("testcase")
    assert whole is not None
    assert [child.tag for child in whole] == {0: [], 1: ["failure"], 2: ["skipped"]}[code]
    assert int(suite.get("failures", "")) == (2 if code == 1 else 0)
    assert int(suite.get("tests", "")) >= 2
    said_of_measures = suite.findtext("testcase[@name='brain.npy']/system-out") or ""
    effect = next(verdict.effect for verdict in judgement.verdicts if verdict.file == "brain.npy")
    assert effect is not None
    assert effect.bias == pytest.approx(shift, abs=0.2)
    assert f"bias {effect.bias:.4g}" in said_of_measures
    assert effect.bits_before == pytest.approx(6.7, abs=0.5)  # 1 of 100
    low, high = effect.limits or (0.0, 0.0)
    assert low < (effect.bias or 0.0) < high
    assert (effect.bits is None) == (count == 1)


def test_what_cannot_be_done_is_none_of_the_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write(tmp_path / "runs", 2)
    assert main(["judge", str(tmp_path / "nothing"), str(runs)]) == 3
    assert "has no sub-folders" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["judge", str(runs)])
    assert ended.value.code == 3


def test_whole_series_are_exchanged_where_weeks_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(5)

    def weeks(folder: Path, count: int) -> Path:
        for week in range(count):
            shift = generator.standard_normal(600)
            for number in range(3):
                run = folder / f"week {week}" / f"run {number}"
                run.mkdir(parents=True)
                np.save(run / "brain.npy", 100.0 + shift + 0.3 * generator.standard_normal(600))
        return folder

    references, runs = weeks(tmp_path / "references", 8), weeks(tmp_path / "runs", 2)
    written = tmp_path / "j.json"
    command = ["judge", str(references), str(runs), f"--json={written}", f"--report={tmp_path / 'report'}"]
    assert main([*command, "--unit=series"]) == 0, capsys.readouterr().out
    judgement = Judgement.model_validate(json.loads(written.read_text()))
    assert (judgement.unit, judgement.units, judgement.labellings) == ("series", (8, 2), 45)
    assert judgement.alike == pytest.approx(0.9, abs=0.1)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "whole series, 8 of references and 2 new were exchanged in 45 ways, all there are" in page
    assert f"an intraclass correlation of {judgement.alike:.2f}" in page
    # Two weeks are too few runs for a single run to be told from its week.
    flat = {side: tmp_path / f"flat {side}" for side in ("references", "runs")}
    for side, folder in (("references", references), ("runs", runs)):
        for number, run in enumerate(sorted(folder.glob("*/*"))):
            shutil.copytree(run, flat[side] / str(number))
    assert main(["judge", str(flat["references"]), str(flat["runs"])]) == 1
    with pytest.raises(SystemExit):
        main([*command, "--unit=week"])


def test_the_shell_has_it_by_name(tmp_path: Path) -> None:
    references, runs = write(tmp_path / "references", 5), write(tmp_path / "runs", 4, shift=3.0)
    command = ["prefect-biomed", "judge", str(references), str(runs), f"--junit={tmp_path / 'j.xml'}"]
    here = Path(sys.executable).with_name(command[0])
    done = subprocess.run(command, executable=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("changed: brain.npy, values (")
    assert (tmp_path / "j.xml").is_file()


@pytest.mark.parametrize(
    ("shift", "is_opaque", "code", "said"),
    [(0.0, False, 0, "::notice::"), (3.0, False, 1, "changed: brain.npy"), (0.0, True, 0, "::warning::not judged")],
)
def test_the_documented_check_tells_the_three_outcomes(
    tmp_path: Path, shift: float, is_opaque: bool, code: int, said: str
) -> None:
    document = (Path(__file__).parents[2] / "docs" / "repeatability.md").read_text()
    workflow = yaml.safe_load(
        next(block for block in re.findall(r"```yaml\n(.*?)```", document, re.DOTALL) if "jobs:" in block)
    )
    steps = workflow["jobs"]["repeatability"]["steps"]
    (script,) = [step["run"] for step in steps if step.get("name") == "Judge"]
    write(tmp_path / "references", 10, is_opaque=is_opaque)
    write(tmp_path / "runs", 5, shift=shift, is_opaque=is_opaque)
    done = subprocess.run(
        ["bash", "-e", "-c", script.replace("python -m", f"{sys.executable} -m")],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout
    assert all((tmp_path / name).is_file() for name in ("judgement.xml", "judgement.json", "report/report.html"))


def test_it_runs_as_a_module_without_prefect(tmp_path: Path) -> None:
    references, runs = write(tmp_path / "references", 5), write(tmp_path / "runs", 4, shift=3.0)
    code = (
        "import runpy, sys; sys.modules['prefect'] = None; sys.argv[0] = 'judge'; "
        "runpy.run_module('prefect_biomed.analysis', run_name='__main__')"
    )
    report = tmp_path / "report"
    done = subprocess.run(
        [sys.executable, "-c", code, "judge", str(references), str(runs), f"--report={report}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("changed: brain.npy, values (")
    assert "changed: brain.npy" in (report / "report.md").read_text()
