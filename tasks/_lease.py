"""A lease on an intent, held on the Prefect server, so that two machines do not launch for it at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime

from prefect.client.base import ServerType
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

from prefect_biomed.clients.errors import HeldElsewhere, ServerUnavailable
from prefect_biomed.clients.texts import logger_of

__all__ = ["lease"]

logger = logger_of(__name__)

# The shortest that a server grants; so much later the slot of a machine that died is free.
_LEASE_SECONDS = 60.0
_PATIENCE_SECONDS = 600.0
_TRIES = 10
# An old server knows no such limits, and a key may lack the right to make them.
_REFUSALS = frozenset({401, 403, 404, 405, 422})


@contextmanager
def lease(token: str, *, attempted_since: datetime | None = None) -> Iterator[datetime | None]:
    """Hold the lease of an intent: a global concurrency limit of one slot, named by the token.

    The limit is there from the first attempt until one ends without an error, so it also tells other machines that
    somebody has begun. Without a server, when Prefect starts one for this process alone, its slot is not taken: no
    other machine could see it, and nothing would free the slot of a process that was killed. A server that does not let
    this key make such limits gives no lease: then only the lock of this machine keeps others out, and a warning says
    so.

    Args:
        token: The intent.
        attempted_since: When earlier attempts were begun, as far as Prefect knows; taken for open where there is no
            lease to tell.

    Yields:
        Since when an earlier attempt is open; None when there is none.

    Raises:
        HeldElsewhere: Another machine has held it for ten minutes.
        ServerUnavailable: The server is out of order or cannot be reached for the moment. Transient.
    """
    name, done = f"biomed-intent-{token}", False
    try:
        with ExitStack() as held:
            try:
                open_since = _entered(held, name)
            except HeldElsewhere:
                raise
            except Exception as error:  # whatever keeps Prefect from answering
                refused = isinstance(error, PrefectHTTPStatusError) and error.response.status_code in _REFUSALS
                if not refused:
                    raise ServerUnavailable(
                        f"The Prefect server cannot tell who holds the lease {name} ({error}). Nothing was launched; "
                        "run this again when it answers."
                    ) from error
                logger.warning("No lease on %s, so other machines are not kept out: %s", name, error)
                yield attempted_since
                return
            yield open_since
            done = True
            # Removed while it is held: whoever waits for it begins anew and finds what was launched.
            with suppress(ObjectNotFound), get_client(sync_client=True) as client:
                client.delete_global_concurrency_limit_by_name(name)
    except Exception as error:
        if not done:
            raise
        # Whatever goes wrong here: what was launched is launched; whoever comes next looks for it a little longer.
        logger.warning("The lease %s could not be given back: %s", name, error)


def _entered(held: ExitStack, name: str) -> datetime | None:
    for last in [False] * (_TRIES - 1) + [True]:
        open_since = _begun(name)
        if _is_for_this_process_alone():
            return open_since
        slot = concurrency(
            name,
            timeout_seconds=_PATIENCE_SECONDS,
            lease_duration=_LEASE_SECONDS,
            strict=True,
            raise_on_lease_renewal_failure=False,
        )
        try:
            held.enter_context(slot)
        except AcquireConcurrencySlotTimeoutError:
            break
        except ConcurrencySlotAcquisitionError:
            if last:
                raise
            continue  # who held it has ended well, and removed it
        return open_since
    raise HeldElsewhere(
        f"Another machine holds the lease {name} for more than {_PATIENCE_SECONDS:.0f} s. Wait for its flow run to "
        f"end. When none is alive, free it with: prefect gcl delete {name}"
    )


def _is_for_this_process_alone() -> bool:
    """Whether the Prefect server ends with this process. Services that free what the dead hold are no part of it."""
    with get_client(sync_client=True) as client:
        return client.server_type == ServerType.EPHEMERAL


def _begun(name: str) -> datetime | None:
    """Make the limit of an intent; since when it exists, when somebody has made it before."""
    with get_client(sync_client=True) as client:
        try:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        except ObjectAlreadyExists:
            with suppress(ObjectNotFound):
                return client.read_global_concurrency_limit_by_name(name).created
    return None
