"""Transferring many files at once in a bounded pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    PermissionDeniedError,
    StorageFull,
    TransferFailed,
)

__all__ = ["transfer_all"]

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

_CONCERNS_ALL = (AuthenticationError, PermissionDeniedError, StorageFull)


def transfer_all(
    items: Sequence[Item],
    transfer: Callable[[Item], Outcome],
    *,
    name: Callable[[Item], str],
    subject: str,
    parallelism: int,
    on_done: Callable[[Item, Outcome], None] | None = None,
) -> list[Outcome]:
    """Transfer many files at once; one that fails does not stop the others.

    Args:
        items: What to transfer.
        transfer: Transfers one item, in a worker thread, with its own retries.
        name: The name of an item in an error.
        subject: What this is about, for the error.
        parallelism: Number of transfers at the same time.
        on_done: Called in the calling thread after each success, so that it may write a ledger without a lock.

    Returns:
        The outcomes, in the order of the items.

    Raises:
        TransferFailed: Some items failed; all others were transferred.
        AuthenticationError: The key was refused; nothing further was begun.
        PermissionDeniedError: The same for a lack of rights.
        StorageFull: The same for a lack of room.
    """
    outcomes: dict[int, Outcome] = {}
    failures: dict[str, BiomedError] = {}
    waiting: Iterable[int] = iter(range(len(items)))
    with ThreadPoolExecutor(max_workers=parallelism) as pool:
        running: dict[Future[Outcome], int] = {}
        try:
            while True:
                for index in waiting:
                    # In a context like the caller's, so that what is logged belongs to the same run.
                    running[pool.submit(copy_context().run, transfer, items[index])] = index
                    if len(running) >= 2 * parallelism:
                        break
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    index = running.pop(future)
                    try:
                        outcomes[index] = future.result()
                    except _CONCERNS_ALL:
                        raise
                    except BiomedError as error:
                        failures[name(items[index])] = error
                    else:
                        if on_done:
                            on_done(items[index], outcomes[index])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failures:
        raise TransferFailed(subject, failures, len(items))
    return [outcomes[index] for index in range(len(items))]
