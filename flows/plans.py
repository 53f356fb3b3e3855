"""What a flow would do on a platform, told before it does it."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.once import Deed, Foreseen

__all__ = ["Plan", "launch_of", "merged"]


class Plan(BaseModel):
    """What a flow run would do now, when all that it launches succeeds. Nothing was sent to find it out.

    Attributes:
        files_to_send: Number of input files that would be sent.
        bytes_to_send: Their size and that of arguments; None when it is known only once they are sent.
        files_replaced: How many of them take the place of another version.
        files_reused: Number of input files that are there already.
        launches: What would become of each launch.
        jobs: Number of jobs that new launches make: jobs on VIP, runs at organizations, tiles.
        removes: Folders and records that would be removed from the platform.
        kept_for: Sessions for which inputs would be kept.
        ends: Remote jobs that would be killed or cancelled.
        makes: Further objects that would be made on the platform.
        notes: What is to be known beside.
    """

    model_config = ConfigDict(frozen=True)

    files_to_send: int = 0
    bytes_to_send: int | None = 0
    files_replaced: int = 0
    files_reused: int = 0
    launches: tuple[Foreseen, ...] = ()
    jobs: int = 0
    removes: tuple[str, ...] = ()
    kept_for: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether nothing would be changed on a platform."""
        adopted = all(one.deed in {Deed.ADOPT, Deed.GO_ON, Deed.DONE} for one in self.launches)
        return adopted and not (self.files_to_send or self.removes or self.ends or self.makes)

    def lines(self) -> list[str]:
        """Say it in words.

        Returns:
            One line for each thing.
        """
        size = "bytes known once they are sent" if self.bytes_to_send is None else _size(self.bytes_to_send)
        told = [f"send     {self.files_to_send} files, {size}; {self.files_reused} are there already"]
        if self.files_replaced:
            told.append(f"replace  {self.files_replaced} of them, of which another version is there")
        told += [f"make     {one}" for one in self.makes]
        told += [f"{one.deed.value:8} {one.what}" + (f" ({one.id})" if one.id else "") for one in self.launches]
        told += [f"jobs     {self.jobs} in the new launches"] if self.jobs else []
        told += [f"end      {one}" for one in self.ends]
        told += [f"remove   {one}" for one in self.removes]
        told += [f"keep     inputs for {one}" for one in self.kept_for]
        told += [f"note     {one}" for one in self.notes]
        return [*told, *(["Nothing would be changed on the platform."] if self.changes_nothing else [])]


def launch_of(seen: Foreseen, jobs: int) -> Plan:
    """Plan one launch.

    Args:
        seen: What would become of it.
        jobs: How many jobs it makes when it is new.

    Returns:
        The plan; what carries the same token beside the adopted object would be ended.
    """
    is_new = seen.deed in {Deed.LAUNCH, Deed.LOOK_FIRST}
    return Plan(launches=(seen,), jobs=jobs if is_new else 0, ends=seen.ends)


def merged(plans: Iterable[Plan]) -> Plan:
    """Put plans together.

    Args:
        plans: Plans of parts that are done one after the other.

    Returns:
        The plan of all.
    """
    parts = list(plans)
    sizes = [part.bytes_to_send for part in parts]
    return Plan(
        files_to_send=sum(part.files_to_send for part in parts),
        bytes_to_send=None if None in sizes else sum(size or 0 for size in sizes),
        files_replaced=sum(part.files_replaced for part in parts),
        files_reused=sum(part.files_reused for part in parts),
        launches=tuple(one for part in parts for one in part.launches),
        jobs=sum(part.jobs for part in parts),
        removes=tuple(dict.fromkeys(one for part in parts for one in part.removes)),
        kept_for=tuple(dict.fromkeys(one for part in parts for one in part.kept_for)),
        ends=tuple(dict.fromkeys(one for part in parts for one in part.ends)),
        makes=tuple(one for part in parts for one in part.makes),
        notes=tuple(dict.fromkeys(one for part in parts for one in part.notes)),
    )


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
