"""The Boss: ingest jobs, from a configuration to pixels that can be read back."""

from prefect_biomed.clients.boss.accounting import account, preview, treatments_of
from prefect_biomed.clients.boss.channels import write_array
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import Database, IngestConfig
from prefect_biomed.clients.boss.crate import REPORT, keep_report, read_report, report_folder, write_ingest_crate
from prefect_biomed.clients.boss.cutouts import Cutout
from prefect_biomed.clients.boss.downsampling import downsample
from prefect_biomed.clients.boss.errors import IngestIncomplete, ProcessFailed, VerificationFailed
from prefect_biomed.clients.boss.launches import create_once, job_of_intent, settled_job
from prefect_biomed.clients.boss.ledger import Ledger, default_folder
from prefect_biomed.clients.boss.models import (
    Channel,
    Completion,
    IngestJob,
    IngestType,
    JobCounts,
    JobStatus,
    JoinedJob,
    UploadProgress,
    UploadReport,
    UploadSettings,
)
from prefect_biomed.clients.boss.monitoring import complete, wait_until_ready
from prefect_biomed.clients.boss.preflight import create_resources, preflight
from prefect_biomed.clients.boss.processes import upload
from prefect_biomed.clients.boss.proofs import Region, Verification, VerifySettings, WrongTile
from prefect_biomed.clients.boss.proposals import Proposal, SourceChoices, propose, write_configuration
from prefect_biomed.clients.boss.publishing import PublishIncomplete, PublishReport, publish, write_cutouts
from prefect_biomed.clients.boss.storage import StorageOptions
from prefect_biomed.clients.boss.tokens import find_token
from prefect_biomed.clients.boss.uploader import Uploader
from prefect_biomed.clients.boss.verification import extents_to_heal, verify
from prefect_biomed.clients.boss.volumes import VolumeTarget

__all__ = [
    "REPORT",
    "BossClient",
    "Channel",
    "Completion",
    "Cutout",
    "Database",
    "IngestConfig",
    "IngestIncomplete",
    "IngestJob",
    "IngestType",
    "JobCounts",
    "JobStatus",
    "JoinedJob",
    "Ledger",
    "ProcessFailed",
    "Proposal",
    "PublishIncomplete",
    "PublishReport",
    "Region",
    "SourceChoices",
    "StorageOptions",
    "UploadProgress",
    "UploadReport",
    "UploadSettings",
    "Uploader",
    "Verification",
    "VerificationFailed",
    "VerifySettings",
    "VolumeTarget",
    "WrongTile",
    "account",
    "complete",
    "create_once",
    "create_resources",
    "default_folder",
    "downsample",
    "extents_to_heal",
    "find_token",
    "job_of_intent",
    "keep_report",
    "preflight",
    "preview",
    "propose",
    "publish",
    "read_report",
    "report_folder",
    "settled_job",
    "treatments_of",
    "upload",
    "verify",
    "wait_until_ready",
    "write_array",
    "write_configuration",
    "write_cutouts",
    "write_ingest_crate",
]
