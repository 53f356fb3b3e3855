"""Values that ask a BIDS dataset for files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import LedgerError, PreflightFailed
from prefect_biomed.clients.vip import (
    VipClient,
    VipSession,
    launch,
    open_session,
    preflight,
    upload,
    with_bids_files,
)
from prefect_biomed.clients.vip.bids import by_subject
from prefect_biomed.flows.vip_plans import plan_session
from prefect_biomed.sandbox import Sandbox


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two subjects; one has two sessions with two runs, and sidecars, a derivative and a stray file lie beside."""
    folder = tmp_path / "dataset"
    for name in (
        "dataset_description.json",
        "participants.tsv",
        "sub-01/ses-01/anat/sub-01_ses-01_run-01_T1w.nii.gz",
        "sub-01/ses-01/anat/sub-01_ses-01_run-02_T1w.nii.gz",
        "sub-01/ses-01/anat/sub-01_ses-01_run-02_T1w.json",
        "sub-01/ses-02/anat/sub-01_ses-02_T1w.nii.gz",
        "sub-02/ses-01/anat/sub-02_ses-01_T1w.nii.gz",
        "sub-02/ses-01/anat/sub-02_ses-01_T2w.nii.gz",
        "sub-02/ses-01/dwi/sub-02_ses-01_dwi.nii.gz",
        "sub-02/ses-01/dwi/sub-02_ses-01_dwi.bval",
        "derivatives/tool/sub-01/anat/sub-01_desc-brain_T1w.nii.gz",
        "sub-01_T1w.nii.gz.part",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"Name": "d", "BIDSVersion": "1.9.0"}' if name.startswith("dataset_") else name)
    return folder


def session(dataset: Path | None, tmp_path: Path, **settings: Any) -> VipSession:
    home = "/vip/Home/API/s"
    session = VipSession.planned(
        session_name="s",
        pipeline_id="CopyFile/1.0",
        input_settings=settings,
        input_dir=dataset,
        output_dir=tmp_path / "out",
        vip_input_dir=f"{home}/INPUTS",
        vip_output_dir=f"{home}/OUTPUTS",
        token="abcd1234",
        nb_runs=2,
    )
    return with_bids_files(session)


FIRST, SECOND = "sub-01/ses-01/anat/sub-01_ses-01_run-0", "sub-02/ses-01/anat/sub-02_ses-01_T"


@pytest.mark.parametrize(
    ("question", "files"),
    [
        ("suffix=T1w,session=01", [f"{FIRST}1_T1w.nii.gz", f"{FIRST}2_T1w.nii.gz", f"{SECOND}1w.nii.gz"]),
        ("ses=02, suffix=T1w", ["sub-01/ses-02/anat/sub-01_ses-02_T1w.nii.gz"]),
        ("subject=sub-02,datatype=anat", [f"{SECOND}1w.nii.gz", f"{SECOND}2w.nii.gz"]),
        ("suffix=dwi,extension=.bval", ["sub-02/ses-01/dwi/sub-02_ses-01_dwi.bval"]),
        *[(f"run={two}", [f"{FIRST}2_T1w.nii.gz"]) for two in ("2", "02")],
    ],
)
def test_files_are_those_whose_names_say_so(dataset: Path, tmp_path: Path, question: str, files: list[str]) -> None:
    assert session(dataset, tmp_path, file=f"bids:{question}").input_settings == {"file": files}


def test_other_values_stay_as_they_are_and_questions_may_be_elements(dataset: Path, tmp_path: Path) -> None:
    asked = ["bids:suffix=T2w", "participants.tsv", "bids:suffix=T1w,ses=02"]
    settings = session(dataset, tmp_path, file=asked, text="T1w", number=3).input_settings
    files = [f"{SECOND}2w.nii.gz", "participants.tsv", "sub-01/ses-02/anat/sub-01_ses-02_T1w.nii.gz"]
    assert settings == {"file": files, "text": "T1w", "number": 3}


def test_a_file_of_that_name_wins(dataset: Path, tmp_path: Path) -> None:
    (dataset / "bids:suffix=T1w").write_text("odd")
    assert session(dataset, tmp_path, file="bids:suffix=T1w").input_settings == {"file": "bids:suffix=T1w"}


def test_all_that_cannot_be_answered_is_told_at_once(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightFailed) as caught:
        session(dataset, tmp_path, one="bids:suffix=T3w", two="bids:colour=red", three="bids:suffix", four=["bids:"])
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "no file of" in told and "suffix: T1w, T2w, dwi" in told
    assert "no entity 'colour'" in told and "session" in told and "'suffix' is no entity with its label" in told


@pytest.mark.parametrize("which", ["no dataset", "no folder"])
def test_what_is_no_dataset_is_told(dataset: Path, tmp_path: Path, which: str) -> None:
    (dataset / "dataset_description.json").unlink()
    with pytest.raises(PreflightFailed, match="no BIDS dataset" if which == "no dataset" else "no input_dir"):
        session(dataset if which == "no dataset" else None, tmp_path, file="bids:suffix=T1w")


def test_without_the_extra_the_error_tells_it(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bids2table", None)
    with pytest.raises(PreflightFailed, match=r"pip install 'prefect-biomed\[bids\]'"):
        session(dataset, tmp_path, file="bids:suffix=T1w")
    assert session(dataset, tmp_path, file="sub-01").input_settings == {"file": "sub-01"}


def test_files_are_shown_by_subject(dataset: Path, tmp_path: Path) -> None:
    settings = session(dataset, tmp_path, t1="bids:suffix=T1w", t2="bids:suffix=T2w", other=["a.txt", 3]).input_settings
    assert by_subject(settings) == [
        "sub-01  t1: sub-01_ses-01_run-01_T1w.nii.gz, sub-01_ses-01_run-02_T1w.nii.gz, sub-01_ses-02_T1w.nii.gz",
        "sub-02  t1: sub-02_ses-01_T1w.nii.gz",
        "sub-02  t2: sub-02_ses-01_T2w.nii.gz",
    ]


def test_the_plan_shows_the_subjects(vip: Sandbox, dataset: Path, tmp_path: Path) -> None:
    facts = vip.ready()["vip"]
    credentials = VipCredentials(api_key=facts["api_key"], url=facts["url"])
    settings = {"file": "bids:suffix=T1w,session=01"}
    folders = {"input_dir": dataset, "output_dir": tmp_path / "out", "session_name": "planned"}
    plan = plan_session(credentials, None, 1.0, None, pipeline_id="CopyFile/1.0", input_settings=settings, **folders)
    assert plan.jobs == 3
    assert "note     sub-02  file: sub-02_ses-01_T1w.nii.gz" in plan.lines()


def test_one_job_for_each_file_and_no_question_is_sent(vip: Sandbox, dataset: Path, tmp_path: Path) -> None:
    with VipClient(vip.vip.url, vip.ready()["vip"]["api_key"]) as client:
        check = preflight(client, session(dataset, tmp_path, file="bids:suffix=T1w,session=01"))
        assert check.jobs == 3
        home = "/vip/Home/API/s/INPUTS"
        assert check.input_values["file"] == [
            f"{home}/{name}" for name in (f"{FIRST}1_T1w.nii.gz", f"{FIRST}2_T1w.nii.gz", f"{SECOND}1w.nii.gz")
        ]
        unanswered = session(dataset, tmp_path).model_copy(update={"input_settings": {"file": "bids:suffix=T1w"}})
        with pytest.raises(PreflightFailed, match="which was not answered"):
            preflight(client, unanswered)


def test_a_session_that_was_begun_keeps_its_files_whatever_comes_to_the_dataset(
    vip: Sandbox, dataset: Path, tmp_path: Path
) -> None:
    with VipClient(vip.vip.url, vip.ready()["vip"]["api_key"]) as client:
        begun = session(dataset, tmp_path, file="bids:suffix=T2w")
        upload(client, begun, preflight(client, begun))
        launch(client, begun, 1)
        (dataset / "sub-02/ses-01/anat/sub-02_ses-01_run-2_T2w.nii.gz").write_text("later")
        again = session(dataset, tmp_path, file="bids:suffix=T2w")
        assert again == begun
        upload(client, again, preflight(client, again))
        assert launch(client, again, 2).name != launch(client, again, 1).name
        assert open_session(begun.output_dir).questions == {"file": "bids:suffix=T2w"}
        # Another question is answered anew, and is another intent.
        other = session(dataset, tmp_path, file="bids:suffix=T2w,run=2")
        with pytest.raises(LedgerError, match="other settings"):
            upload(client, other, preflight(client, other))
