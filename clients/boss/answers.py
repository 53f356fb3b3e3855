"""What the Boss and the queues of AWS answer, as it comes over the wire."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import (
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SecretStr,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from prefect_biomed.clients.boss.models import IngestJob, IngestType, JobStatus
from prefect_biomed.clients.rest import Answered

__all__ = [
    "BatchAnswer",
    "ChannelAnswer",
    "CompletionAnswer",
    "CountsAnswer",
    "DownsampleAnswer",
    "ErrorAnswer",
    "ExperimentAnswer",
    "FrameAnswer",
    "FrameworkErrorAnswer",
    "JobAnswer",
    "JobListAnswer",
    "JoinAnswer",
    "JoinedJobAnswer",
    "KeysAnswer",
    "MessagesAnswer",
    "NameAnswer",
    "NamesAnswer",
    "StatusAnswer",
]

_TIME = TypeAdapter(datetime)

# What else was in these would become part of a path, a header or a command.
QueueUrl = Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\-]+(:\d{1,5})?(/[A-Za-z0-9._\-]+)+$", max_length=2000)]
BucketName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{1,253}[A-Za-z0-9]$")]


def _kind(value: Any) -> Any:
    """The Boss counts the kinds of jobs; those that it may invent later keep their number."""
    if value is None:
        return IngestType.TILE
    if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
        return {0: IngestType.TILE, 1: IngestType.VOLUMETRIC}.get(int(value)) or IngestType(str(value))
    return value


def _time(value: Any) -> datetime | None:
    """A time that cannot be read is one that is not told."""
    try:
        moment = _TIME.validate_python(value)
    except ValidationError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _seconds(value: Any) -> float | None:
    """SQS tells milliseconds as text; a time that cannot be read is one that is not told."""
    try:
        return int(value) / 1000
    except (TypeError, ValueError, OverflowError):
        return None


class JobAnswer(Answered):
    """An ingest job in a list, or one that was just made."""

    id: int
    collection: str
    experiment: str
    channel: str
    status: JobStatus
    ingest_type: Annotated[IngestType, BeforeValidator(_kind)] = IngestType.TILE
    tile_count: int | None = None
    created_on: Annotated[datetime | None, BeforeValidator(_time)] = None

    def job(self, host: str) -> IngestJob:
        """Make the job of it.

        Args:
            host: Server that it lives on.
        """
        return IngestJob(
            id=self.id,
            collection=self.collection,
            experiment=self.experiment,
            channel=self.channel,
            status=self.status,
            ingest_type=self.ingest_type,
            tile_count=self.tile_count or 0,
            created_on=self.created_on,
            host=host,
        )


class JobListAnswer(Answered):
    """The user's jobs."""

    ingest_jobs: list[JobAnswer]


class StatusAnswer(Answered):
    """How far a job is."""

    status: JobStatus
    total_message_count: int
    current_message_count: int


class JoinedJobAnswer(JobAnswer):
    """A job with its queues."""

    upload_queue: QueueUrl | None = None
    ingest_queue: QueueUrl | None = None
    tile_index_queue: QueueUrl | None = None


class KeysAnswer(Answered):
    """A pair of AWS keys."""

    access_key: SecretStr
    secret_key: SecretStr
    security_token: SecretStr | None = None


class _Leaf(Answered):
    model_config = ConfigDict(extra="allow")

    datatype: str
    base_resolution: int = 0


class _Resource(Answered):
    # Sent back with every tile as it came, whatever else is in it.
    model_config = ConfigDict(extra="allow")

    lookup_key: str
    channel: _Leaf


class JoinAnswer(Answered):
    """A join: what an upload needs, as far as the job is ready; only the job itself when it is over."""

    ingest_job: JoinedJobAnswer
    credentials: KeysAnswer | None = None
    tile_bucket_name: BucketName | None = None
    ingest_bucket_name: BucketName | None = None
    resource: _Resource | None = None
    kvio_settings: JsonValue = Field(default_factory=dict, alias="KVIO_SETTINGS")
    stateio_config: JsonValue = Field(default_factory=dict, alias="STATEIO_CONFIG")
    objectio_config: JsonValue = Field(default_factory=dict, alias="OBJECTIO_CONFIG")

    @property
    def parameters(self) -> dict[str, JsonValue]:
        """What the lambdas want to get back with every tile."""
        return {
            "upload_queue": self.ingest_job.upload_queue,
            "ingest_queue": self.ingest_job.ingest_queue,
            "KVIO_SETTINGS": self.kvio_settings,
            "STATEIO_CONFIG": self.stateio_config,
            "OBJECTIO_CONFIG": self.objectio_config,
            "resource": self.resource.model_dump(mode="json", exclude_unset=True) if self.resource else {},
        }


class CompletionAnswer(Answered):
    """A completion that goes on."""

    wait_secs: float | None = Field(default=None, allow_inf_nan=False)
    job_status: JobStatus | None = None
    info: JsonValue = None

    @model_validator(mode="after")
    def _says_something(self) -> CompletionAnswer:
        if self.wait_secs is None and self.job_status is None:
            raise ValueError("neither wait_secs nor job_status")
        return self


class NameAnswer(Answered):
    """A collection, experiment, channel or coordinate frame, of which only the name counts."""

    name: str


class NamesAnswer(Answered):
    """What lies in a collection or an experiment, or the collections themselves."""

    names: list[str] = Field(validation_alias=AliasChoices("collections", "experiments", "channels"))


class ExperimentAnswer(NameAnswer):
    """An experiment."""

    coord_frame: str
    num_time_samples: int = 1


class ChannelAnswer(NameAnswer):
    """A channel."""

    datatype: str
    type: str
    base_resolution: int = 0


class DownsampleAnswer(Answered):
    """Whether lower resolutions of a channel are made."""

    status: str
    num_hierarchy_levels: int = Field(ge=1)


class FrameAnswer(NameAnswer):
    """A coordinate frame, in voxels."""

    x_start: int
    x_stop: int
    y_start: int
    y_stop: int
    z_start: int
    z_stop: int
    x_voxel_size: float | None = None
    y_voxel_size: float | None = None
    z_voxel_size: float | None = None
    voxel_unit: str = ""


class ErrorAnswer(Answered):
    """An error in the shape of the Boss."""

    code: StrictInt
    message: str


class FrameworkErrorAnswer(Answered):
    """An error in the shape of the framework under it: a bad token, a body that cannot be parsed."""

    detail: str


class _MessageAttributes(Answered):
    receives: int = Field(default=1, alias="ApproximateReceiveCount")
    sent_at: Annotated[float | None, BeforeValidator(_seconds)] = Field(default=None, alias="SentTimestamp")


class _Message(Answered):
    id: str = Field(alias="MessageId")
    handle: str = Field(alias="ReceiptHandle")
    body: str = Field(alias="Body")
    attributes: _MessageAttributes = Field(default_factory=_MessageAttributes, alias="Attributes")


class MessagesAnswer(Answered):
    """Messages that SQS has leased; it leaves the list out when there are none."""

    messages: list[_Message] | None = Field(default=None, alias="Messages")


class _Counts(Answered):
    visible: int = Field(alias="ApproximateNumberOfMessages")
    leased: int = Field(alias="ApproximateNumberOfMessagesNotVisible")


class CountsAnswer(Answered):
    """How many messages a queue of SQS has."""

    attributes: _Counts = Field(alias="Attributes")


class _Entry(Answered):
    position: int = Field(alias="Id")
    is_our_fault: bool = Field(default=False, alias="SenderFault")


class BatchAnswer(Answered):
    """What has become of each entry of a batch that SQS was sent."""

    successful: list[_Entry] = Field(default=[], alias="Successful")
    failed: list[_Entry] = Field(default=[], alias="Failed")

    @model_validator(mode="after")
    def _tells_of_some(self) -> BatchAnswer:
        if not self.successful and not self.failed:
            raise ValueError("no entry is told of")
        return self
