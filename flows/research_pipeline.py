"""One flow over all three platforms: images are measured, measures are analysed, derived images are published."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.boss import IngestConfig, UploadReport
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vantage6 import DatabaseInput
from prefect_biomed.clients.vip import InputSettings, SessionResult
from prefect_biomed.flows._checked import checked_flow
from prefect_biomed.flows.boss import boss_ingest
from prefect_biomed.flows.vantage6 import Analysis, federated_analysis
from prefect_biomed.flows.vantage6_parameters import TaskDetails
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.flows.vip_parameters import Outputs, SessionUpload
from prefect_biomed.tasks import research_pipeline as steps
from prefect_biomed.tasks._reporting import run_logger
from prefect_biomed.tasks.boss import NewResources
from prefect_biomed.tasks.run_names import flow_run_named

__all__ = [
    "ImageStage",
    "IngestStage",
    "ResearchResult",
    "TableStage",
    "analysis_of_stage",
    "research_pipeline",
    "session_of_stage",
]


class _Stage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageStage(_Stage):
    """Measure images on VIP.

    Attributes:
        pipeline_id: Pipeline to run, `Application/version`.
        input_dir: Local folder of the images.
        images: Names of the images, relative to it; they make parallel jobs.
        parameter: Parameter of the pipeline that takes the images.
        input_settings: Values of its other parameters.
        refresh_time: Seconds between two looks at the run.
    """

    pipeline_id: str
    input_dir: Path
    images: Annotated[list[str], Field(min_length=1)]
    parameter: str
    input_settings: InputSettings = Field(default_factory=dict)
    refresh_time: float = Field(default=30.0, gt=0)


class TableStage(_Stage):
    """Analyse measures with vantage6, where they are.

    Attributes:
        collaboration: Exact name or id.
        image: Docker image of the algorithm.
        method: Function to call.
        arguments: Its keyword arguments.
        organizations: Exact names or ids; all when empty.
        databases: What it reads.
        central: Whether the function coordinates others; it does not when empty.
        tables: CSV file that the node of each site reads; written when images were measured.
        sites: Patterns of the images of each site.
        measures: Name of the files that hold measures.
    """

    collaboration: str | int
    image: str
    method: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    organizations: list[str | int] | None = None
    databases: DatabaseInput = None
    central: bool | None = None
    tables: dict[str, Path] = Field(default_factory=dict)
    sites: dict[str, list[str]] = Field(default_factory=dict)
    measures: str = "measures.csv"


class IngestStage(_Stage):
    """Publish a derived volume in the Boss.

    Attributes:
        collection: Collection of the channel; made when missing.
        experiment: Experiment of the channel; made when missing.
        channel: Name of the channel; made when missing.
        volume: Name of the derived files; the first one in order is published.
        source: A volume of this machine, to be published without measuring images first.
        tile: Size of a tile in pixels, a multiple of 512.
    """

    collection: str
    experiment: str
    channel: str
    volume: str = "*.nii.gz"
    source: Path | None = None
    tile: Annotated[int, Field(ge=512, le=2048, multiple_of=512)] = 512


class ResearchResult(BaseModel):
    """What the stages gave.

    Attributes:
        session: Result of the image stage.
        analysis: Result of the table stage.
        ingest: Result of the ingest stage.
        seconds: Time each stage took.
    """

    # What the outermost model says holds for all in it, such as values that are no numbers.
    model_config = ConfigDict(
        frozen=True, ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64"
    )

    session: SessionResult | None = None
    analysis: Analysis | None = None
    ingest: UploadReport | None = None
    seconds: dict[str, float] = Field(default_factory=dict)


@checked_flow(name="research-pipeline", flow_run_name=flow_run_named("output_dir"))
def research_pipeline(
    output_dir: Path,
    images: ImageStage | None = None,
    vip: VipCredentials | None = None,
    table: TableStage | None = None,
    vantage6: Vantage6Credentials | None = None,
    ingest: IngestStage | None = None,
    boss: BossCredentials | None = None,
) -> ResearchResult:
    """Measure images on VIP, analyse the measures with vantage6, publish the derived volume in the Boss.

    Each stage is optional and can be used alone: tables that are there are analysed as they are, and a volume of this
    machine can be published. A retry of the same flow run goes on where it stopped.

    Args:
        output_dir: Local folder for everything that is derived. An absolute path.
        images: What to measure.
        vip: The account for it.
        table: What to analyse.
        vantage6: The account for it.
        ingest: What to publish.
        boss: The account for it.

    Returns:
        The results of the stages, and how long each took.

    Raises:
        ConfigurationError: A stage lacks its account, or nothing to do.
        BiomedError: What the flows of the platforms raise. What was finished stays.
    """
    _check_accounts(images=(images, vip), table=(table, vantage6), ingest=(ingest, boss))
    session = analysis = report = None
    seconds: dict[str, float] = {}
    if images is not None and vip is not None:
        with _timed("images", seconds):
            session = _measure(vip, images, output_dir)
    files = [path for paths in session.files.values() for path in paths] if session else []
    if table is not None and vantage6 is not None:
        with _timed("table", seconds):
            analysis = _analyse(vantage6, table, images, files)
    if ingest is not None and boss is not None:
        with _timed("ingest", seconds):
            report = _publish(boss, ingest, files, output_dir)
    return ResearchResult(session=session, analysis=analysis, ingest=report, seconds=seconds)


def _check_accounts(**stages: tuple[_Stage | None, object | None]) -> None:
    for name, (stage, account) in stages.items():
        if stage is not None and account is None:
            raise ConfigurationError(f"The stage {name!r} has no account. Give its credentials, or leave it out.")


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long a stage took that has succeeded."""
    began = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - began
    run_logger().info("Stage %s took %.1f s", stage, seconds[stage])


def _measure(credentials: VipCredentials, stage: ImageStage, output_dir: Path) -> SessionResult:
    given = session_of_stage(stage, output_dir)
    measured: SessionResult = vip_session(credentials, refresh_time=stage.refresh_time, **given)
    return measured


def session_of_stage(stage: ImageStage, output_dir: Path) -> dict[str, Any]:
    """Tell the session that measures images.

    Args:
        stage: The stage.
        output_dir: Local folder for everything that is derived.

    Returns:
        Parameters of `vip_session`.
    """
    return {
        "pipeline_id": stage.pipeline_id,
        "input_settings": {**stage.input_settings, stage.parameter: list(stage.images)},
        "input_dir": stage.input_dir,
        "output_dir": output_dir / "images",
        "upload": SessionUpload(include=tuple(stage.images)),
        "outputs": Outputs(strict=True),
    }


def _analyse(
    credentials: Vantage6Credentials, stage: TableStage, images: ImageStage | None, files: Sequence[Path]
) -> Analysis:
    """Bring the measures to the tables of the nodes, when images were measured, and analyse them there."""
    if images is not None and stage.tables:
        steps.publish_measures(files, images.images, stage.tables, stage.sites, stage.measures)
    analysed: Analysis = federated_analysis(credentials, **analysis_of_stage(stage))
    return analysed


def analysis_of_stage(stage: TableStage) -> dict[str, Any]:
    """Tell the analysis of the measures.

    Args:
        stage: The stage.

    Returns:
        Parameters of `federated_analysis`.
    """
    return {
        "collaboration": stage.collaboration,
        "image": stage.image,
        "method": stage.method,
        "organizations": stage.organizations,
        "arguments": stage.arguments,
        "databases": stage.databases,
        "details": TaskDetails(central=stage.central),
    }


def _publish(credentials: BossCredentials, stage: IngestStage, files: Sequence[Path], output_dir: Path) -> UploadReport:
    """Cut the volume into slices and ingest them as a stack."""
    volumes = [stage.source] if stage.source else sorted(path for path in files if path.match(stage.volume))
    if not volumes:
        raise ConfigurationError(f"No derived file is named {stage.volume}. Give another name, or a source.")
    slices = steps.slice_volume(volumes[0], output_dir / "slices")
    stack = "ingestclient.plugins.stack.ZindexStack"
    config = {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {
                "name": "boss",
                "class": "BossBackend",
                "host": credentials.host,
                "protocol": credentials.protocol,
            },
            "path_processor": {
                "class": f"{stack}PathProcessor",
                "params": {"root_dir": str(slices.folder), "base_filename": "<p:4>", "extension": "png"},
            },
            "tile_processor": {"class": f"{stack}TileProcessor", "params": {"extension": "png", "filetype": "png"}},
        },
        "database": {"collection": stage.collection, "experiment": stage.experiment, "channel": stage.channel},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, slices.width], "y": [0, slices.height], "z": [0, slices.depth], "t": [0, 1]},
            "tile_size": {"x": stage.tile, "y": stage.tile, "z": 1, "t": 1},
        },
    }
    return boss_ingest(
        credentials, IngestConfig.load(config), new_resources=NewResources(datatype="uint8", kind="annotation")
    )
