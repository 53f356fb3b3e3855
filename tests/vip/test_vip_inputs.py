"""From what a user types to what the platform understands."""

import json
import os
import re
import socket
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import pytest

from prefect_biomed.clients.crates import Execution, Provenance, write_crate
from prefect_biomed.clients.errors import AuthenticationError, PreflightFailed, ServerUnavailable
from prefect_biomed.clients.vip import InputValue, Preflight, VipClient, VipSession, describe, preflight
from prefect_biomed.clients.vip.local_files import InputFolder
from prefect_biomed.clients.vip.models import Parameter, ParameterType, Pipeline
from prefect_biomed.clients.vip.preflight import stored_name
from prefect_biomed.clients.vip.profiles import CARMIN, VIP
from prefect_biomed.clients.vip.values import named_values
from prefect_biomed.sandbox import Fault, Sandbox

HOME = "/vip/Home/API/s"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip") as sandbox:
        yield sandbox


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[VipClient]:
    sandbox.vip.faults.clear()
    sandbox.vip.journal.clear()
    with VipClient(sandbox.vip.url, sandbox.ready()["vip"]["api_key"]) as client:
        yield client
    assert {entry.method for entry in sandbox.vip.journal} <= {"GET"}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with some files; the current folder has files of the same names, to be mistaken for them."""
    folder = tmp_path / "in"
    for place in (folder, tmp_path / "here"):
        (place / "sub" / "deep").mkdir(parents=True)
        for name in ("a.txt", "b.txt", "hello", "sub/c.txt", "sub/deep/d.txt", "with space.txt"):
            (place / name).write_text(name)
    monkeypatch.chdir(tmp_path / "here")
    return folder


Check = Callable[..., Preflight]


@pytest.fixture
def check(client: VipClient, inputs: Path, tmp_path: Path) -> Check:
    def check(
        pipeline_id: str | None = "EveryType/1.0", include: Any = (), exclude: Any = (), **settings: Any
    ) -> Preflight:
        session = VipSession(
            session_name="s",
            pipeline_id=pipeline_id,
            input_settings=settings,
            input_dir=inputs,
            output_dir=tmp_path / "out",
            vip_input_dir=f"{HOME}/INPUTS",
            vip_output_dir=f"{HOME}/OUTPUTS",
            token="t0k3n",
        )
        return preflight(client, session, include=include, exclude=exclude)

    return check


def problems(check: Check, **settings: Any) -> list[str]:
    with pytest.raises(PreflightFailed) as caught:
        check(**settings)
    return list(caught.value.problems)


# -- names of files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("plain.txt", "plain.txt"),
        ("a b é.txt", "a_b_e.txt"),
        (" trimmed ", "trimmed"),
        ("a  b", "a__b"),
        ("naïve-Ångström.nii.gz", "naive-Angstrom.nii.gz"),
        ("ﬁne", "fine"),
        ("x²", "x2"),
        ("日本.txt", ".txt"),
        ("日本", ""),
        ("a#b?c%41+d", "a#b?c%41+d"),
        ("tab\there", "tab\there"),
        ("a\u00a0b.txt", "a_b.txt"),
        ("a\u2003b.txt", "a_b.txt"),
        ("a\uff0fb.txt", "a_b.txt"),
        ("\u2025", "__"),
        ("\u2024", "_"),
        ("\u2026", "..."),
        ("e\u0301t\u00e9", "ete"),
        ("\u05e9\u05dc\u05d5\u05dd.nii", ".nii"),
        ("\U0001f9e0 brain.nii", "_brain.nii"),
        (" \u00a0 ", ""),
    ],
)
def test_names_are_stored_as_the_sandbox_stores_them(client: VipClient, name: str, stored: str) -> None:
    assert stored_name(name) == stored
    assert stored_name(name, CARMIN) == name


@pytest.mark.parametrize(
    "name", ["a b é.txt", "naïve-Ångström.nii.gz", "x²", "a#b?c%41+d", "a\u00a0b", "\u2025", "a\uff0fb"]
)
def test_mapping_agrees_with_the_platform(sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with VipClient(sandbox.vip.url, sandbox.ready()["vip"]["api_key"]) as client:
        folder = f"/vip/Home/names-{tmp_path.name}"
        client.make_folder(folder)
        client.put_file(tmp_path / name, f"{folder}/{stored_name(name)}")
        assert [entry.name for entry in client.list_folder(folder)] == [stored_name(name)]


# -- which files -------------------------------------------------------------------------------------------------------


def test_all_files_and_their_folders(check: Check) -> None:
    plan = check(text="x")
    assert [file.local_name for file in plan.files] == [
        "a.txt",
        "b.txt",
        "hello",
        "with space.txt",
        "sub/c.txt",
        "sub/deep/d.txt",
    ]
    assert plan.folders == ("sub", "sub/deep")
    assert {file.name for file in plan.files} == {
        "a.txt",
        "b.txt",
        "hello",
        "with_space.txt",
        "sub/c.txt",
        "sub/deep/d.txt",
    }
    assert plan.bytes == sum(len(file.local_name) for file in plan.files)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["a.txt"], [], ["a.txt"]),
        (["*.txt"], ["sub/*"], ["a.txt", "b.txt", "with space.txt"]),
        (["sub/*"], [], ["sub/c.txt", "sub/deep/d.txt"]),
        (["d.txt"], [], ["sub/deep/d.txt"]),
        ([], ["*.txt"], ["hello"]),
        (["A.TXT", "hello"], [], ["hello"]),
        (["[ab].txt"], ["b.*"], ["a.txt"]),
    ],
)
def test_patterns(check: Check, include: list[str], exclude: list[str], expected: list[str]) -> None:
    assert [file.local_name for file in check(include=include, exclude=exclude, text="x").files] == expected


def test_patterns_that_let_nothing_through_are_told(check: Check) -> None:
    (problem,) = problems(check, include=["*.nii"], text="x")
    assert re.search("holds no file that the include and exclude patterns let through", problem)


def test_excluded_files_are_not_checked(check: Check, inputs: Path) -> None:
    (inputs / "empty").touch()
    (inputs / "a b").write_text("1")
    (inputs / "a_b").write_text("2")
    assert len(problems(check, text="x")) == 2
    check(exclude=["empty", "a b"], text="x")


def test_links_are_followed_but_not_in_circles(check: Check, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.txt").write_text("e")
    (inputs / "linked").symlink_to(tmp_path / "elsewhere")
    (inputs / "linked.txt").symlink_to(tmp_path / "elsewhere" / "e.txt")
    assert {"linked/e.txt", "linked.txt"} <= {file.name for file in check(text="x").files}
    (inputs / "sub" / "up").symlink_to(inputs)
    (inputs / "sub" / "self").symlink_to(inputs / "sub")
    assert problems(check, text="x") == [
        "'sub/self' is a link to a folder it lies in. Exclude it.",
        "'sub/up' is a link to a folder it lies in. Exclude it.",
    ]
    check(exclude=["sub/self", "sub/up"], text="x")


def test_what_is_no_file_is_told(check: Check, inputs: Path) -> None:
    (inputs / "gone").symlink_to(inputs / "nowhere")
    os.mkfifo(inputs / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(inputs / "socket"))
        found = problems(check, text="x")
    assert [re.sub(r"/.*/", "", problem) for problem in found] == [
        "gone cannot be read: No such file or directory.",
        "'pipe' is neither a file nor a folder. Exclude it.",
        "'socket' is neither a file nor a folder. Exclude it.",
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a b.txt", "a_b.txt"),
        ("a\u00a0b.txt", "a b.txt"),
        ("\u65e5\u672c.nii", "\u4e2d\u56fd.nii"),
        ("x y/a.txt", "x_y/b.txt"),
        ("x y/a.txt", "x_y"),
    ],
)
def test_names_that_become_one_are_told(check: Check, inputs: Path, one: str, other: str) -> None:
    for name in (one, other):
        (inputs / name).parent.mkdir(exist_ok=True)
        (inputs / name).write_text(name)
    (problem,) = problems(check, text="x")
    assert "would both be stored as" in problem
    check(text="x", exclude=[other])


@pytest.mark.parametrize(("here", "given"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_name_that_looks_the_same_is_the_same(check: Check, inputs: Path, here: Any, given: Any) -> None:
    local, value = (unicodedata.normalize(form, "\u00e9t\u00e9/\u00e9.txt") for form in (here, given))
    (inputs / local).parent.mkdir()
    (inputs / local).write_text("x")
    for name in (value, str(inputs / value), f"./{value}"):
        plan = check(text="x", file=[name, value.partition("/")[0]], include=[value])
        assert plan.input_values["file"] == [f"{HOME}/INPUTS/ete/e.txt", f"{HOME}/INPUTS/ete"]
    (inputs / value).parent.mkdir()
    (inputs / value).write_text("y")
    assert all("would both be stored as" in problem for problem in problems(check, text="x", file=value))


def test_name_that_grows_too_long_is_told(check: Check, inputs: Path) -> None:
    (inputs / ("\u33c2" * 80)).write_text("x")
    (problem,) = problems(check, text="x")
    assert "more than 255 bytes" in problem


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x7fb", "d\re/f"])
def test_control_characters_in_names_are_told(check: Check, inputs: Path, name: str) -> None:
    (inputs / name).parent.mkdir(exist_ok=True)
    (inputs / name).write_text("x")
    (problem,) = problems(check, text="x")
    assert f"{name!r} has a control character in its name" in problem


def test_what_will_be_renamed_is_shown(check: Check) -> None:
    assert check(text="x").renamed == {"with space.txt": "with_space.txt"}


def test_what_belongs_to_sessions_is_not_sent(check: Check, inputs: Path, tmp_path: Path) -> None:
    """Session files, locks and output folders of any session, by what they are and not by what they are called."""
    session_file = '{"session_name": "other", "workflows": {}}'
    for name, content in {
        "session_data.json": session_file,
        ".locks/upload.lock": "",
        "vip_outputs/other/session_data.json": session_file,
        "vip_outputs/other/r001-abcd/result.txt": "r",
        "vip_outputs/kept-remotely/.locks/upload.lock": "",
        "vip_outputs/kept-remotely/r001-abcd/result.txt": "r",
        "study/session_data.json": '{"of": "the user"}',
        "study/scan.nii": "s",
        "r001-abcd/not-ours.txt": "n",
    }.items():
        (inputs / name).parent.mkdir(parents=True, exist_ok=True)
        (inputs / name).write_text(content)
    (inputs / "elsewhere").symlink_to(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.txt").write_text("r")
    plan = check(text="x", exclude=["a.txt", "b.txt", "hello", "with space.txt", "c.txt", "d.txt"])
    assert [file.local_name for file in plan.files] == ["r001-abcd/not-ours.txt", "study/scan.nii"]
    assert sorted(plan.left_out) == [
        ".locks",
        "elsewhere",
        "session_data.json",
        "study/session_data.json",
        "vip_outputs/kept-remotely",
        "vip_outputs/other",
    ]


def test_inputs_and_outputs_in_one_folder(client: VipClient, inputs: Path, tmp_path: Path) -> None:
    (inputs / "r001-t0k3n").mkdir()
    (inputs / "r001-t0k3n" / "result.txt").write_text("r")
    (inputs / "session_data.json").write_text("{}")
    (tmp_path / "link").symlink_to(inputs)
    session = VipSession(
        session_name="s",
        input_dir=inputs,
        output_dir=tmp_path / "link",
        vip_input_dir=f"{HOME}/INPUTS",
        vip_output_dir=f"{HOME}/OUTPUTS",
        token="t0k3n",
    )
    plan = preflight(client, session)
    assert plan.left_out == ("r001-t0k3n", "session_data.json")
    assert len(plan.files) == 6


@pytest.mark.parametrize("place", ["session_data.json", ".locks/session_data.json"])
def test_what_sessions_have_left_in_the_input_folder_is_known_by_their_record(tmp_path: Path, place: str) -> None:
    """Outputs lie where platforms and vip-client have put them, and their provenance beside them."""
    outputs = [{"path": f"{HOME}/OUTPUTS/2026-01-02_030506/b.tgz"}, {"path": f"{HOME}/OUTPUTS/top.tgz"}, {"path": "x"}]
    record = {
        "session_name": "s",
        "pipeline_id": "CopyFile/1.0",
        "input_settings": {},
        "vip_output_dir": f"{HOME}/OUTPUTS",
        "workflows": {"3f2a-77": {"status": "Finished", "start": "2026/01/02 03:04:05", "outputs": outputs}},
    }
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(json.dumps(record))
    ended = Execution(
        address="https://vip.example/3f2a-77", name="s", error=None, began=datetime.now(UTC), ended=datetime.now(UTC)
    )
    provenance = Provenance(
        name="s",
        flow="vip-session",
        parameters={},
        platform="VIP",
        platform_url="https://vip.example",
        program="CopyFile/1.0",
        program_version="1.0",
        program_address="https://vip.example/pipelines/CopyFile",
        executions=(ended,),
    )
    write_crate(tmp_path, provenance)
    ours = ["3f2a-77/a.txt", "2026-01-02_030506/b.tgz", "top.tgz", "top.tgz.content/c"]
    mine = ["2026-01-02_030507/a.txt", "a.txt", "sub/README.md", "sub/top.tgz"]
    for name in (*ours, *mine):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert sorted(file.name for file in InputFolder(tmp_path, tmp_path, CARMIN).files) == mine
    (tmp_path / "README.md").write_text("Of the user.")
    assert sorted(file.name for file in InputFolder(tmp_path, tmp_path, CARMIN).files) == sorted(["README.md", *mine])
    # Before there is a record, a crate is the user's, and would be replaced.
    (tmp_path / place).unlink()
    assert [one for one in InputFolder(tmp_path, tmp_path, CARMIN).problems if "ro-crate-metadata.json" in one]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("a\udcff.txt", "'a\\udcff.txt' of type str has bytes in it that are no text"),
        (["x", Path("a\udcff")], "element 1: PosixPath('a\\udcff') of type PosixPath has bytes in it"),
        (numpy.ma.masked, "masked of type MaskedConstant is no value"),
        (memoryview(b"x"), "b'x' of type bytes is no value"),
    ],
)
def test_what_is_no_value_is_told_with_its_type(value: object, told: str) -> None:
    with pytest.raises(ValueError, match="'x': ") as caught:
        named_values({"x": value})
    assert told in str(caught.value)
    assert "expected is" in str(caught.value)


def test_name_that_is_no_text_is_refused_where_names_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.txt").write_text("x")
    (problem,) = InputFolder(tmp_path, tmp_path / "out", CARMIN).problems
    assert "has bytes in its name that are no text" in problem
    assert [file.name for file in InputFolder(tmp_path, tmp_path / "out", VIP).files] == ["a.txt"]


# -- what is a file and what is a text ---------------------------------------------------------------------------------


def test_texts_are_never_mistaken_for_files(check: Check) -> None:
    """`hello`, `a.txt` and `sub/c.txt` are files in the input folder and in the current folder."""
    values = check(text="hello", comment="sub/c.txt", words=["a.txt", "hello", "sub/c.txt"]).input_values
    assert values == {"text": "hello", "comment": "sub/c.txt", "words": ["a.txt", "hello", "sub/c.txt"]}


def test_files_are_named_in_every_way(check: Check, inputs: Path) -> None:
    given: list[InputValue] = [
        "sub/c.txt",
        "./a.txt",
        "sub/../b.txt",
        str(inputs / "hello"),
        inputs / "sub" / "deep" / "d.txt",  # type: ignore[list-item]  # pydantic makes a text of it
        Path("with space.txt"),  # type: ignore[list-item]  # the same
    ]
    values = check(text="x", file=given[0], files=given).input_values
    assert values["file"] == f"{HOME}/INPUTS/sub/c.txt"
    assert values["files"] == [
        f"{HOME}/INPUTS/{name}" for name in ("sub/c.txt", "a.txt", "b.txt", "hello", "sub/deep/d.txt", "with_space.txt")
    ]


def test_folder_can_be_a_value(check: Check) -> None:
    assert check(text="x", file="sub").input_values["file"] == f"{HOME}/INPUTS/sub"


def test_whole_folder_and_empty_folder_can_be_values(check: Check, inputs: Path) -> None:
    (inputs / "nothing in it" / "deeper").mkdir(parents=True)
    for name in (".", "./", str(inputs), "sub/..", f"{HOME}/INPUTS"):
        assert check(text="x", file=name).input_values["file"] == f"{HOME}/INPUTS"
    plan = check(text="x", file="nothing in it/deeper")
    assert plan.input_values["file"] == f"{HOME}/INPUTS/nothing_in_it/deeper"
    assert plan.folders == ("nothing_in_it", "nothing_in_it/deeper", "sub", "sub/deep")
    assert check(text="x").folders == ("sub", "sub/deep")


def test_empty_folder_whose_name_is_taken_is_told(check: Check, inputs: Path) -> None:
    (inputs / "with_space.txt").mkdir()
    told = problems(check, text="x", file="with_space.txt")
    assert told[0] == "'with space.txt' and 'with_space.txt/' would both be stored as 'with_space.txt'. Rename one."


def test_links_are_resolved_on_both_sides(
    client: VipClient, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.txt").write_text("e")
    (inputs / "linked").symlink_to(tmp_path / "elsewhere")
    (inputs / "linked.txt").symlink_to(tmp_path / "elsewhere" / "e.txt")
    (tmp_path / "link").symlink_to(inputs)
    (tmp_path / "here" / "to-a.txt").symlink_to(inputs / "a.txt")
    expected = {
        str(inputs / "a.txt"): "a.txt",
        str(tmp_path / "link" / "a.txt"): "a.txt",
        str(tmp_path / "here" / "to-a.txt"): "a.txt",
        "to-a.txt": "a.txt",
        "../in/sub/c.txt": "sub/c.txt",
        str(tmp_path / "link" / "linked.txt"): "linked.txt",
        "linked/e.txt": "linked/e.txt",
        str(tmp_path / "elsewhere" / "e.txt"): "linked.txt",
        str(tmp_path / "elsewhere"): "linked",
        "sub/../b.txt": "b.txt",
        "linked/../in/b.txt": "b.txt",
    }
    for input_dir in (inputs, tmp_path / "link"):
        session = VipSession(
            session_name="s",
            pipeline_id="EveryType/1.0",
            input_settings={"text": "x", "files": list(expected)},
            input_dir=input_dir,
            output_dir=tmp_path / "out",
            vip_input_dir=f"{HOME}/INPUTS",
            vip_output_dir=f"{HOME}/OUTPUTS",
            token="t0k3n",
        )
        found = preflight(client, session).input_values["files"]
        assert found == [f"{HOME}/INPUTS/{name}" for name in expected.values()]


@pytest.mark.parametrize("name", ["a:b.txt", "girder:x.txt", "pilotGirder:62f0a1", "girder:/collection/c/d.txt"])
def test_file_that_is_here_wins_over_any_pattern(check: Check, inputs: Path, name: str) -> None:
    (inputs / name).parent.mkdir(parents=True, exist_ok=True)
    (inputs / name).write_text("x")
    plan = check(text="x", file=name, words=["a:b"], comment=name)
    assert plan.input_values == {
        "text": "x",
        "file": f"{HOME}/INPUTS/{name}",
        "words": ["a:b"],
        "comment": name,
    }
    assert not plan.girder_paths


def test_files_on_the_platform_and_in_other_storages(check: Check, sandbox: Sandbox, tmp_path: Path) -> None:
    with VipClient(sandbox.vip.url, sandbox.ready()["vip"]["api_key"]) as other:
        other.make_folder("/vip/Home/there")
        (tmp_path / "x").write_text("x")
        other.put_file(tmp_path / "x", "/vip/Home/there/x.txt")
    sandbox.vip.journal.clear()
    files = ["/vip/Home/there/x.txt", f"{HOME}/INPUTS/a.txt", "pilotGirder:62f0a1"]
    assert check(text="x", files=files).input_values["files"] == files
    (problem,) = problems(check, text="x", file="/vip/Home/there/y.txt")
    assert problem == "'file': /vip/Home/there/y.txt does not exist on the platform."


def test_one_list_request_for_many_files_of_a_folder(check: Check, sandbox: Sandbox) -> None:
    found = problems(check, text="x", files=[f"/vip/Home/none/{number}" for number in range(50)])
    assert len(found) == 50
    assert len(sandbox.vip.journal.entries("GET", "none")) <= 2


@pytest.mark.parametrize("missing", ["nothing.txt", "sub/nothing", "/etc/passwd", "../here/a.txt", "with_space.txt"])
def test_files_that_are_not_in_the_folder_are_told(check: Check, missing: str) -> None:
    (problem,) = problems(check, text="x", file=missing)
    assert f"the file {missing!r} is not in the input folder" in problem


def test_files_that_are_excluded_are_not_there(check: Check) -> None:
    (problem,) = problems(check, exclude=["a.txt"], text="x", file="a.txt")
    assert "'a.txt' is not in the input folder" in problem


def test_lists_of_a_platform_that_tells_no_types(check: Check, sandbox: Sandbox) -> None:
    """Without the descriptor a List may hold files or words; only what is written as a path counts as one."""
    sandbox.vip.faults.add(Fault(query="format=boutiques", status=404))
    values = check(text="x", words=["hello", "a.txt", "./a.txt", "sub/c.txt", "either/or"]).input_values
    assert values["words"] == ["hello", "a.txt", f"{HOME}/INPUTS/a.txt", f"{HOME}/INPUTS/sub/c.txt", "either/or"]


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "sent"),
    [
        ("flag", True, "true"),
        ("flag", "true", "true"),
        ("flag", "False", "false"),
        ("count", 3, 3),
        ("count", "3", 3),
        ("count", 3.0, 3),
        ("count", -7, -7),
        ("ratio", 0.25, 0.25),
        ("ratio", "0.25", 0.25),
        ("ratio", 2, 2),
        ("ratio", "1e-3", 0.001),
        ("comment", 5, 5),
        ("comment", True, True),
        ("comment", "a b (c) [d] e@f?g&h=i:j/k,l.m-n+o_p", "a b (c) [d] e@f?g&h=i:j/k,l.m-n+o_p"),
        ("count", [1, "2", 3.0], [1, 2, 3]),
        ("flag", [True, "false"], ["true", "false"]),
    ],
)
def test_values_of_the_right_type(check: Check, name: str, given: InputValue, sent: InputValue) -> None:
    values = check(**{"text": "x", name: given}).input_values
    assert values[name] == sent
    assert type(values[name]) is type(sent)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("flag", "yes", "true or false"),
        ("flag", 1, "true or false"),
        ("count", "three", "a whole number"),
        ("count", 3.5, "a whole number"),
        ("count", True, "a whole number"),
        ("count", "", "a whole number"),
        ("ratio", "half", "a number"),
        ("ratio", "nan", "a number"),
        ("ratio", float("inf"), "a number"),
        ("ratio", False, "a number"),
        ("text", None, "a text"),
        ("text", "", "a text"),
        ("text", "  ", "a text"),
        ("file", 5, "a file in the input folder or on the platform"),
        ("file", True, "a file in the input folder or on the platform"),
        ("files", ["a.txt", None], "a list"),
    ],
)
def test_values_of_the_wrong_type_are_told(check: Check, name: str, given: InputValue, expected: str) -> None:
    (problem,) = problems(check, **{"text": "x", name: given})
    assert problem.startswith(f"'{name}'")
    assert f"expected is {expected}" in problem


def test_nothing_for_a_parameter_that_may_be_left_out_leaves_it_out(check: Check) -> None:
    assert check(text="x", comment=None, count=None, file=None).input_values == {"text": "x"}


def test_number_in_a_list_given_as_json_text_is_not_rounded(check: Check) -> None:
    with pytest.raises(PreflightFailed, match=r"'ratio': element 0: .*more digits than a number can carry"):
        check(text="x", ratio="[0.10000000000000000001]")


def test_lists_given_as_json_text(check: Check, inputs: Path) -> None:
    values = check(
        text="[1, 2]",
        file='["a.txt", "b.txt"]',
        count="[1, 2]",
        ratio="[0.5]",
        flag='["true", false]',
        words='["a", "b"]',
    ).input_values
    assert values == {
        "text": "[1, 2]",
        "file": [f"{HOME}/INPUTS/a.txt", f"{HOME}/INPUTS/b.txt"],
        "count": [1, 2],
        "ratio": [0.5],
        "flag": ["true", "false"],
        "words": ["a", "b"],
    }
    (inputs / "[1]").write_text("x")
    assert check(text="x", file="[1]").input_values["file"] == f"{HOME}/INPUTS/[1]"
    (problem,) = problems(check, text="x", words='["a", ["b"]]')
    assert problem.startswith("'words': element 1: ['b'] is a list in a list; expected is")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("count", 2**63),
        ("count", str(2**63)),
        ("count", -(2**63) - 1),
        ("count", 1e300),
        ("count", "1_000"),
        ("count", "\u0663"),
        ("ratio", 2**64),
        ("ratio", float("nan")),
        ("ratio", "1e400"),
        ("ratio", "1_0.5"),
        ("text", 2**64),
        ("text", float("nan")),
        ("words", ["a", float("inf")]),
    ],
)
def test_numbers_no_platform_knows_are_told_in_one_line(check: Check, name: str, given: InputValue) -> None:
    (problem,) = problems(check, **{"text": "x", name: given})
    assert re.fullmatch(rf"'{name}' is .*: expected is .*, not of type (int|float|str)\..*", problem)


def test_separators_of_the_platform_are_refused(check: Check, inputs: Path) -> None:
    """VIP joins the values of a list by `@@`, and takes apart what has it in it."""
    (inputs / "a@@b.txt").write_text("x")
    for settings in ({"text": "x@@y"}, {"text": ["x@@y", "z"]}, {"text": "x", "file": "a@@b.txt"}):
        (problem,) = problems(check, **settings)
        assert "VIP makes two values of what has @@ in it" in problem
    assert check(text="x@y@").jobs == 1
    (problem,) = problems(check, text=["x@", "y"])
    assert "'text' has 'x@' in a list" in problem
    (problem,) = problems(check, text=" x")
    assert "VIP drops spaces at the ends" in problem
    check(text="x")  # the file itself can be uploaded


@pytest.mark.parametrize("text", ["it's", "a*b", "a#b", "50%", "x;y", "a\nb", "é", 'say "x"', "a|b", "$HOME", "<b>"])
def test_characters_vip_refuses_are_told(check: Check, text: str) -> None:
    (problem,) = problems(check, text=text)
    assert problem.startswith("'text' has characters VIP refuses")
    (problem,) = problems(check, text="x", words=["good", text])
    assert problem.startswith("'words' has characters VIP refuses")


def test_names_of_files_with_characters_vip_refuses_in_values_are_told(check: Check, inputs: Path) -> None:
    (inputs / "a#1.txt").write_text("x")
    (problem,) = problems(check, text="x", file="a#1.txt")
    assert "'file' has characters VIP refuses in 'a#1.txt': '#'" in problem
    check(text="x")  # the file itself can be uploaded


# -- which values there must be, and how many jobs they make -----------------------------------------------------------


def test_missing_and_unknown_parameters(check: Check) -> None:
    assert problems(check, txet="x", zzz=1) == [
        "'text' is missing: expected is a text.",
        "EveryType/1.0 has no parameter 'txet'. It has: comment, count, file, files, flag, ratio, text, words.",
        "EveryType/1.0 has no parameter 'zzz'. It has: comment, count, file, files, flag, ratio, text, words.",
    ]


def test_results_directory_is_not_for_the_user(check: Check) -> None:
    (problem,) = problems(check, **{"text": "x", "results-directory": "/vip/Home"})
    assert "'results-directory' is set for each run" in problem


@pytest.mark.parametrize(
    ("settings", "jobs"),
    [
        ({"text": "x"}, 1),
        ({"text": ["x"]}, 1),
        ({"text": ["x", "y", "z"]}, 3),
        ({"text": ["x", "y", "z"], "count": [1, 2, 3]}, 9),
        ({"text": ["x", "y", "z"], "words": ["a", "b"]}, 6),
    ],
)
def test_lists_are_combined_every_with_every(check: Check, settings: dict[str, Any], jobs: int) -> None:
    assert check(**settings).jobs == jobs


def test_zipped_lists_need_equal_lengths(check: Check) -> None:
    both = ["a.txt", "b.txt"]
    assert check("PairwiseDifference/1.0", fixed=both, moving=both).jobs == 2
    (problem,) = problems(check, pipeline_id="PairwiseDifference/1.0", fixed=both, moving=[*both, "hello"])
    assert problem == ("These lists are combined element by element and need equal lengths: fixed has 2, moving has 3.")
    (problem,) = problems(check, pipeline_id="PairwiseDifference/1.0", fixed=both, moving="hello")
    assert "fixed has 2, moving has 1" in problem


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 404},
        {"status": 400, "body": '{"errorCode": 8008, "errorMessage": "not yours"}'},
        {"status": 200, "body": "<html>log in</html>"},
        {"status": 200, "body": '{"inputs": [], "output-files": [{"optional": "?"}]}'},
        {"status": 200, "body": '{"inputs": [], "custom": {"vip:dot": "fixed"}}'},
    ],
    ids=["missing", "refused", "page", "outputs of another shape", "lists of another shape"],
)
def test_unreadable_descriptor_decides_nothing(
    check: Check, client: VipClient, sandbox: Sandbox, answer: dict[str, Any]
) -> None:
    """Neither how many jobs lists make nor that no output is required; one list makes its jobs in any case."""
    sandbox.vip.faults.add(Fault(query="format=boutiques", content_type="application/json", **answer))
    both = ["./a.txt", "./b.txt"]
    (problem,) = problems(check, pipeline_id="PairwiseDifference/1.0", fixed=both, moving=both)
    assert problem.startswith("It is not known how many jobs these lists make")
    assert "fixed has 2, moving has 2" in problem
    plan = check("CopyFile/1.0", file=both)
    assert plan.jobs == 2
    assert "Boutiques descriptor of CopyFile/1.0 cannot be read" in str(plan.undescribed)
    assert plan.required_outputs is None
    assert "how several lists are combined is not known" in describe(client.pipeline("CopyFile/1.0"))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"status": 503}, ServerUnavailable),
        ({"status": 401, "body": '{"errorCode": 8002, "errorMessage": "bad key"}'}, AuthenticationError),
    ],
)
def test_descriptor_is_asked_for_again_when_the_answer_says_nothing_of_it(
    check: Check, sandbox: Sandbox, answer: dict[str, Any], error: type[Exception]
) -> None:
    sandbox.vip.faults.add(Fault(query="format=boutiques", content_type="application/json", **answer))
    with pytest.raises(error):
        check("CopyFile/1.0", file="a.txt")


def test_numbers_that_stand_for_lists_are_counted(check: Check) -> None:
    assert check("MonteCarlo/2.3", run=200, photons=[1, 2]).jobs == 400
    assert check("MonteCarlo/2.3", run="7").jobs == 7
    (problem,) = problems(check, pipeline_id="MonteCarlo/2.3", run=1001)
    assert problem == "The settings make 1001 jobs, the limit is 1000: run has 1001. Split the lists."
    for wrong in (0, -1, [2, 3]):
        (problem,) = problems(check, pipeline_id="MonteCarlo/2.3", run=wrong)
        assert "expected is one whole number above 0" in problem


def test_empty_lists_and_too_many_jobs_are_told(check: Check) -> None:
    (problem,) = problems(check, text=[])
    assert problem == "'text' is an empty list."
    (problem,) = problems(check, text=[str(number) for number in range(40)], count=list(range(30)))
    assert problem == "The settings make 1200 jobs, the limit is 1000: count has 30, text has 40. Split the lists."


def test_no_pipeline_checks_the_files_only(check: Check, sandbox: Sandbox) -> None:
    plan = check(None, anything="goes")
    assert (plan.input_values, plan.jobs, len(plan.files)) == ({}, 0, 6)
    assert sandbox.vip.journal.entries(path="pipelines") == []


# -- descriptions ------------------------------------------------------------------------------------------------------


def test_description_can_be_pasted(client: VipClient) -> None:
    text = describe(client.pipeline("Free Surf (x)/0.3.7"))
    assert text.startswith("# Free Surf (x)/0.3.7\n")
    assert "Needs a license." in text
    assert "<b>" not in text
    pasted: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], pasted)
    assert set(pasted["input_settings"]) == {"nifti", "directives", "license"}
    assert pasted["input_settings"]["directives"] == "-all"
    assert "| `directives` | String | no | `-all` | Options of recon-all. |" in text


def test_description_of_every_type_passes_its_own_checks(client: VipClient, check: Check, inputs: Path) -> None:
    pasted: dict[str, Any] = {}
    exec(describe(client.pipeline("EveryType/1.0")).split("```python\n")[1].split("```")[0], pasted)
    settings = pasted["input_settings"]
    for name in ("file", "files"):
        values = settings[name] if isinstance(settings[name], list) else [settings[name]]
        for value in values:
            (inputs / value).write_text("x")
    assert check(**settings).input_values["text"] == settings["text"]


def test_description_tells_how_lists_combine() -> None:
    zipped = Pipeline(
        identifier="p/1",
        description="a | b <i>c</i> &amp; d",
        parameters=(Parameter(name="x", type=ParameterType.LIST),),
        dot_parameters=frozenset({"x"}),
    )
    assert "x are combined element by element" in describe(zipped)
    assert "a \\| b c &amp; d" in describe(zipped)
    assert "every value combined with every other" in describe(Pipeline(identifier="p/1"))
