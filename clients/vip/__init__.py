"""The Virtual Imaging Platform: REST client, session file, inputs and transfers."""

from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.crate import write_session_crate
from prefect_biomed.clients.vip.description import describe
from prefect_biomed.clients.vip.download import DownloadSummary, download
from prefect_biomed.clients.vip.errors import (
    GenericVipError,
    NotFetched,
    SessionLocked,
    StillNeeded,
    StillRunning,
    WorkflowFailed,
)
from prefect_biomed.clients.vip.finish import FinishSummary, finish, remove_session, share_inputs
from prefect_biomed.clients.vip.girder import GirderEntry, GirderStorage
from prefect_biomed.clients.vip.girder_sessions import open_girder_session, share_girder_key
from prefect_biomed.clients.vip.launches import launch
from prefect_biomed.clients.vip.models import (
    InputSettings,
    InputValue,
    Job,
    JobStatus,
    Parameter,
    ParameterType,
    PathEntry,
    Pipeline,
    Platform,
    SessionOptions,
    SessionResult,
    VipSession,
    Workflow,
    WorkflowStatus,
)
from prefect_biomed.clients.vip.monitoring import failures, find_all, kill, kill_session, monitor
from prefect_biomed.clients.vip.outcome import Asked, Outcome, judge, outcome
from prefect_biomed.clients.vip.preflight import Preflight, preflight
from prefect_biomed.clients.vip.profiles import Profile
from prefect_biomed.clients.vip.session_file import SessionFile, open_intents, open_session, with_bids_files
from prefect_biomed.clients.vip.session_record import SessionRecord
from prefect_biomed.clients.vip.upload import UploadSummary, complete_inputs, upload

__all__ = [
    "Asked",
    "DownloadSummary",
    "FinishSummary",
    "GenericVipError",
    "GirderEntry",
    "GirderStorage",
    "InputSettings",
    "InputValue",
    "Job",
    "JobStatus",
    "NotFetched",
    "Outcome",
    "Parameter",
    "ParameterType",
    "PathEntry",
    "Pipeline",
    "Platform",
    "Preflight",
    "Profile",
    "SessionFile",
    "SessionLocked",
    "SessionOptions",
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
    "complete_inputs",
    "describe",
    "download",
    "failures",
    "find_all",
    "finish",
    "judge",
    "kill",
    "kill_session",
    "launch",
    "monitor",
    "open_girder_session",
    "open_intents",
    "open_session",
    "outcome",
    "preflight",
    "remove_session",
    "share_girder_key",
    "share_inputs",
    "upload",
    "with_bids_files",
    "write_session_crate",
]
