"""Each format of the field: what a stamp, noise and a change become, and files that are made to do harm."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import zarr
from scipy.io import savemat

from benchmarks import formats
from prefect_biomed.analysis import Agreement, Outcome, Rules, compare_runs, judge_runs
from prefect_biomed.analysis.comparison import FileGroup, opened
from prefect_biomed.analysis.readers import source as reading

READABLE = [name for name in formats.WRITERS if name != "unknown binary"]


def written(folder: Path, name: str, changes: list[float], *, noise: float = 0.0) -> None:
    file, write = formats.WRITERS[name]
    generator = np.random.default_rng(4)
    base = generator.uniform(50.0, 200.0, formats.POINTS)
    for number, change in enumerate(changes):
        (folder / str(number)).mkdir(parents=True)
        values = base * change * (1.0 + noise * generator.standard_normal(formats.POINTS))
        write(folder / str(number) / file, values, formats.Made.drawn(generator, 7 * number))


@pytest.mark.parametrize("name", READABLE)
def test_a_stamp_is_no_difference(tmp_path: Path, name: str) -> None:
    written(tmp_path, name, [1.0, 1.0])
    comparison = compare_runs([tmp_path / "0", tmp_path / "1"])
    assert not comparison.differing
    assert not [file.note for file in comparison.files if file.note]
    assert "binary" not in {file.kind for file in comparison.files}


@pytest.mark.parametrize("name", READABLE)
def test_noise_is_in_numbers_alone_and_a_change_is_seen_there(tmp_path: Path, name: str) -> None:
    written(tmp_path, name, [1.0, formats.CHANGE], noise=3e-2 if name in formats.COARSE else formats.NOISE)
    comparison = compare_runs([tmp_path / "0", tmp_path / "1"])
    assert not [fact for file in comparison.files for fact in file.facts]
    (largest,) = sorted(measure.max_difference or 0.0 for file in comparison.files for measure in file.measures)[-1:]
    assert largest > 1e-3


def test_what_is_unpacked_for_one_run_is_not_taken_for_another(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        made = formats.Made(datetime(2026, 3, 2), "node1", "alice", 1, "/tmp", "")
        formats.nrrd(tmp_path / str(number) / "a.nrrd", np.full(512, 1.0 + number), made)
    (file,) = compare_runs([tmp_path / "0", tmp_path / "1"]).files
    assert [measure.max_difference for measure in file.measures] == [1.0]


def run_of(folder: Path, name: str, *contents_: bytes) -> list[Path]:
    runs = []
    for number, content in enumerate(contents_):
        runs.append(folder / str(number))
        runs[-1].mkdir(parents=True, exist_ok=True)
        (runs[-1] / name).write_bytes(content)
    return runs


def only(runs: list[Path], rules: Rules | None = None) -> Any:
    (file,) = compare_runs(runs, rules=rules).files
    return file


def test_rows_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    one = b"region,volume\nhip,1.5\namy,2.5\nput,3\n"
    assert only(run_of(tmp_path, "a.csv", one, b"region,volume\nput,3\nhip,1.5\namy,2.5\n")).agreement is (
        Agreement.SAME_CONTENT
    )
    changed = only(run_of(tmp_path, "a.csv", one, b"region,volume\nput,3\nhip,1.75\namy,2.5\n"))
    assert changed.measures[0].where == ("row hip, column volume",)


def test_commas_of_fractions_and_of_thousands_are_read_as_such(tmp_path: Path) -> None:
    fractions = only(
        run_of(tmp_path / "de", "a.csv", b"region;volume\nhip;1,5\namy;-2\n", b"region;volume\nhip;1,75\namy;-2\n")
    )
    assert (fractions.measures[0].name, fractions.measures[0].max_difference) == ("column volume", 0.25)
    thousands = only(
        run_of(tmp_path / "en", "a.csv", b'region,volume\nhip,"1,500.5"\n', b'region,volume\nhip,"2,500.5"\n')
    )
    assert (thousands.measures[0].name, thousands.measures[0].max_difference) == ("column volume", 1000.0)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (("1,234", "0,5"), [1.234, 0.5]),
        (("1,234", "0,512"), [1.234, 0.512]),
        (("1,234", "-1,5e-3"), [1.234, -0.0015]),
        (("1,234", "1,234,567"), [1234.0, 1234567.0]),
        (("1,234", "12.5"), [1234.0, 12.5]),
        (("1,234", "2,500.5"), [1234.0, 2500.5]),
        (("1,234", "12"), None),
        (("1,234", "1.234"), None),
        (("1,5", "1.234"), None),
        (("1,5", "1,234,567"), None),
        (("1,234", "n/a"), None),
    ],
)
def test_all_cells_of_a_column_tell_what_its_commas_are(
    tmp_path: Path, separator: str, cells: tuple[str, str], said: list[float] | None
) -> None:
    lines = ["region", "hip", "amy"]
    content = "\n".join(f'{line}{separator}"{cell}"' for line, cell in zip(lines, ("volume", *cells), strict=True))
    path = tmp_path / ("a.tsv" if separator == "\t" else "a.csv")
    path.write_text(content)
    with opened(FileGroup(path.name, {"": path}), Rules()) as by_run:
        measures, facts = by_run[""].measures, by_run[""].facts
    if said is None:
        assert not measures
        label = "row hip, column volume, with commas of fractions or of thousands"
        assert (facts[label], facts["rows"]) == (cells[0], "amy, hip")
    else:
        assert dict(
            zip(measures["column volume"].keys or (), measures["column volume"].values.tolist(), strict=True)
        ) == (dict(zip(("hip", "amy"), said, strict=True)))


@pytest.mark.parametrize("other", ["2,345", "0,98"])
def test_commas_that_may_be_either_are_not_judged_where_they_vary(tmp_path: Path, other: str) -> None:
    """Whether nothing tells it in any run, or only in some."""
    generator = np.random.default_rng(3)
    sides: dict[str, dict[str, Path]] = {"references": {}, "runs": {}}
    for side, shift in (("references", 0), ("runs", 400)):
        for number in range(5):
            folder = tmp_path / side / str(number)
            folder.mkdir(parents=True)
            last = other if number % 2 else "2,345"
            (folder / "a.csv").write_text(f"region;volume\nhip;1,{generator.integers(100, 500) + shift}\namy;{last}\n")
            sides[side][str(number)] = folder
    assert judge_runs(sides["references"], sides["runs"]).outcome is Outcome.NOT_JUDGED


def test_rows_that_one_run_lacks_leave_the_others_comparable(tmp_path: Path) -> None:
    file = only(run_of(tmp_path, "a.tsv", b"name\tv\na\t1\nb\t2\nc\t3\n", b"name\tv\nc\t3.5\na\t1\n"))
    assert [fact.field for fact in file.facts] == ["rows", "row b, column name"]
    (measure,) = file.measures
    assert (measure.points, measure.differing, measure.where) == (2, 1, ("row c, column v",))


def test_several_columns_name_a_row_where_one_does_not(tmp_path: Path) -> None:
    head = "subject\themi\tthickness\n"
    rows = ["s1\tlh\t1\n", "s1\trh\t2\n", "s2\tlh\t3\n", "s2\trh\t4\n"]
    runs = run_of(tmp_path, "a.tsv", (head + "".join(rows)).encode(), (head + "".join(reversed(rows))).encode())
    assert only(runs).agreement is Agreement.SAME_CONTENT


def test_numbers_alone_keep_their_order(tmp_path: Path) -> None:
    """Time series have no names; rows in another order are another result."""
    file = only(run_of(tmp_path, "a.tsv", b"x\ty\n1\t2\n3\t4\n", b"x\ty\n3\t4\n1\t2\n"))
    assert file.agreement is Agreement.DIFFERENT


def test_digits_that_a_double_lacks_are_seen(tmp_path: Path) -> None:
    whole = [np.full(3, 2**60 + last, dtype=np.int64) for last in (1, 2)]
    longer = [np.full(3, np.longdouble(1) + last * np.finfo(np.longdouble).eps) for last in (1, 2)]
    for name, values in (("whole", whole), ("longer", longer)):
        if values[0].dtype == np.float64 or (values[0] == values[1]).all():
            continue  # where long doubles are doubles
        contents = []
        for value in values:
            buffer = io.BytesIO()
            np.save(buffer, value)
            contents.append(buffer.getvalue())
        file = only(run_of(tmp_path / name, "a.npy", *contents))
        assert [measure.name for measure in file.measures] == ["values, last digits"]
    tables = [f"name,hash\nx,{2**60 + last}\n".encode() for last in (1, 2)]
    file = only(run_of(tmp_path / "table", "a.csv", *tables))
    assert [fact.field for fact in file.facts] == ["row x, column hash"]


def test_streamlines_are_a_set(tmp_path: Path) -> None:
    lines = [np.random.default_rng(n).uniform(0, 60, (8, 3)).astype("f4") for n in range(30)]
    for number, order in enumerate((range(30), range(29, -1, -1), range(29))):
        (tmp_path / str(number)).mkdir()
        tracts = nibabel.streamlines.Tractogram([lines[n] for n in order], affine_to_rasmm=np.eye(4))
        nibabel.streamlines.TckFile(tracts).save(str(tmp_path / str(number) / "a.tck"))
    assert only([tmp_path / "0", tmp_path / "1"]).agreement is Agreement.SAME_CONTENT
    lost = only([tmp_path / "0", tmp_path / "2"])
    assert "number of streamlines" in {where for measure in lost.measures for where in measure.where}


def test_versions_are_no_result(tmp_path: Path) -> None:
    one = {"software": {"version": "7.3.2"}, "mean": 3.5}
    runs = run_of(tmp_path, "a.json", *(json.dumps(one | {"version": text}).encode() for text in ("7.3", "7.4")))
    assert only(runs).agreement is Agreement.SAME_CONTENT


def test_patterns_of_the_rules_are_no_change(tmp_path: Path) -> None:
    runs = run_of(tmp_path, "a.txt", b"scanner SCN-a\nmean 3\n", b"scanner SCN-b\nmean 3\n")
    assert only(runs).agreement is Agreement.DIFFERENT
    assert only(runs, Rules(volatile={"scanner": "SCN-[a-z]"})).agreement is Agreement.SAME_CONTENT


# What is made to do harm: each must end as a digest with a reason, quickly and in little memory.


def xml_bomb(root: str) -> bytes:
    entities = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(12))
    return f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e0 "{"a" * 99}">{entities}]><{root}>&e12;</{root}>'.encode()


def outer_entity() -> bytes:
    return b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>'


def gifti_bomb() -> bytes:
    packed = base64.b64encode(zlib.compress(b"\0" * 200_000_000)).decode()
    return (
        '<?xml version="1.0"?><GIFTI Version="1.0" NumberOfDataArrays="1"><DataArray Intent="NIFTI_INTENT_SHAPE" '
        'DataType="NIFTI_TYPE_FLOAT32" ArrayIndexingOrder="RowMajorOrder" Dimensionality="1" Dim0="10" '
        f'Encoding="GZipBase64Binary" Endian="LittleEndian"><Data>{packed}</Data></DataArray></GIFTI>'
    ).encode()


@pytest.mark.parametrize("name", ["a.npy", "a.nii"])
def test_what_lies_behind_the_values_is_seen(tmp_path: Path, name: str) -> None:
    """As a second array that was saved into the same file."""
    values = np.arange(24.0).reshape(2, 3, 4)
    buffer = io.BytesIO()
    np.save(buffer, values)
    content = buffer.getvalue() if name == "a.npy" else nibabel.Nifti1Image(values, np.eye(4)).to_bytes()
    file = only(run_of(tmp_path, name, content + b"one", content + b"two"))
    assert [fact.field for fact in file.facts] == ["bytes behind the end"]
    assert only(run_of(tmp_path / "same", name, content, content)).agreement is Agreement.IDENTICAL


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_with_a_key_twice_is_compared_as_a_whole(tmp_path: Path, name: str) -> None:
    """Of two values a reader would see one."""
    file = only(
        run_of(tmp_path, name, b'{"v": 1, "v": 3}\n{}\n'[: None if name == "a.jsonl" else 16], b'{"v": 2, "v": 3}')
    )
    assert file.agreement is Agreement.DIFFERENT
    assert "an object has a key twice" in file.note


def test_links_in_hdf5_are_told_by_where_they_lead(tmp_path: Path) -> None:
    contents = []
    for place in ("one", "two"):
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file["other"] = h5py.ExternalLink(f"{place}.h5", "/x")
            file["soft"] = h5py.SoftLink(f"/{place}")
            layout = h5py.VirtualLayout((4,), "f8")
            layout[:] = h5py.VirtualSource(f"{place}.h5", "x", (4,))
            file.create_virtual_dataset("virtual", layout)
        contents.append(buffer.getvalue())
    facts = only(run_of(tmp_path, "a.h5", *contents)).facts
    assert [fact.field for fact in facts] == ["other (link)", "soft (link)", "virtual"]


def hdf5_bomb() -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("v", shape=(10**6, 10**6), dtype="f8", chunks=(1000, 1000))
    return buffer.getvalue()


def hdf5_elsewhere() -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["link"] = h5py.ExternalLink("/etc/passwd", "/")
        file.create_dataset("v", shape=(4,), dtype="u1", external=[("/etc/passwd", 0, 4)])
    return buffer.getvalue()


def mat_bomb() -> bytes:
    packed = zlib.compress(b"\0" * 10_000_000, 9) * 1
    body = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + body * 300


def yaml_bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines).encode()


def yaml_object() -> bytes:
    return b"x: !!python/object/apply:os.system ['touch /tmp/never']\n"


def nifti_bomb() -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 30_000))
    header["magic"] = b"n+1\x00"
    header["vox_offset"] = 352
    return bytes(header.binaryblock) + b"\0" * 100


def nrrd_elsewhere() -> bytes:
    return b"NRRD0004\ntype: uchar\ndimension: 1\nsizes: 4\nencoding: raw\ndata file: ../../../etc/passwd\n\n"


def nrrd_bomb() -> bytes:
    head = b"NRRD0004\ntype: double\ndimension: 1\nsizes: 9000000000\nencoding: gzip\n\n"
    return head + gzip.compress(b"\0" * 1000)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.xml", lambda: xml_bomb("x")),
        ("a.svg", lambda: xml_bomb("svg")),
        ("a.gii", lambda: xml_bomb("GIFTI")),
        ("a.xml", outer_entity),
        ("b.gii", gifti_bomb),
        ("a.h5", hdf5_bomb),
        ("a.mat", mat_bomb),
        ("a.yaml", yaml_bomb),
        ("b.yaml", yaml_object),
        ("a.nii", nifti_bomb),
        ("a.nrrd", nrrd_elsewhere),
        ("b.nrrd", nrrd_bomb),
    ],
)
def test_what_is_made_to_do_harm_is_a_digest(
    tmp_path: Path, name: str, make: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MAX_PARTS", 5_000)
    content = make()
    runs = run_of(tmp_path, name, content, content + b"\n")
    tracemalloc.start()
    file = only(runs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (file.kind, file.agreement) == ("binary", Agreement.DIFFERENT)
    assert "could not be read, so only digests were compared" in file.note
    assert "root:" not in str(file)
    assert peak < 150 * 1024**2


def test_values_of_hdf5_in_other_files_are_not_read(tmp_path: Path) -> None:
    file = only(run_of(tmp_path, "a.h5", hdf5_elsewhere(), hdf5_elsewhere() + b"\0"))
    assert "is in other files, which are not read" in file.note or file.agreement is Agreement.SAME_CONTENT
    assert not file.measures


def test_zarr_runs_no_code(tmp_path: Path) -> None:
    for number in (0, 1):
        store = tmp_path / str(number) / "a.zarr"
        store.mkdir(parents=True)
        metadata = {
            "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "order": "C", "fill_value": None,
            "compressor": None, "filters": [{"id": "pickle"}],
        }  # fmt: skip
        (store / ".zarray").write_text(json.dumps(metadata))
        (store / "0").write_bytes(pickle.dumps(pytest.fail) + bytes([number]))
    file = only([tmp_path / "0", tmp_path / "1"])
    assert (file.name, file.kind) == ("a.zarr", "binary")
    assert "it holds objects" in file.note


def test_a_store_in_an_archive_is_one_file(tmp_path: Path) -> None:
    for number in (0, 1):
        group = zarr.open_group(tmp_path / "store", mode="w", zarr_format=3)
        group.create_array("v", data=np.arange(8.0) + number)
        (tmp_path / str(number)).mkdir()
        with zipfile.ZipFile(tmp_path / str(number) / "a.zarr.zip", "w") as archive:
            for path in sorted((tmp_path / "store").rglob("*")):
                archive.write(path, path.relative_to(tmp_path / "store"))
    (file,) = compare_runs([tmp_path / "0", tmp_path / "1"]).files
    assert [measure.max_difference for measure in file.measures] == [1.0]


def test_a_format_whose_library_is_not_there_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(reading.importlib, "import_module", absent)
    content = b"%PDF-1.7\n"
    file = only(run_of(tmp_path, "a.pdf", content, content + b"x"))
    assert "pypdf is not installed: pip install 'prefect-biomed[formats]'" in file.note


def test_a_pair_whose_header_leads_out_of_the_run_is_not_read(tmp_path: Path) -> None:
    pair = nibabel.Nifti1Pair(np.zeros((4, 4, 4), "f4"), np.eye(4))
    nibabel.save(pair, tmp_path / "secret.img")
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.hdr").symlink_to(tmp_path / "secret.hdr")
        (tmp_path / str(number) / "a.img").write_bytes(bytes([number]) * 256)
    (file,) = compare_runs([tmp_path / "0", tmp_path / "1"]).files
    assert (file.name, file.kind) == ("a.img", "binary")


def test_savemat_of_objects_runs_nothing(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        cell = np.array([np.arange(3.0) + number, "text", {"deep": np.ones((2, 2))}], dtype=object)
        savemat(tmp_path / str(number) / "a.mat", {"c": cell, "s": {"f": "x"}})
    file = only([tmp_path / "0", tmp_path / "1"])
    assert [measure.name for measure in file.measures] == ["c[0]"]


def test_group_without_neighbours_is_read_alone(tmp_path: Path) -> None:
    (path,) = run_of(tmp_path, "a.txt", b"1")
    with opened(FileGroup("a.txt", {"x": path / "a.txt"}), Rules()) as said:
        assert said["x"].kind == "text"
