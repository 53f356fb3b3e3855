"""The Boss on the loopback interface: REST, SQS, S3, and the pixels that come out in the end.

The REST interface is under `/latest` and `/v1`; the same port answers SQS and S3, so that a client
needs nothing but `AWS_ENDPOINT_URL` set to the sandbox's URL.
"""

from prefect_biomed.sandbox.boss._jobs import Job, Observed, Status
from prefect_biomed.sandbox.boss._platform import BossSandbox
from prefect_biomed.sandbox.boss._service import AwsFault, BossSwitches, IngestFault

__all__ = ["AwsFault", "BossSandbox", "BossSwitches", "IngestFault", "Job", "Observed", "Status"]
