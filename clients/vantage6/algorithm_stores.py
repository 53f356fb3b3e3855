"""What algorithm stores tell of the functions of an image: whether one coordinates others."""

from __future__ import annotations

from dataclasses import dataclass

from prefect_biomed.clients.errors import BiomedError, NotFoundError
from prefect_biomed.clients.rest import Answered
from prefect_biomed.clients.texts import one_line
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.models import AlgorithmStore

__all__ = ["Kind", "kind_of"]

# Stores of generation 4 say the first of each, those of 5 the second.
_CENTRAL = frozenset({"central", "central_compute"})
_PARTIAL = frozenset({"federated", "federated_compute"})


class _Described(Answered):
    name: str
    type: str | None = None
    step_type: str | None = None

    @property
    def kind(self) -> str:
        return self.step_type or self.type or "nothing"


class _Algorithm(Answered):
    image: str
    digest: str | None = None
    functions: tuple[_Described, ...] = ()

    def is_of(self, image: str) -> bool:
        """Whether this is the description of an image, which may be named with its digest."""
        name, _, digest = image.partition("@")
        return self.image.partition("@")[0] == name and (not digest or self.digest in (None, digest))


class _Algorithms(Answered):
    data: tuple[_Algorithm, ...]


@dataclass(frozen=True)
class Kind:
    """Whether a function coordinates others, as far as it is described.

    Attributes:
        central: None when nobody tells.
        unknown_because: Why it is not known; empty when it is.
    """

    central: bool | None
    unknown_because: str = ""


def kind_of(client: Vantage6Client, store_id: int, image: str, method: str) -> Kind:
    """Ask an algorithm store whether a function coordinates others (``GET algorithmstore/{id}``, ``GET algorithm``).

    Safe to repeat. A store on the server's own origin is asked as the account; one elsewhere without a login, which
    public stores allow, because a key of ours goes to no other host.

    Args:
        client: The account.
        store_id: The store.
        image: Docker image, with or without its digest.
        method: The function.

    Returns:
        What the store says. A store that cannot be asked, describes the function as neither, in two ways, or not at
        all, leaves it unknown: that it says nothing is no evidence of anything.

    Raises:
        NotFoundError: The server knows no store of this id.
    """
    try:
        store = client.get(AlgorithmStore, store_id)
    except NotFoundError:
        raise
    except BiomedError as error:
        return Kind(None, f"algorithm store {store_id} is not shown: {one_line(error)}")
    try:
        with client.beside(store.url) as session:
            path, params, headers = "/algorithm", {"image": image}, {"Server-Url": client.url}
            found = session.ask(_Algorithms, "GET", path, params=params, headers=headers, about=f"store {store.name!r}")
    except BiomedError as error:
        return Kind(None, f"algorithm store {store.name!r} cannot be asked: {one_line(error)}")
    told = {
        function.kind
        for algorithm in found.data
        if algorithm.is_of(image)
        for function in algorithm.functions
        if function.name == method
    }
    if told and told <= _CENTRAL:
        return Kind(central=True)
    if told and told <= _PARTIAL:
        return Kind(central=False)
    said = f"describes it as {', '.join(sorted(told))}" if told else "does not describe it"
    return Kind(None, f"algorithm store {store.name!r} {said}")
