"""The commands, one function each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn, TypeVar

import typer

__all__ = ["app"]

app = typer.Typer(
    name="prefect-biomed",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Drive VIP, vantage6 and the Boss with Prefect.",
)

T = TypeVar("T")

ParamFile = Annotated[Path | None, typer.Option("--param-file", "-f", help="YAML or JSON file of parameters.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="One parameter: name=value or group.name=value. Repeatable.")
]
Credentials = Annotated[
    list[str] | None, typer.Option("--credentials", "-c", help="Saved block, as vip-credentials/lab. Repeatable.")
]
Key = Annotated[str | None, typer.Option(help="Identity of the intent: the same key again never launches twice.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command(epilog="Example: prefect-biomed run vip-session -f session.yaml -s nb_runs=3 --key sub-01")
def run(
    flow: Annotated[str, typer.Argument(help="Such as vip-session; `prefect-biomed flows` lists them.")],
    param_file: ParamFile = None,
    settings: Settings = None,
    credentials: Credentials = None,
    key: Key = None,
    outputs_json: Annotated[Path | None, typer.Option(help="Write state, result and files to this file.")] = None,
    json: AsJson = False,
) -> None:
    """Run a flow here, with a Prefect server or without one.

    Exit codes: 0 done, 1 failed, 2 something that was given is wrong and nothing was begun, 75 try the same again.
    """
    _run(flow, {}, settings, credentials, file=param_file, key=key, outputs_json=outputs_json, json=json)


@app.command(epilog="Example: prefect-biomed plan vip-session -f session.yaml --key sub-01")
def plan(
    flow: Annotated[str, typer.Argument(help="Such as vip-session.")],
    param_file: ParamFile = None,
    settings: Settings = None,
    credentials: Credentials = None,
    key: Key = None,
    json: AsJson = False,
) -> None:
    """Tell what `run` with the same words would send, launch, end and remove. Nothing is changed.

    It says what would be done now, and when all that is launched succeeds: after a failure everything stays. Without
    `--key` each run is something new, and so is each launch.

    Exit codes: 0 planned, 1 failed, 2 the run would be refused, 75 the platform cannot be asked now.
    """
    from prefect_biomed.cli.planning import plan_flow
    from prefect_biomed.cli.running import as_json, read_parameters
    from prefect_biomed.clients.texts import one_line

    planned = _of_flow(
        flow,
        lambda: plan_flow(flow, read_parameters(param_file, settings or []), key=key, credentials=credentials or []),
        json=json,
    )
    typer.echo(as_json(planned) if json else "\n".join(map(one_line, planned.lines())))


@app.command(epilog="Example: prefect-biomed flows --json")
def flows(json: AsJson = False) -> None:
    """List the flows that `run` knows."""
    from prefect_biomed.cli.running import as_json, flow_names

    known = flow_names()
    typer.echo(as_json(known) if json else "\n".join(known))


Home = Annotated[Path | None, typer.Option(help="Folder of the laboratory; ~/.prefect-biomed/lab by default.")]


@app.command(epilog="Example: prefect-biomed up --platform vip")
def up(
    platform: Annotated[list[str] | None, typer.Option(help="vip, vantage6 or boss; all by default.")] = None,
    home: Home = None,
    json: AsJson = False,
) -> None:
    """Start emulated platforms, a Prefect server and a worker, with blocks, sample data and deployments that run."""
    from prefect_biomed.cli.running import as_json

    lab = _laboratory()
    place = home or lab.default_home()
    running = _or_exit(lambda: lab.up(place.absolute(), platform or ("vip", "vantage6", "boss")))
    if json:
        typer.echo(as_json({"home": place, "api_url": running.api_url, "sandbox": running.sandbox}))
        return
    typer.echo(f"Prefect      {running.api_url.removesuffix('/api')}")
    for name in running.platforms:
        typer.echo(f"{name:12} {running.sandbox[name]['url']}")
    typer.echo(f"files        {place}")
    typer.echo("\nType next:\n")
    typer.echo(f"  export PREFECT_API_URL={running.api_url}")
    typer.echo(f"  prefect deployment run '{lab.FIRST[running.platforms[0]]}' --watch")
    typer.echo("  prefect-biomed down" + (f" --home {home}" if home else ""))


@app.command(epilog="Example: prefect-biomed down")
def down(home: Home = None) -> None:
    """End what `up` has started, and nothing else."""
    lab = _laboratory()
    ended = lab.down((home or lab.default_home()).absolute())
    typer.echo(f"Ended: {', '.join(ended)}" if ended else "Nothing was running.")


@app.command(epilog="Example: prefect-biomed status --json")
def status(home: Home = None, json: AsJson = False) -> None:
    """Tell what of the laboratory is running. Exit code 1 when nothing is."""
    from prefect_biomed.cli.running import FAILED, as_json

    lab = _laboratory()
    alive = {name: process.pid for name, process in lab.status((home or lab.default_home()).absolute()).items()}
    if json:
        typer.echo(as_json(alive))
    else:
        typer.echo("\n".join(f"{name:12} process {pid}" for name, pid in alive.items()) or "Nothing is running.")
    raise typer.Exit(0 if alive else FAILED)


@app.command(epilog="Example: prefect-biomed init study --deployment vip-session --deployment repeatability-weekly")
def init(
    folder: Annotated[Path, typer.Argument(help="Made when missing; files that are there stay as they are.")] = Path(),
    deployment: Annotated[list[str] | None, typer.Option(help="Repeatable; vip-session by default.")] = None,
    json: AsJson = False,
) -> None:
    """Make a project: deployments, parameter files, variables of the credentials."""
    from prefect_biomed.cli import project
    from prefect_biomed.cli.running import as_json

    made = _or_exit(lambda: project.init(folder, deployment or ("vip-session",)))
    if json:
        typer.echo(as_json(made))
        return
    for name in made.written:
        typer.echo(f"{folder / name} written")
    for name in made.kept:
        typer.echo(f"{folder / name} was there and is as it was")


@app.command(epilog="Example: prefect-biomed deploy --dry-run")
def deploy(
    prefect_file: Annotated[
        Path | None, typer.Option(help="Deployments; prefect.yaml of this folder, else those of the package.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="Only this deployment. Repeatable.")] = None,
    pool: Annotated[str, typer.Option(help="Work pool that is made when it is missing.")] = "biomed",
    block: Annotated[str, typer.Option(help="Name under which credentials of the environment are saved.")] = "default",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    json: AsJson = False,
) -> None:
    """Register blocks and deployments; parameters, schedules and limits that users have set stay."""
    from prefect_biomed.cli import project
    from prefect_biomed.cli.running import as_json

    here = Path(project.FILE_NAME)
    file = prefect_file or (here if here.is_file() else None)
    deployed = _or_exit(lambda: project.deploy(file, name or (), pool=pool, block=block, dry_run=dry_run))
    if json:
        typer.echo(as_json(deployed))
        return
    for one in deployed:
        typer.echo(f"{one.name}: {one.what}" + (f"; kept: {', '.join(one.kept)}" if one.kept else ""))


@app.command(epilog="Example: prefect-biomed resume /data/outputs/sub-01")
def resume(folder: Path, settings: Settings = None, credentials: Credentials = None, json: AsJson = False) -> None:
    """Continue a VIP session from its output folder alone."""
    _run("vip-resume", {"output_dir": folder}, settings, credentials, json=json)


@app.command(epilog="Example: prefect-biomed running --json")
def running(settings: Settings = None, credentials: Credentials = None, json: AsJson = False) -> None:
    """Show what is running or was left on the platforms."""
    _run("what-is-running", {}, settings, credentials, json=json, show=_leftover)


@app.command(name="show-pipeline", epilog="Example: prefect-biomed show-pipeline GreyMatter")
def show_pipeline(
    pipeline: Annotated[str | None, typer.Argument(help="Part of an identifier; all when empty.")] = None,
    credentials: Credentials = None,
    json: AsJson = False,
) -> None:
    """List the pipelines of VIP, or describe one with settings to paste."""
    _run("vip-show-pipeline", {"pipeline_id": pipeline}, None, credentials, json=json, show=_pipeline)


def _pipeline(one: Mapping[str, Any]) -> str:
    return f"{one['identifier']}  {one['name']} {one['version']}".rstrip()


def _leftover(one: Mapping[str, Any]) -> str:
    """One line of what is there, and below it what to type."""
    about = [one["platform"], one["kind"], one["identifier"], one["name"], one["status"], one["since"]]
    commands = [f"    {does}: {one[does]}" for does in ("resume", "remove") if one[does]]
    return "\n".join([" ".join(str(value) for value in about if value), *commands])


@app.command(epilog="Example: prefect-biomed replay bundle.tar.gz replays/study --set input_dir=inputs")
def replay(
    bundle: Annotated[Path, typer.Argument(help="Bundle of public executions of VIP: a folder or an archive.")],
    output_dir: Annotated[
        Path, typer.Argument(help="Folder of the replay; the same one again launches nothing twice.")
    ],
    settings: Settings = None,
    credentials: Credentials = None,
    json: AsJson = False,
) -> None:
    """Run public executions of VIP again, once each, and tell whether they give what was published.

    Exit code 0 only when everything is reproduced; 1 differs or tampered, 2 refused before anything was sent, 3 not
    judged, 75 try again.
    """
    given = {"bundle": bundle.absolute(), "output_dir": output_dir.absolute()}
    _run("vip-replay", given, settings, credentials, json=json, exit_codes=_REPLAYED)


_REPLAYED = {"Differs": 1, "Tampered": 1, "NotJudged": 3}


@app.command(epilog="Example: prefect-biomed publish /data/outputs/sub-01 bundle --with-inputs")
def publish(
    folder: Annotated[Path, typer.Argument(help="Output folder of a session that has succeeded.")],
    bundle: Annotated[Path, typer.Argument(help="Folder for the bundle.")],
    with_inputs: Annotated[bool, typer.Option("--with-inputs", help="Publish the input files, too.")] = False,
    settings: Settings = None,
    credentials: Credentials = None,
    json: AsJson = False,
) -> None:
    """Write a bundle of public executions of a VIP session, which `replay` can run again."""
    given = {"output_dir": folder.absolute(), "bundle": bundle.absolute(), "with_inputs": with_inputs}
    _run("vip-publish", given, settings, credentials, json=json)


@app.command(epilog="Example: prefect-biomed crate /data/outputs/sub-01 --check")
def crate(
    folder: Annotated[Path, typer.Argument(help="Output folder of a VIP session, or folder of an experiment.")],
    check: Annotated[
        bool, typer.Option("--check", help="Prove the files by the crate that is there; write nothing.")
    ] = False,
    licence: Annotated[str, typer.Option(help="Address of the licence of the outputs.")] = "",
    json: AsJson = False,
) -> None:
    """Write how outputs came about as an RO-Crate, or prove them by it. Exit code 1 when a file is not as it was.

    Analyses with an output_dir and ingests have one; `--check` proves the files of these, too.
    """
    from prefect_biomed.cli.running import as_json
    from prefect_biomed.clients.crates import METADATA, check_crate
    from prefect_biomed.clients.vip import open_session, write_session_crate

    folder = folder.absolute()
    if not check and (folder / "experiment.jsonl").is_file():
        _or_exit(lambda: _write_experiment_crate(folder, licence))
    elif not check:
        _or_exit(lambda: write_session_crate(open_session(folder), licence=licence))
    differences = _or_exit(lambda: check_crate(folder))
    if json:
        found = [difference.model_dump() for difference in differences]
        typer.echo(as_json({"crate": folder / METADATA, "differences": found}))
    else:
        lines = [f"{difference.path}: {difference.what}" for difference in differences]
        typer.echo("\n".join(lines) or f"All files are as {folder / METADATA} says.")
    raise typer.Exit(1 if differences else 0)


def _write_experiment_crate(folder: Path, licence: str) -> None:
    from prefect_biomed import analysis

    analysis.require_extra()
    importlib.import_module("prefect_biomed.analysis.crate").write_experiment_crate(folder, licence=licence)


@app.command(epilog="Example: prefect-biomed doctor --pool biomed")
def doctor(
    pool: Annotated[str, typer.Option(help="Work pool that has to be there.")] = "biomed",
    seconds: Annotated[float, typer.Option(min=1, help="How long the scheduler may take for a schedule of ours.")] = 90,
    json: AsJson = False,
) -> None:
    """Look at all that a run needs, and say what to do next about each thing that is wrong.

    A schedule of its own has to make a run; it is removed again. Exit code 1 when something is broken.
    """
    from prefect_biomed.cli.doctor import Level, examine
    from prefect_biomed.cli.running import FAILED, as_json
    from prefect_biomed.clients.texts import lines

    findings = examine(pool=pool, probe_seconds=seconds)
    if json:
        typer.echo(as_json(findings))
    for one in () if json else findings:
        typer.echo(f"{one.level.value:8} {one.about}: {lines(one.seen)}")
        if one.next_step and one.level is not Level.FINE:
            typer.echo(f"         {lines(one.next_step)}")
    raise typer.Exit(FAILED if any(one.level is Level.BROKEN for one in findings) else 0)


@app.command(epilog="Example: prefect-biomed kill /data/outputs/sub-01")
def kill(
    session: Annotated[str | None, typer.Argument(help="Name or folder of a VIP session.")] = None,
    task: Annotated[list[int] | None, typer.Option(help="Id of a vantage6 task. Repeatable.")] = None,
    ingest: Annotated[list[int] | None, typer.Option(help="Number of a Boss ingest job. Repeatable.")] = None,
    key: Annotated[str | None, typer.Option(help="Key of the runs whose jobs are killed; with --flow.")] = None,
    flow: Annotated[str, typer.Option(help="Flow of the runs that had the key.")] = "",
    param_file: ParamFile = None,
    settings: Settings = None,
    credentials: Credentials = None,
    json: AsJson = False,
) -> None:
    """Kill what runs remotely: the runs of a VIP session, vantage6 tasks, Boss ingest jobs, or all of a key.

    Outputs and inputs of a session stay where they are. Killing what has ended changes nothing. With --key give the
    flow and the parameters that `run` was given.
    """
    from prefect_biomed.cli.running import REFUSED

    named = [session is not None, bool(task or ingest), key is not None]
    if named.count(True) != 1 or (key is None) != (not flow):
        said = "Name a session, or tasks and ingest jobs with --task and --ingest, or --key with --flow; not both."
        typer.echo(said, err=True)
        raise typer.Exit(REFUSED)
    if key is not None:
        _kill_by_key(flow, key, param_file, settings, credentials, json=json)
        return
    if session is None:
        jobs: dict[str, Any] = {"tasks": task or [], "ingest_jobs": ingest or []}
        _run("remove-leftovers", jobs, settings, credentials, json=json)
        return
    folder = Path(session).absolute()
    known: dict[str, Any] = {"output_dir": folder} if folder.is_dir() else {"session_name": session}
    _run("vip-kill", known, settings, credentials, json=json)


_RUN = "Folder of a VIP session; or the token or number of what was launched on vantage6 or the Boss."


@app.command(epilog="Example: prefect-biomed why /data/outputs/sub-01")
def why(run: Annotated[str, typer.Argument(help=_RUN)], json: AsJson = False) -> None:
    """Tell the reason of each launch, skip and adoption, from the records on this machine. No platform is asked."""
    from prefect_biomed.cli.reasons import reasons
    from prefect_biomed.cli.running import as_json
    from prefect_biomed.clients.texts import one_line

    found = _or_exit(lambda: reasons(run))
    typer.echo(as_json(found) if json else "\n".join(one_line(f"{one.what}: {one.why}") for one in found))


@app.command(epilog="Example: prefect-biomed diff /data/week-1:1 /data/week-2:1")
def diff(
    one: Annotated[str, typer.Argument(help=f"{_RUN} With :2 behind a folder it is its second run.")],
    other: Annotated[str, typer.Argument(help="Another one.")],
    json: AsJson = False,
) -> None:
    """Tell the first cause that tells two runs apart, and whether their results differ.

    Causes are input digest, parameter, version and platform, in this order. Nothing but records and files of this
    machine is looked at.

    Exit codes: 0 the results are the same, byte by byte, 1 they differ, 3 it cannot be told, 2 there is no record.
    """
    from prefect_biomed.cli.reasons import Results, compare
    from prefect_biomed.cli.running import as_json
    from prefect_biomed.clients.texts import one_line

    found = _or_exit(lambda: compare(one, other))
    typer.echo(as_json(found) if json else "\n".join(map(one_line, found.lines())))
    raise typer.Exit({Results.SAME: 0, Results.DIFFERENT: 1, Results.UNKNOWN: 3}[found.results])


@app.command(epilog="Example: prefect-biomed report /data/experiment")
def report(
    folder: Annotated[Path | None, typer.Argument(help="Folder of an experiment, or of a report.")] = None,
    series: Annotated[str | None, typer.Option(help="Series of the experiment; the newest by default.")] = None,
    ingest: Annotated[int | None, typer.Option(help="Number of a Boss ingest job, in place of a folder.")] = None,
    json: AsJson = False,
) -> None:
    """Show what an experiment, a comparison or an ingest has found. Nothing is computed again.

    Exit codes: 0 within, or every tile is there, 1 changed, or tiles lack, 3 not judged, 2 there is no report.
    """
    from prefect_biomed.cli.reports import exit_code, ingest_folder, is_of_ingest, read_report
    from prefect_biomed.cli.running import REFUSED

    if (folder is None) == (ingest is None):
        typer.echo("Name a folder, or a job with --ingest; not both.", err=True)
        raise typer.Exit(REFUSED)
    place = folder if folder is not None else _or_exit(lambda: ingest_folder(ingest or 0))
    if is_of_ingest(place):
        _report_ingest(place, json=json)
    file, found = _or_exit(lambda: read_report(place, series))
    typer.echo(
        found.model_dump_json(indent=2) if json else "\n".join([*found.sentences, str(file.with_suffix(".html"))])
    )
    raise typer.Exit(exit_code(found))


def _report_ingest(folder: Path, *, json: bool) -> NoReturn:
    from prefect_biomed.cli.reports import exit_code_of_ingest, lines_of_ingest
    from prefect_biomed.clients import boss
    from prefect_biomed.clients.texts import one_line

    found = _or_exit(lambda: boss.read_report(folder / boss.REPORT))
    typer.echo(found.model_dump_json(indent=2) if json else "\n".join(map(one_line, lines_of_ingest(found))))
    raise typer.Exit(exit_code_of_ingest(found))


@app.command(epilog="Example: prefect-biomed compare runs/ report/ --baseline references/")
def compare(
    runs: Annotated[Path, typer.Argument(help="Folder whose sub-folders hold one run each.")],
    report: Annotated[Path, typer.Argument(help="Folder for the report.")],
    baseline: Annotated[Path | None, typer.Option(help="Folder whose sub-folders hold one reference run each.")] = None,
    settings: Settings = None,
    json: AsJson = False,
) -> None:
    """Compare the results of runs, and write a report."""
    given = {
        "runs_dir": runs.absolute(),
        "output_dir": report.absolute(),
        "baseline_dir": baseline and baseline.absolute(),
    }
    _run("compare-folders", given, settings, None, json=json)


@app.command(
    epilog="Example: prefect-biomed judge references/ runs/ --junit judgement.xml",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def judge(
    context: typer.Context,
    references: Annotated[Path, typer.Argument(help="Folder whose sub-folders hold one reference run each.")],
    runs: Annotated[Path, typer.Argument(help="Folder whose sub-folders hold one new run each.")],
) -> None:
    """Judge new runs by reference runs, without Prefect. Exit code 0 within, 1 changed, 2 not judged, 3 failed.

    Options: --level, --rules, --perturbed, --mask, --smoothing, --json FILE, --junit FILE, --report FOLDER.
    """
    # Not 2, which says that a judgement was made and came to nothing.
    command = _or_exit(lambda: importlib.import_module("prefect_biomed.analysis.__main__"), exit_code=3)
    raise typer.Exit(command.main(["judge", str(references), str(runs), *context.args]))


@app.command("boss-init", epilog="Example: prefect-biomed boss-init slices/ ingest.json --channel mouse/em/raw")
def boss_init(
    source: Annotated[str, typer.Argument(help="Folder of slices or tiles, volume of any format, or URL of one.")],
    config: Annotated[Path, typer.Argument(help="Where the configuration is written.")],
    channel: Annotated[str, typer.Option(help="collection/experiment/channel.")],
    host: Annotated[str, typer.Option(help="Host of the Boss.")] = "api.bossdb.io",
    settings: Settings = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a file that says something else.")] = False,
    json: AsJson = False,
) -> None:
    """Propose the configuration of an ingest from files; --set changes what was inferred, such as datatype=uint16.

    No Boss is asked; the flow boss-init makes the channel, too. Exit codes: 0 written, 2 refused.
    """
    from prefect_biomed.cli.running import REFUSED, as_json, read_parameters
    from prefect_biomed.clients.boss import Database, SourceChoices, propose, write_configuration
    from prefect_biomed.clients.errors import BiomedError, ConfigurationError

    names = channel.split("/")
    try:
        if len(names) != len(Database.model_fields):
            raise ConfigurationError(f"{channel} is not collection/experiment/channel.")
        database = Database(collection=names[0], experiment=names[1], channel=names[2])
        choices = SourceChoices.model_validate(read_parameters(None, settings or []))
        proposal = propose(source, database, host=host, choices=choices)
        write_configuration(proposal, config, replace=replace)
    except (BiomedError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(REFUSED) from error
    typer.echo(as_json(proposal) if json else proposal.summary())


@app.command(epilog="Example: prefect-biomed validate ingest.json")
def validate(
    config: Annotated[Path, typer.Argument(help="A configuration of boss-ingest.")], json: AsJson = False
) -> None:
    """Check a configuration of an ingest for the Boss, without asking the Boss."""
    from prefect_biomed.cli.running import REFUSED, as_json
    from prefect_biomed.clients.boss import IngestConfig
    from prefect_biomed.clients.errors import ConfigurationError, PreflightFailed

    problems: list[str] = []
    try:
        IngestConfig.load(config)
    except PreflightFailed as error:
        problems = list(error.problems)
    except ConfigurationError as error:
        problems = [str(error)]
    if json:
        typer.echo(as_json({"config": config, "problems": problems}))
    else:
        typer.echo("\n".join(problems) if problems else f"{config} is well formed.")
    raise typer.Exit(REFUSED if problems else 0)


def _laboratory() -> ModuleType:
    from prefect_biomed.cli.running import REFUSED

    try:
        return importlib.import_module("prefect_biomed.cli.laboratory")
    except ModuleNotFoundError as error:
        typer.echo(f"The laboratory needs {error.name}: pip install 'prefect-biomed[sandbox]'", err=True)
        raise typer.Exit(REFUSED) from error


def _or_exit(act: Callable[[], T], *, exit_code: int = 2) -> T:
    """Do it; an error of ours is one line and an exit code, that of a refusal where nothing else is said."""
    from prefect_biomed.clients.errors import BiomedError

    try:
        return act()
    except BiomedError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(exit_code) from error


def _of_flow(flow: str, act: Callable[[], T], *, json: bool) -> T:
    """Do something about a flow without running it; what is wrong is said with the exit codes of `run`."""
    from prefect.exceptions import ParameterTypeError
    from pydantic import ValidationError

    from prefect_biomed.cli.running import REFUSED, as_json, exit_code, said
    from prefect_biomed.clients.errors import BiomedError
    from prefect_biomed.clients.texts import lines

    try:
        return act()
    except (BiomedError, ValidationError, ParameterTypeError) as error:
        code = exit_code(error) if isinstance(error, BiomedError) else REFUSED
        typer.echo(as_json({"flow": flow, "error": said(error)}) if json else lines(said(error)), err=not json)
        raise typer.Exit(code) from error


def _kill_by_key(
    flow: str,
    key: str,
    file: Path | None,
    settings: list[str] | None,
    credentials: list[str] | None,
    *,
    json: bool,
) -> None:
    from prefect_biomed.cli.planning import kill_by_key
    from prefect_biomed.cli.running import as_json, read_parameters
    from prefect_biomed.clients.texts import one_line

    ended = _of_flow(
        flow,
        lambda: kill_by_key(flow, read_parameters(file, settings or []), key=key, credentials=credentials or []),
        json=json,
    )
    typer.echo(as_json(ended) if json else "\n".join(map(one_line, ended)) or "Nothing was running.")


def _run(
    flow: str,
    given: dict[str, Any],
    settings: list[str] | None,
    credentials: list[str] | None,
    *,
    file: Path | None = None,
    key: str | None = None,
    outputs_json: Path | None = None,
    json: bool = False,
    exit_codes: Mapping[str, int] | None = None,
    show: Callable[[Mapping[str, Any]], str] | None = None,
) -> None:
    from prefect_biomed.cli.running import REFUSED, Outcome, as_json, read_parameters, run_flow
    from prefect_biomed.clients.errors import ConfigurationError
    from prefect_biomed.clients.files import atomic_write
    from prefect_biomed.clients.texts import lines, one_line

    try:
        parameters = given | read_parameters(file, settings or [])
    except ConfigurationError as error:
        outcome = Outcome(flow=flow, state="Refused", message=str(error), exit_code=REFUSED)
    else:
        outcome = run_flow(flow, parameters, key=key, credentials=credentials or [])
        if outcome.exit_code == 0 and outcome.state in (exit_codes or {}):
            outcome = outcome.model_copy(update={"exit_code": (exit_codes or {})[outcome.state]})
    if outputs_json is not None:
        with atomic_write(outputs_json) as written:
            written.write(as_json(outcome).encode())
    if json:
        typer.echo(as_json(outcome))
    else:
        typer.echo(f"{outcome.flow}: {outcome.state}" + (f". {lines(outcome.message)}" if outcome.message else ""))
        shown = [show(one) for one in outcome.result or ()] if show is not None else outcome.files
        typer.echo("\n".join(map(lines if show is not None else one_line, shown)))
    raise typer.Exit(outcome.exit_code)
