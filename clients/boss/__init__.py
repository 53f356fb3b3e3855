"""The Boss: ingest jobs, from a configuration to pixels that can be read back."""

from prefect_biomed.clients.boss.accounting import IngestIncomplete, account, preview
from prefect_biomed.clients.boss.client import BossClient, Cutout, find_token
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.intents import create_once, job_of_intent
from prefect_biomed.clients.boss.ledger import Ledger, default_folder
from prefect_biomed.clients.boss.models import (
    Channel,
    Completion,
    IngestJob,
    JobCounts,
    JobStatus,
    JoinedJob,
    UploadReport,
)
from prefect_biomed.clients.boss.processes import ProcessFailed, upload
from prefect_biomed.clients.boss.uploader import Uploader, UploadProgress, UploadSettings

__all__ = [
    "BossClient",
    "Channel",
    "Completion",
    "Cutout",
    "IngestConfig",
    "IngestIncomplete",
    "IngestJob",
    "JobCounts",
    "JobStatus",
    "JoinedJob",
    "Ledger",
    "ProcessFailed",
    "UploadProgress",
    "UploadReport",
    "UploadSettings",
    "Uploader",
    "account",
    "create_once",
    "default_folder",
    "find_token",
    "job_of_intent",
    "preview",
    "upload",
]
