"""VIP, vantage6 and Boss on the loopback interface, to try, demonstrate and test flows against.

``python -m prefect_biomed.sandbox`` serves them from the command line; `Sandbox` is the same as a
context manager, so that users can test their own pipelines offline::

    from prefect_biomed.sandbox import Fault, Sandbox

    with Sandbox("vip", seed=7) as sandbox:
        sandbox.vip.faults.add(Fault(method="PUT", path=r"/rest/path/", calls=[3], status=502))
        ...
        assert sandbox.vip.journal.peak(method="PUT") <= 8

The sandbox behaves as the real servers do, oddities included, and shares no code with
`prefect_biomed.clients`: one mistake cannot hide in both.
"""

from prefect_biomed.sandbox._core import Platform, Switches, annotate
from prefect_biomed.sandbox._faults import Fault, FaultPlan
from prefect_biomed.sandbox._journal import Entry, Journal
from prefect_biomed.sandbox._sandbox import Sandbox

__all__ = [
    "Entry",
    "Fault",
    "FaultPlan",
    "Journal",
    "Platform",
    "Sandbox",
    "Switches",
    "annotate",
]
