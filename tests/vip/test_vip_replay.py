"""Bundles of public executions: what is read of them, and what is refused before anything is launched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.laboratory import wait_until
from prefect_biomed.clients.errors import ConfigurationError, PreflightFailed, UnsafeContent
from prefect_biomed.clients.vip import VipClient, VipSession
from prefect_biomed.clients.vip.bundle import open_bundle
from prefect_biomed.clients.vip.replaying import prepare_replay
from prefect_biomed.sandbox import Sandbox

Spoil = Callable[[Path], None]


@pytest.fixture
def published(vip: Sandbox, client: VipClient, volume: Path, tmp_path: Path) -> Path:
    """A bundle of one execution."""
    client.make_folder("/vip/Home/study/out")
    client.put_file(volume, "/vip/Home/study/anatomical.nii")
    values = {"t1": "/vip/Home/study/anatomical.nii"}
    launched = client.launch(
        name="x", pipeline_id="SkullStrip/1.0", input_values=values, results_location="/vip/Home/study/out"
    )
    wait_until(lambda: client.workflow(launched.identifier).status.is_terminal, 30, "the end of the execution")
    return vip.vip.publish([launched.identifier], tmp_path / "published")


def edited(pattern: str, before: str, after: str) -> Spoil:
    def edit(bundle: Path) -> None:
        (path,) = bundle.rglob(pattern)
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))

    return edit


def test_what_cannot_be_replayed_is_told_apart_before_anything_is_sent(
    client: VipClient, published: Path, tmp_path: Path, new_session: Callable[..., VipSession]
) -> None:
    session = new_session(name="replay")
    before = len(client.workflows())

    def refused(name: str, *spoils: Spoil, input_dir: Path | None = None) -> list[str]:
        bundle = tmp_path / name
        shutil.copytree(published, bundle)
        for spoil in spoils:
            spoil(bundle)
        with pytest.raises(PreflightFailed) as raised:
            prepare_replay(client, open_bundle(bundle, tmp_path / "unpacked"), session, input_dir=input_dir)
        return list(raised.value.problems)

    version = edited("SkullStrip.json", '"tool-version": "1.0"', '"tool-version": "0.8"')
    (wrong,) = refused("version", version)
    assert wrong.startswith("wrong version: ")
    assert wrong.endswith("It has SkullStrip/1.0.")
    name_it = edited("workflow-*.json", "anatomical.nii", "gone.nii")
    (missing,) = refused("missing", name_it)
    assert missing.startswith("missing input: /vip/Home/study/gone.nii")
    others = tmp_path / "others"
    others.mkdir()
    (others / "anatomical.nii").write_bytes(b"another one")
    (changed,) = refused("changed", input_dir=others)
    assert changed.startswith("changed input: anatomical.nii")
    assert [problem.split(":")[0] for problem in refused("both", version, name_it)] == [
        "wrong version",
        "missing input",
    ]
    assert len(client.workflows()) == before
    # The right file is taken from the folder, also without the platform.
    shutil.copy(published / "README.md", others)
    (plan,) = prepare_replay(client, open_bundle(published, tmp_path), session)
    assert plan.session.input_settings["t1"] == "anatomical.nii"
    assert plan.session.input_dir is not None
    assert (plan.session.input_dir / "anatomical.nii").is_file()


def test_a_bundle_that_is_none_or_hostile_is_refused(published: Path, tmp_path: Path) -> None:
    def opened(name: str, *spoils: Spoil) -> None:
        bundle = tmp_path / name
        shutil.copytree(published, bundle)
        for spoil in spoils:
            spoil(bundle)
        open_bundle(bundle, tmp_path / "unpacked")

    def removed(pattern: str) -> Spoil:
        return lambda bundle: next(bundle.rglob(pattern)).unlink()

    for name, pattern, told in (
        ("inputs", "workflow-*.json", "no inputs of an execution"),
        ("provenance", "*.sh.provenance.json", "no provenance"),
        ("descriptor", "SkullStrip.json", "no Boutiques descriptor"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            opened(name, removed(pattern))
    with pytest.raises(ConfigurationError, match="no bundle"):
        open_bundle(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UnsafeContent, match="no name of a file"):
        opened("hostile", edited("*.sh.provenance.json", '"anatomical_volumes.csv"', '"../../../etc/passwd"'))
    with pytest.raises(ConfigurationError, match="not what VIP writes: public-output"):
        opened("shape", edited("*.sh.provenance.json", '"public-output"', '"other"'))
    # As the uploader leaves it: without a summary, and the folders packed.
    flat = tmp_path / "flat"
    shutil.copytree(published, flat)
    (flat / "summary.json").unlink()
    for folder in [path for path in flat.iterdir() if path.is_dir()]:
        shutil.make_archive(str(folder), "gztar", root_dir=flat, base_dir=folder.name)
        shutil.rmtree(folder)
    bundle = open_bundle(flat, tmp_path / "unpacked")
    (execution,) = bundle.executions
    assert bundle.identity == open_bundle(published, tmp_path).identity
    assert set(execution.places) == set(execution.outputs) == {"anatomical_volumes.csv", "anatomical_brain.nii.gz"}
    assert not execution.contradictions
    record = next(published.rglob("*.sh.provenance.json"))
    content = json.loads(record.read_text())
    content["public-output"]["output-files"]["volumes"]["md5sum"] = "0" * 32
    record.write_text(json.dumps(content))
    (tampered,) = open_bundle(published, tmp_path).executions
    assert set(tampered.contradictions) == {"anatomical_volumes.csv"}
