"""What VIP does otherwise than the CARMIN platforms, as named capabilities instead of names of platforms."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CARMIN", "VIP", "Profile"]


@dataclass(frozen=True)
class Profile:
    """The ways of one kind of platform. `Platform.profile` tells which one a platform follows.

    Attributes:
        name: What it is called in messages.
        checks_keys: Whether `PUT /platform` tells if the key is good.
        descriptor: What the address of a pipeline is followed by to ask for its Boutiques descriptor.
        plays_launches: Whether an execution starts only when it is played after its launch.
        keeps_refused_launches: Whether a launch that was answered with an error can leave an execution behind.
        takes_results_location: Whether a launch says where its results go.
        takes_files_as_urls: Whether a launch names files by URL, not by path.
        takes_text: Whether a launch takes each value as text, as far as the characters are allowed.
        makes_jobs_of_lists: Whether a list of values makes parallel jobs; else it is one value of one job.
        lists_in_pages: Whether executions are listed page by page; else one list holds the newest.
        describes_ended_executions: Whether lists and descriptions of executions can be had after some have ended.
        tells_jobs: Whether an execution tells its jobs, and so whether they succeeded; else its outputs must do.
        deletes_with_put: Whether records of executions are deleted by `PUT /executions/{id}/delete`; else by `DELETE`.
        keeps_outputs_in_records: Whether outputs belong to the record of their execution and are deleted with it.
        files_root: What all paths of files begin with.
        renames_files: Whether files are stored under trimmed ASCII names without spaces.
        stores_empty_files: Whether a file may be empty.
        lists_hidden_files: Whether the list of a folder has the files whose names begin with a dot.
        stores_raw_bodies: Whether an upload arrives as it was sent; else it must be looked at, and compared.
        limits_downloads: Whether larger files than `max_size_direct_transfer` are refused.
        mounts_storages: Whether executions can read and write external storages such as Girder.
    """

    name: str
    checks_keys: bool
    descriptor: str
    plays_launches: bool
    keeps_refused_launches: bool
    takes_results_location: bool
    takes_files_as_urls: bool
    takes_text: bool
    makes_jobs_of_lists: bool
    lists_in_pages: bool
    describes_ended_executions: bool
    tells_jobs: bool
    deletes_with_put: bool
    keeps_outputs_in_records: bool
    files_root: str
    renames_files: bool
    stores_empty_files: bool
    lists_hidden_files: bool
    stores_raw_bodies: bool
    limits_downloads: bool
    mounts_storages: bool


VIP = Profile(
    name="vip",
    checks_keys=True,
    descriptor="?format=boutiques",
    plays_launches=False,
    keeps_refused_launches=False,
    takes_results_location=True,
    takes_files_as_urls=False,
    takes_text=True,
    makes_jobs_of_lists=True,
    lists_in_pages=False,
    describes_ended_executions=True,
    tells_jobs=True,
    deletes_with_put=True,
    keeps_outputs_in_records=False,
    files_root="/vip/",
    renames_files=True,
    stores_empty_files=False,
    lists_hidden_files=True,
    stores_raw_bodies=True,
    limits_downloads=True,
    mounts_storages=True,
)

CARMIN = Profile(
    name="carmin",
    checks_keys=False,
    descriptor="/boutiquesdescriptor",
    plays_launches=True,
    keeps_refused_launches=True,
    takes_results_location=False,
    takes_files_as_urls=True,
    takes_text=False,
    makes_jobs_of_lists=False,
    lists_in_pages=True,
    describes_ended_executions=False,
    tells_jobs=False,
    deletes_with_put=False,
    keeps_outputs_in_records=True,
    files_root="/",
    renames_files=False,
    stores_empty_files=True,
    lists_hidden_files=False,
    stores_raw_bodies=False,
    limits_downloads=False,
    mounts_storages=False,
)
