"""Judging on the shell, as a continuous integration does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

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


def test_what_cannot_be_done_is_none_of_the_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write(tmp_path / "runs", 2)
    assert main(["judge", str(tmp_path / "nothing"), str(runs)]) == 3
    assert "has no sub-folders" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["judge", str(runs)])
    assert ended.value.code == 3


def test_the_shell_has_it_by_name(tmp_path: Path) -> None:
    references, runs = write(tmp_path / "references", 5), write(tmp_path / "runs", 4, shift=3.0)
    command = ["prefect-biomed", "judge", str(references), str(runs), f"--junit={tmp_path / 'j.xml'}"]
    here = Path(sys.executable).with_name(command[0])
    done = subprocess.run(command, executable=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("changed: brain.npy, values (")
    assert (tmp_path / "j.xml").is_file()


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
