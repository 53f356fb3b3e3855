"""Naming VIP sessions, so that a retry finds again what they have launched."""

from __future__ import annotations

from pathlib import Path

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vip import InputValue, SessionOptions, VipSession, with_bids_files
from prefect_biomed.clients.vip.girder import girder_path
from prefect_biomed.flows.vip_parameters import Girder, Outputs, Removal, SessionUpload, chosen
from prefect_biomed.tasks.policies import intent_token, is_deployed, lasting_folder

__all__ = ["default_output_dir", "new_session"]


def new_session(
    *,
    pipeline_id: str | None = None,
    input_settings: dict[str, InputValue] | None = None,
    input_dir: Path | None = None,
    output_dir: Path | None = None,
    session_name: str | None = None,
    nb_runs: int = 1,
    upload: SessionUpload | None = None,
    girder: Girder | None = None,
    outputs: Outputs | None = None,
    removal: Removal | None = None,
    options: SessionOptions | None = None,
) -> VipSession:
    """Name a session so that a retry finds its executions again. Nothing is sent.

    Inside a flow the name follows from the outermost flow run and the position of this call under it.

    Args:
        pipeline_id: Pipeline to run.
        input_settings: Values of its parameters; files relative to `input_dir`, or as paths on the platform.
        input_dir: Local folder of input files; None when all inputs are on the platform.
        output_dir: Local folder of the outputs; `default_output_dir` when None.
        session_name: Name of the session; made of the token when None. Letters, digits, `-` and `_`.
        nb_runs: Number of runs with the same settings.
        upload: Where the session is kept on the platform, and where its session file.
        girder: Where outputs go on Girder; they stay on VIP when None.
        outputs: Which outputs are downloaded, in which shape, and what counts as success.
        removal: What is removed from the platform at the end.
        options: What counts for the fields of these two that are left out; the defaults of the groups when None.

    Returns:
        The session.

    Raises:
        ConfigurationError: A relative folder in a run of a deployment, a call from inside a task without a name, or
            values that make no session.
        PreflightFailed: Values ask a BIDS dataset for files, and it has none of them.
    """
    upload, girder = upload or SessionUpload(), girder or Girder()
    token = intent_token("vip-session", explicit=session_name)
    name = session_name or f"session-{token}"
    for what, folder in (("input_dir", input_dir), ("output_dir", output_dir)):
        if is_deployed() and folder is not None and not folder.expanduser().is_absolute():
            raise ConfigurationError(
                f"{what} is the relative path {folder}. A run of a deployment works in a folder that is removed after "
                "it. Give an absolute path."
            )
    session = VipSession.planned(
        session_name=name,
        pipeline_id=pipeline_id,
        input_settings=input_settings or {},
        input_dir=input_dir.expanduser().absolute() if input_dir else None,
        output_dir=(output_dir or default_output_dir(name)).expanduser().absolute(),
        vip_input_dir=f"{upload.vip_home}/{name}/INPUTS",
        vip_output_dir=f"{upload.vip_home}/{name}/OUTPUTS",
        nb_runs=nb_runs,
        token=token,
        backup=upload.backup_location,
        girder_output_dir=f"{girder_path(girder.output) or girder.output.rstrip('/')}/{name}"
        if girder.output
        else None,
        girder_metadata=girder.metadata,
        girder_download=girder.download,
        options=chosen(options or SessionOptions(), outputs, removal),
    )
    return with_bids_files(session)


def default_output_dir(session_name: str) -> Path:
    """Tell where the outputs of a session go when nobody says it.

    Args:
        session_name: Name of the session.

    Returns:
        `vip_outputs/<session_name>` in the current folder; in the home folder for a run of a deployment, whose current
        folder does not outlive it.
    """
    return lasting_folder() / "vip_outputs" / session_name
