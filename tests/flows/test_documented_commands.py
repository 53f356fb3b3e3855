"""Each command that the documentation tells people to type is run by a suite, or is named here with a reason."""

from __future__ import annotations

import re

import pytest

from harness.documented import ROOT, commands

# Words of a command, by the file that runs it in some suite.
RUN_BY = {
    "pip install -c constraints.txt": "Makefile",
    "prefect deploy --prefect-file deployments/prefect.yaml --all": "deployments/compose.yaml",
    "prefect deployment run": "tests/flows/test_vip_deployments.py",
    "prefect deployment schedule resume": "tests/flows/test_schedules.py",
    "prefect flow-run retry": "tests/harness/laboratory.py",
    "prefect server start": "cli/laboratory.py",
    "prefect work-pool create": "cli/laboratory.py",
    "prefect worker start --pool": "cli/laboratory.py",
    "python -m examples.federated_averaging": "tests/flows/test_examples.py",
    "python -m prefect_biomed.sandbox": "cli/laboratory.py",
    "python deployments/automations.py": "tests/flows/test_schedules.py",
    "python deployments/automations.py --notify": "tests/flows/test_repeatability_schedule.py",
    "python deployments/setup.py --name": "tests/flows/test_vip_deployments.py",
    "prefect-biomed --help": "tests/cli/test_running.py",
    "prefect-biomed boss-init": "tests/boss/test_boss_proposals.py",
    "prefect-biomed compare": "tests/cli/test_project.py",
    "prefect-biomed deploy": "tests/cli/test_project.py",
    "prefect-biomed diff": "tests/cli/test_reasons.py",
    "prefect-biomed doctor": "tests/cli/test_doctor.py",
    "prefect-biomed down": "tests/cli/test_laboratory.py",
    "prefect-biomed status": "tests/cli/test_laboratory.py",
    "prefect-biomed up": "tests/cli/test_laboratory.py",
    "prefect-biomed flows": "tests/cli/test_running.py",
    "prefect-biomed init": "tests/cli/test_project.py",
    "prefect-biomed judge": "tests/analysis/test_judge_command.py",
    "prefect-biomed crate": "tests/vip/test_vip_crate.py",
    "prefect-biomed kill": "tests/cli/test_running.py",
    "prefect-biomed plan": "tests/cli/test_planning.py",
    "prefect-biomed publish": "tests/flows/test_vip_replays.py",
    "prefect-biomed replay": "tests/flows/test_vip_replays.py",
    "prefect-biomed report": "tests/cli/test_reports.py",
    "prefect-biomed resume": "tests/cli/test_running.py",
    "prefect-biomed run": "tests/cli/test_running.py",
    "prefect-biomed run vip-session -f": "tests/cli/test_running.py",
    "prefect-biomed running": "tests/cli/test_running.py",
    "prefect-biomed why": "tests/cli/test_reasons.py",
    "prefect-biomed show-pipeline": "tests/cli/test_running.py",
    "prefect-biomed validate": "tests/cli/test_running.py",
    # These are run word for word.
    "prefect block register": "tests/flows/test_vip_deployments.py",
    "prefect deployment schedule ls": "tests/flows/test_vip_deployments.py",
    "prefect flow-run ls": "tests/flows/test_vip_deployments.py",
    "prefect work-pool set-concurrency-limit": "tests/flows/test_vip_deployments.py",
    "prefect work-queue pause": "tests/flows/test_vip_deployments.py",
    "prefect work-queue set-concurrency-limit": "tests/flows/test_vip_deployments.py",
}
UNTRIED = {
    "pip install .": "without constraints it takes what is newest on the day; the suites run with constraints.txt",
    "pip install '.[all]'": "the suites install .[dev], which holds it, with constraints.txt",
    "pip install 'prefect-biomed[analysis]'": "the package is on no index",
    "pip install 'prefect-biomed[bids]'": "the package is on no index",
    "pip install 'prefect-biomed[formats]'": "the package is on no index",
    "pip install 'prefect-biomed[girder]'": "the package is on no index",
    "pip install 'prefect-biomed[volumetric]'": "the package is on no index",
    "prefect deploy": "named as a word, without what it is to deploy",
    "prefect flow-run execute": "the document says that it is taken from Prefect's documentation",
    "python -m benchmarks.boss_sections --slices 4": "sections of 20,000 x 20,000 pixels take minutes; "
    "tests/boss/test_boss_source_formats.py decodes smaller ones by the same path",
    "python -m benchmarks.formats": "tests/analysis/test_formats.py makes a part of the table by its functions",
    "python -m benchmarks.formats --table docs/formats.md": "the same, for all formats",
    "python -m benchmarks.repeatability alarms power years tables": "takes hours; tests/shared/test_benchmarks.py runs "
    "an experiment of each kind",
    "python -m benchmarks.vantage6_payloads results --kinds json parquet pickle": "takes half an hour; "
    "tests/vantage6/test_vantage6_payloads.py takes small results by the same path",
    "python -m benchmarks.vantage6_payloads arguments": "takes minutes; "
    "tests/flows/test_vantage6_flows.py sends arguments from a file",
    "python -m benchmarks.vantage6_rounds": "tests/flows/test_federated_rounds.py learns in rounds",
    "python -m benchmarks.vantage6_tutorials": "tests/conformance/test_vantage6_tutorials.py runs its programs",
    "python tests/harness/drawing.py": "draws a picture of the documentation",
}


def run_by(command: str) -> str | None:
    """The most particular entry that the command begins with."""
    fitting = [begin for begin in RUN_BY if command == begin or command.startswith(begin + " ")]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("command", [command for command in commands() if not command.startswith("make ")])
def test_a_suite_runs_it(command: str) -> None:
    if command in UNTRIED:
        assert run_by(command) is None
        return
    begin = run_by(command)
    assert begin, "let a suite run it, and name the file in RUN_BY"
    text = (ROOT / RUN_BY[begin]).read_text().replace("sys.executable", "python").replace("(BIN)/python -m pip", "pip")
    between = r"""(?:[\s"',=]|--no-prompt|--quiet|--disable-pip-version-check)+"""
    assert re.search(between.join(re.escape(word) for word in begin.split()), text), (
        f"{RUN_BY[begin]} does not run it any more"
    )


def test_reasons_are_for_commands_that_are_documented() -> None:
    assert set(UNTRIED) <= set(commands())
    assert {run_by(command) for command in commands()} - {None} == set(RUN_BY)


@pytest.mark.parametrize(
    "command", [command for command in commands() if command.startswith("make ") and command not in UNTRIED]
)
def test_make_has_the_target(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
