"""One flow over all three platforms: every figure is followed from the voxel to the federated result and the cutout."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydantic import SecretStr

from prefect_biomed.blocks import BossCredentials, Vantage6Credentials, VipCredentials
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.flows.research_pipeline import ImageStage, IngestStage, TableStage, research_pipeline
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.boss import BossSandbox

pytestmark = pytest.mark.usefixtures("prefect_api")

PER_SITE = 3


@pytest.fixture
def platforms() -> Iterator[Sandbox]:
    quick = {"prepare_seconds": 0.0, "quiet_seconds": 0.1, "completing_seconds": 0.0}
    with Sandbox("vip", "vantage6", "boss", vantage6={"key_bits": 2048}, boss=quick) as sandbox:
        yield sandbox


@pytest.fixture
def vip_account(platforms: Sandbox) -> VipCredentials:
    facts = platforms.ready()["vip"]
    return VipCredentials(api_key=SecretStr(facts["api_key"]), url=facts["url"])


@pytest.fixture
def vantage6_account(platforms: Sandbox) -> Vantage6Credentials:
    facts = platforms.ready()["vantage6"]
    return Vantage6Credentials(
        url=facts["url"],
        username="north-researcher",
        password=SecretStr(facts["users"]["north-researcher"]["password"]),
        encryption="as the collaboration says",
        private_key_path=Path(facts["organizations"]["north"]["private_key"]),
    )


@pytest.fixture
def boss_account(platforms: Sandbox) -> BossCredentials:
    facts = platforms.ready()["boss"]
    return BossCredentials(
        token=SecretStr(facts["tokens"]["alice"]), host=facts["host"], protocol="http", aws_endpoint_url=facts["url"]
    )


@pytest.fixture
def patients(tmp_path: Path, volume: Path) -> Path:
    """Blocks of a real volume, three for each hospital."""
    folder = tmp_path / "patients"
    folder.mkdir()
    image = nibabel.load(volume)
    voxels = np.asarray(image.dataobj)
    for site, hospital in enumerate(("north", "south", "west")):
        for number in range(PER_SITE):
            start = 3 * (site * PER_SITE + number)
            block = voxels[:, start % 20 : start % 20 + 20, :]
            nibabel.Nifti1Image(block, image.affine).to_filename(folder / f"{hospital}-{number}.nii")
    return folder


@pytest.mark.slow
def test_from_images_to_a_federated_result_and_a_cutout(
    platforms: Sandbox,
    vip_account: VipCredentials,
    vantage6_account: Vantage6Credentials,
    boss_account: BossCredentials,
    patients: Path,
    tmp_path: Path,
) -> None:
    tables = {site: Path(labels["measures"]) for site, labels in platforms.ready()["vantage6"]["tables"].items()}
    result = research_pipeline(
        tmp_path / "out",
        images=ImageStage(
            pipeline_id="GreyMatter/1.0",
            input_dir=patients,
            images=sorted(path.name for path in patients.iterdir()),
            parameter="t1",
            refresh_time=0.3,
        ),
        vip=vip_account,
        table=TableStage(
            collaboration="plain",
            image="prefect-biomed/clinical:1.0",
            method="central_average",
            arguments={"column": "volume"},
            organizations=["north"],
            databases="measures",
            central=True,
            tables=tables,
            sites={site: [f"{site}-*"] for site in tables},
        ),
        vantage6=vantage6_account,
        ingest=IngestStage(collection="derived", experiment="patients", channel="mask", volume="mask.nii.gz"),
        boss=boss_account,
    )
    assert set(result.seconds) == {"images", "table", "ingest"}

    rows = []
    for site, path in tables.items():
        with path.open(newline="") as file:
            of_site = list(csv.DictReader(file))
        assert [row["image"] for row in of_site] == [f"{site}-{number}.nii" for number in range(PER_SITE)]
        rows += of_site
    assert result.analysis is not None
    (answer,) = result.analysis.results
    assert answer.value["count"] == 3 * PER_SITE
    assert answer.value["average"] == pytest.approx(np.mean([float(row["volume"]) for row in rows]))

    assert result.session is not None
    masks = sorted(p for paths in result.session.files.values() for p in paths if p.name == "mask.nii.gz")
    mask = np.asarray(nibabel.load(masks[0]).dataobj)
    x, y, z = mask.shape
    boss = platforms.boss
    assert isinstance(boss, BossSandbox)
    cutout = boss.cutout("derived/patients/mask", x=(0, x), y=(0, y), z=(0, z))
    assert np.array_equal(cutout.squeeze(), mask.transpose(2, 1, 0))
    assert mask.any()


@pytest.mark.slow
def test_a_stage_alone(boss_account: BossCredentials, platforms: Sandbox, volume: Path, tmp_path: Path) -> None:
    result = research_pipeline(
        tmp_path / "out",
        ingest=IngestStage(collection="derived", experiment="one", channel="anatomy", source=volume),
        boss=boss_account,
    )
    assert result.session is None
    assert result.analysis is None
    assert result.ingest is not None
    assert (result.ingest.holes, result.ingest.unaccounted) == ((), 0)


def test_a_stage_without_its_account_is_refused_first(platforms: Sandbox, volume: Path, tmp_path: Path) -> None:
    stage = IngestStage(collection="derived", experiment="one", channel="anatomy", source=volume)
    with pytest.raises(ConfigurationError, match="'ingest' has no account"):
        research_pipeline(tmp_path, ingest=stage)
    assert not platforms.boss.journal.entries()
