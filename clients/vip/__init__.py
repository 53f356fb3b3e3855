"""The Virtual Imaging Platform: REST client, session file, inputs and transfers."""

from prefect_biomed.clients.vip.client import GenericVipError, VipClient
from prefect_biomed.clients.vip.download import DownloadSummary, download
from prefect_biomed.clients.vip.executions import WorkflowFailed, failures, find, find_all, kill, launch, monitor
from prefect_biomed.clients.vip.finish import (
    FinishSummary,
    StillNeeded,
    StillRunning,
    finish,
    remove_session,
    share_inputs,
)
from prefect_biomed.clients.vip.girder import GirderEntry, GirderStorage, open_girder_session, share_girder_key
from prefect_biomed.clients.vip.inputs import Preflight, describe, preflight
from prefect_biomed.clients.vip.models import (
    InputValue,
    Job,
    JobStatus,
    Parameter,
    ParameterType,
    PathEntry,
    Pipeline,
    Platform,
    SessionResult,
    VipSession,
    Workflow,
    WorkflowStatus,
)
from prefect_biomed.clients.vip.session_file import SessionFile, SessionLocked, SessionRecord, open_session
from prefect_biomed.clients.vip.upload import UploadSummary, upload

__all__ = [
    "DownloadSummary",
    "FinishSummary",
    "GenericVipError",
    "GirderEntry",
    "GirderStorage",
    "InputValue",
    "Job",
    "JobStatus",
    "Parameter",
    "ParameterType",
    "PathEntry",
    "Pipeline",
    "Platform",
    "Preflight",
    "SessionFile",
    "SessionLocked",
    "SessionRecord",
    "SessionResult",
    "StillNeeded",
    "StillRunning",
    "UploadSummary",
    "VipClient",
    "VipSession",
    "Workflow",
    "WorkflowFailed",
    "WorkflowStatus",
    "describe",
    "download",
    "failures",
    "find",
    "find_all",
    "finish",
    "kill",
    "launch",
    "monitor",
    "open_girder_session",
    "open_session",
    "preflight",
    "remove_session",
    "share_girder_key",
    "share_inputs",
    "upload",
]
