from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import significantdigits
from PIL import Image
from threadpoolctl import threadpool_info, threadpool_limits

from prefect_biomed.analysis import (
    Agreement,
    Comparison,
    FileComparison,
    Rules,
    Tolerance,
    compare_runs,
    comparison,
    inventory,
)
from prefect_biomed.analysis.comparison import FileGroup, assured_digits
from prefect_biomed.clients.errors import ConfigurationError

Maker = Callable[..., Comparison]


@pytest.fixture
def compare(tmp_path: Path) -> Maker:
    """Compare one file that has another content in each run; None leaves it out."""

    def made(name: str, *contents: bytes | str | None, rules: Rules | None = None) -> Comparison:
        runs = {}
        for number, content in enumerate(contents, start=1):
            folder = runs[f"run {number}"] = tmp_path / f"run{number}"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return compare_runs(runs, rules=rules)

    return made


def only(comparison: Comparison) -> FileComparison:
    (file,) = comparison.files
    return file


def nifti(voxels: np.ndarray, description: str = "", slope: float | None = None) -> bytes:
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header["descrip"] = description
    if slope is not None:
        image.header.set_slope_inter(slope, 5.0)
    return image.to_bytes()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def picture(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def tar_gz(members: dict[str, bytes], stamp: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), stamp
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=stamp)


def test_equal_bytes_are_identical(compare: Maker) -> None:
    file = only(compare("a.bin", b"\x00\x01", b"\x00\x01", b"\x00\x01"))
    assert (file.agreement, set(file.groups.values())) == (Agreement.IDENTICAL, {"A"})


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, gzip.compress])
def test_only_the_decompressed_content_counts(compare: Maker, compress: Callable[[bytes], bytes]) -> None:
    assert only(compare("a.bin", b"\x00content" * 99, compress(b"\x00content" * 99))).agreement is (
        Agreement.SAME_CONTENT
    )


def test_gzip_headers_do_not_count_but_content_does(compare: Maker) -> None:
    one, two, three = (gzip.compress(text, mtime=stamp) for stamp, text in enumerate((b"\0x", b"\0x", b"\0y")))
    file = only(compare("a.bin.gz", one, two, three))
    assert (file.agreement, list(file.groups.values())) == (Agreement.DIFFERENT, ["A", "A", "B"])


def test_members_of_archives_are_compared_one_by_one(compare: Maker) -> None:
    members = {"measures.csv": b"m,v\na,1.5\n", "deep/text.txt": b"same"}
    comparison = compare(
        "out.tar.gz", tar_gz(members, 1), tar_gz(members, 2), tar_gz(members | {"measures.csv": b"m,v\na,1.75\n"}, 3)
    )
    found = {file.name: file for file in comparison.files}
    assert comparison.differing == ("out.tar.gz/measures.csv",)
    assert found["out.tar.gz/deep/text.txt"].agreement is Agreement.IDENTICAL
    (measure,) = found["out.tar.gz/measures.csv"].measures
    assert (measure.max_difference, measure.where) == (0.25, ("row a, column v",))


def test_a_member_that_one_run_lacks_is_missing(compare: Maker) -> None:
    comparison = compare("o.tgz", tar_gz({"a": b"1", "b": b"2"}, 1), tar_gz({"a": b"1"}, 1), None)
    found = {file.name: file.missing_in for file in comparison.files}
    assert found == {"o.tgz/a": ("run 3",), "o.tgz/b": ("run 2", "run 3")}
    assert set(comparison.differing) == set(found)


def test_hostile_archives_are_not_unpacked(compare: Maker, tmp_path: Path) -> None:
    one, two = (tar_gz({"../../escaped.txt": b"x", "same": b"y"}, stamp) for stamp in (1, 2))
    file = only(compare("o.tgz", one, two))
    assert file.agreement is Agreement.DIFFERENT
    assert "would leave the folder" in file.note
    assert not list(tmp_path.rglob("escaped.txt"))


def test_zip_time_stamps_do_not_count(compare: Maker) -> None:
    def packed(year: int) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(zipfile.ZipInfo("a.txt", (year, 1, 1, 0, 0, 0)), "text")
        return buffer.getvalue()

    assert only(compare("o.zip", packed(2001), packed(2002))).agreement is Agreement.IDENTICAL


def test_header_and_voxels_are_told_apart(compare: Maker) -> None:
    voxels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    header = only(compare("a.nii", nifti(voxels, "one"), nifti(voxels, "two")))
    assert [fact.field for fact in header.facts] == ["header descrip"]
    assert not header.measures
    changed = voxels.copy()
    changed[1, 2, 3] += 2.0
    file = only(
        compare("b/a.nii.gz", gzip.compress(nifti(voxels)), gzip.compress(nifti(changed))).model_copy(
            update={
                "files": compare("b/a.nii.gz", gzip.compress(nifti(voxels)), gzip.compress(nifti(changed))).files[1:]
            }
        )
    )
    assert not file.facts
    (measure,) = file.measures
    assert (measure.differing, measure.points, measure.where) == (1, 24, ("voxel (1, 2, 3)",))


def test_numbers_are_those_over_all_pairs(compare: Maker) -> None:
    rows = np.random.default_rng(3).normal(100.0, 1.0, (4, 60))
    (measure,) = only(compare("a.npy", *(npy(row) for row in rows))).measures
    pairs = np.array([rows[i] - rows[j] for i in range(4) for j in range(i)])
    assert measure.runs == 4
    assert measure.max_difference == pytest.approx(np.abs(pairs).max())
    assert measure.mean_difference == pytest.approx(np.abs(pairs).mean())
    assert measure.rmse == pytest.approx(np.sqrt((pairs**2).mean()))


@pytest.mark.parametrize("noise", [3.0, 6.0, 9.5])
@pytest.mark.parametrize("runs", [3, 5, 10])
def test_digits_are_those_of_the_noise(compare: Maker, noise: float, runs: int) -> None:
    generator = np.random.default_rng(runs)
    base = generator.uniform(20, 200, 20_000)
    noisy = [base * (1.0 + 10.0**-noise * generator.standard_normal(base.size)) for _ in range(runs)]
    (measure,) = only(compare("a.npy", *map(npy, noisy))).measures
    assert measure.digits == pytest.approx(noise, abs=0.05)
    assert measure.digits_assured is not None
    assert measure.digits_assured < measure.digits


@pytest.mark.parametrize("runs", [2, 5, 50])
def test_assured_digits_are_those_of_the_library(runs: int) -> None:
    sample = np.random.default_rng(runs).uniform(1, 100, 50) * (
        1 + 10.0 ** np.linspace(-10, 0, 50) * np.random.default_rng(1).standard_normal((runs, 50))
    )
    mean = sample.mean(axis=0)
    expected = significantdigits.significant_digits(sample, reference=mean, axis=0, basis=10)
    assert assured_digits(sample, mean) == pytest.approx(expected, abs=0.01)


def test_files_are_worked_on_at_the_same_time_while_they_are_there(tmp_path: Path) -> None:
    members = {f"{number}.txt": b"%d" % number for number in range(6)}
    for run in ("1", "2"):
        (tmp_path / run).mkdir()
        for name in ("a.tar.gz", "b.tar.gz"):
            (tmp_path / run / name).write_bytes(tar_gz(members, 1))
    at_once = threading.Barrier(2, timeout=5)

    def work(group: FileGroup) -> tuple[str, bytes]:
        if comparison._WORKERS > 1:
            at_once.wait()
        time.sleep(0.02)
        return group.name, group.paths["2"].read_bytes()

    found = list(comparison.for_each_file({run: tmp_path / run for run in ("1", "2")}, Rules(), work))
    assert found == [(f"{name}.tar.gz/{member}", content) for name in "ab" for member, content in members.items()]


def test_blas_has_one_thread_while_files_are_worked_on_in_threads(tmp_path: Path) -> None:
    for run in ("1", "2"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "a.txt").write_text(run)

    def threads(_group: FileGroup) -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        assert list(comparison.for_each_file({run: tmp_path / run for run in ("1", "2")}, Rules(), threads)) == [{1}]


def test_scaled_voxels_are_compared_as_values(compare: Maker) -> None:
    stored = np.full((2, 2, 2), 10, dtype=np.int16)
    images = []
    for slope in (0.5, 1.5):
        raw = bytearray(nifti(stored))
        raw[112:120] = np.array([slope, 5.0], dtype="<f4").tobytes()
        images.append(bytes(raw))
    measures = {measure.name: measure for measure in only(compare("a.nii", *images)).measures}
    assert set(measures) == {"voxels", "header"}
    assert measures["header"].where == ("scl_slope",)
    assert measures["voxels"].max_difference == 10.0
    assert measures["voxels"].dice is None


def test_label_maps_get_dice(compare: Maker) -> None:
    one = np.zeros((4, 4, 4), dtype=np.uint8)
    one[:2] = 1
    two = one.copy()
    two[1] = 0
    (measure,) = only(compare("mask.nii.gz", nifti(one), nifti(two))).measures
    assert measure.dice == {"0": pytest.approx(2 * 32 / (32 + 48)), "1": pytest.approx(2 * 16 / (32 + 16))}


def test_missing_values_are_equal_only_to_each_other(compare: Maker) -> None:
    one, two = np.array([1.0, np.nan, np.nan]), np.array([1.0, np.nan, 3.0])
    (measure,) = only(compare("a.npy", npy(one), npy(two))).measures
    assert (measure.differing, measure.beyond_tolerance, measure.max_difference) == (1, 1, 0.0)
    assert measure.where == ("element (2)",)


def test_tables_name_row_and_column(compare: Maker) -> None:
    file = only(compare("a.csv", "region;vol;side\nhip;1,5;L\n", "region;vol;side\nhip;1,5;R\n"))
    assert [(fact.field, fact.values) for fact in file.facts] == [
        ("row hip, column side", {"run 1": "L", "run 2": "R"})
    ]
    (measure,) = only(
        compare("b.tsv", "1\t2\n3\t4\n", "1\t2\n3\t5\n", None).model_copy(
            update={"files": compare("b.tsv", "1\t2\n3\t4\n", "1\t2\n3\t5\n").files[1:]}
        )
    ).measures
    assert (measure.name, measure.where) == ("column 2", ("row 2, column 2",))


def test_json_ignores_order_and_times_and_names_paths(compare: Maker) -> None:
    one = {"b": [1, 2.5], "a": {"x": "t"}, "timestamp": "1", "written": "2024-01-01T10:00:00Z"}
    two = {"timestamp": "2", "written": "2025-03-01T11:00:00Z", "a": {"x": "t"}, "b": [1, 2.5]}
    assert only(compare("a.json", json.dumps(one), json.dumps(two))).agreement is Agreement.SAME_CONTENT
    file = only(compare("a.json", json.dumps(one), json.dumps(one | {"b": [1, 2.75], "a": {"x": "u"}})))
    assert [fact.field for fact in file.facts] == ["$.a.x"]
    assert file.measures[0].where == ("$.b[1]",)


def test_whole_numbers_beyond_floats_are_not_rounded(compare: Maker) -> None:
    assert only(compare("a.json", "[9007199254740993]", "[9007199254740995]")).agreement is Agreement.DIFFERENT


def test_text_forgives_times_and_finds_numbers(compare: Maker) -> None:
    one = "made Tue Mar  4 10:11:12 2024\nCortex 12 volume 7.5\n"
    assert only(compare("a.stats", one, one.replace("10:11:12", "11:11:59"))).agreement is Agreement.SAME_CONTENT
    file = only(compare("a.stats", one, one.replace("7.5", "7.75")))
    assert not file.facts
    assert (file.measures[0].max_difference, file.measures[0].where) == (0.25, ("line 2",))
    assert only(compare("a.stats", one, one.replace("Cortex", "Vortex"))).facts[0].field == "line 2"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_pictures_are_compared_by_pixels(compare: Maker, kind: str) -> None:
    pixels = np.zeros((8, 6), dtype=np.uint8)
    other = pixels.copy()
    other[7, 2] = 9
    packed = {"PNG": {"compress_level": 1}, "TIFF": {"compression": "tiff_lzw"}}[kind]
    name = f"a.{kind.lower()}"
    assert only(compare(name, picture(pixels, kind), picture(pixels, kind, **packed))).agreement is (
        Agreement.SAME_CONTENT
    )
    assert only(compare(name, picture(pixels, kind), picture(other, kind))).measures[0].where == (
        "pixel (row, column) (7, 2)",
    )


def test_pages_of_a_tiff_are_told_apart(compare: Maker) -> None:
    def pages(last: int) -> bytes:
        buffer = io.BytesIO()
        images = [Image.fromarray(np.full((2, 2), value, dtype=np.uint8)) for value in (1, last)]
        images[0].save(buffer, "TIFF", save_all=True, append_images=images[1:])
        return buffer.getvalue()

    assert [m.name for m in only(compare("a.tif", pages(2), pages(3))).measures] == ["pixels of page 2"]


def test_objects_in_numpy_files_are_never_unpickled(compare: Maker) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return pytest.fail, ("unpickled",)

    one = npy(np.array([Bomb()], dtype=object))
    file = only(compare("a.npy", one, one + b"\x00"))
    assert (file.kind, file.agreement) == ("binary", Agreement.DIFFERENT)
    assert "only digests were compared" in file.note


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.nii", nifti(np.zeros((9, 9, 9)))[:900]),
        ("a.npy", npy(np.zeros(99))[:200]),
        ("a.png", picture(np.arange(6400, dtype=np.uint8).reshape(80, 80), "PNG")[:120]),
        ("a.json", b"{"),
        ("a.json", b"[" * 200_000),
        ("a.bin.gz", gzip.compress(b"content" * 99, mtime=0)[:25]),
    ],
)
def test_damaged_files_fall_back_to_digests(compare: Maker, name: str, content: bytes) -> None:
    file = only(compare(name, content, content + b" "))
    assert (file.kind, file.agreement) == ("binary", Agreement.DIFFERENT)
    assert file.note


def test_tolerance_by_pattern(compare: Maker) -> None:
    rules = Rules(tolerances={"*.csv": Tolerance(relative=0.01)})
    close = only(compare("a.csv", "v\n100.0\n", "v\n100.5\n", rules=rules))
    assert close.agreement is Agreement.WITHIN_TOLERANCE
    assert close.agreement.is_agreement
    assert only(compare("a.csv", "v\n100.0\n", "v\n102.0\n", rules=rules)).agreement is Agreement.DIFFERENT


def test_logs_and_links_out_of_the_run_are_left_out(compare: Maker, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    for number in (1, 2):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "link").symlink_to(tmp_path / "secret")
    compare("logs/a.txt", "1", "2")
    compare("run.log", "1", "2")
    assert compare("a.txt", "1", "1").files[0].name == "a.txt"
    assert list(inventory(tmp_path / "run1")) == ["a.txt"]


def test_folders_are_named_after_themselves(tmp_path: Path) -> None:
    for name in ("x/one", "y/one"):
        (tmp_path / name).mkdir(parents=True)
    assert compare_runs([tmp_path / "x/one", tmp_path / "y/one"]).runs == ("x/one", "y/one")
    with pytest.raises(ConfigurationError, match="given twice"):
        compare_runs([tmp_path / "x/one", tmp_path / "x/one"])
    with pytest.raises(ConfigurationError, match="is not a folder"):
        compare_runs([tmp_path / "x/one", tmp_path / "z"])


def test_sentences(compare: Maker, tmp_path: Path) -> None:
    assert compare("a.txt", "a", "a", "a").sentence == "All 1 files agree in all 3 runs."
    assert compare("a.txt", "a", "a", "b").sentence == "1 of 1 files differ over 3 runs: a.txt."
    failed = compare_runs([tmp_path / "run1", tmp_path / "run2"], failed=["run 4"]).sentence
    assert failed == "All 1 files agree in all 2 runs. 1 failed and are left out."


def test_memory_is_bounded_for_large_volumes(tmp_path: Path) -> None:
    size = 48 * 1024**2
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        array = np.lib.format.open_memmap(folder / "a.npy", "w+", np.float32, (size // 4,))
        array[:: 1 << 16] = number
        array.flush()
    tracemalloc.start()
    comparison = compare_runs([tmp_path / "1", tmp_path / "2"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert comparison.files[0].measures[0].differing == size // 4 // (1 << 16)
    # Some blocks of 2 MiB each, and never a whole file.
    assert peak < size
