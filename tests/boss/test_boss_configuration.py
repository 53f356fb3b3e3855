"""Ingest configurations: what is read, what is refused, and what is said about it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr, ValidationError

from harness.ingest_lab import Lab
from harness.wire import exchange
from prefect_biomed.clients.boss import BossClient, IngestConfig, UploadSettings, find_token, preflight
from prefect_biomed.clients.errors import ConfigurationError, NotFoundError, PreflightFailed
from prefect_biomed.flows.boss import boss_ingest

CATMAID: dict[str, Any] = {
    "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
    "client": {
        "backend": {"name": "boss", "class": "BossBackend", "host": "api.bossdb.io", "protocol": "https"},
        "path_processor": {
            "class": "ingest.plugins.catmaid.CatmaidFileImageStackPathProcessor",
            "params": {"root_dir": "/data/stack", "filetype": "png"},
        },
        "tile_processor": {
            "class": "ingest.plugins.catmaid.CatmaidFileImageStackTileProcessor",
            "params": {"filetype": "png"},
        },
    },
    "database": {"collection": "my_col_1", "experiment": "my_exp_1", "channel": "my_ch_1"},
    "ingest_job": {
        "resolution": 0,
        "extent": {"x": [0, 2048], "y": [0, 2048], "z": [0, 200], "t": [0, 1]},
        "tile_size": {"x": 512, "y": 512, "z": 1, "t": 1},
    },
}


def changed(path: str, value: Any, base: dict[str, Any] = CATMAID) -> dict[str, Any]:
    config = copy.deepcopy(base)
    *parents, last = path.split(".")
    section = config
    for name in parents:
        section = section[name]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return config


def volumetric(**job: Any) -> dict[str, Any]:
    config = copy.deepcopy(CATMAID)
    config["schema"] = {"name": "boss-v0.2-schema", "validator": "BossValidatorV02"}
    config["client"]["chunk_processor"] = config["client"].pop("tile_processor")
    del config["ingest_job"]["tile_size"]
    config["ingest_job"] |= {"ingest_type": "volumetric", "chunk_size": {"x": 1024, "y": 1024, "z": 64}} | job
    return config


def problems(config: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(PreflightFailed) as caught:
        IngestConfig.load(config)
    return caught.value.problems


def test_the_catmaid_example_has_3200_tiles() -> None:
    config = IngestConfig.load(CATMAID)
    assert config.tile_count == 3200
    assert len(set(config.positions())) == 3200
    assert config.body() == CATMAID
    assert config.warnings == ()


def test_a_chunk_of_20_slices_is_refused_here_and_there(lab: Lab) -> None:
    bad = volumetric(chunk_size={"x": 1024, "y": 1024, "z": 20})
    [problem] = problems(bad)
    assert "chunk_size.z: 20 must be a multiple of 16" in problem
    response, body = exchange(lab.client._http, "POST", "/ingest/", json_body=bad)
    assert (response.status_code, body["code"]) == (400, 1004)


def test_an_extent_without_t_is_refused() -> None:
    [problem] = problems(changed("ingest_job.extent.t", None))
    assert problem == "ingest_job.extent.t: field required."


def test_a_tile_size_of_zero_in_t_is_refused() -> None:
    [problem] = problems(changed("ingest_job.tile_size.t", 0))
    assert "division by zero" in problem
    assert "orphaned job" in problem


@pytest.mark.parametrize(
    ("axis", "bounds", "says"),
    [("x", [100, 612], "100 voxels off"), ("z", [8, 24], "8 slices too early"), ("y", [256, 512], "256 voxels off")],
)
def test_an_extent_that_is_not_aligned_is_refused(axis: str, bounds: list[int], says: str) -> None:
    [problem] = problems(changed(f"ingest_job.extent.{axis}", bounds))
    assert says in problem


def test_odd_tiles_are_refused_side_by_side_and_allowed_alone() -> None:
    odd = changed("ingest_job.tile_size.x", 796)
    [problem] = problems(odd)
    assert "would land at 1024 instead of 796" in problem
    alone = IngestConfig.load(changed("ingest_job.extent.x", [0, 796], odd))
    assert "no multiple of 512" in alone.warnings[0]


def test_an_unknown_channel_is_named_with_the_nearest_ones(lab: Lab) -> None:
    config = IngestConfig.load(lab.config(channel="uint61"))
    with pytest.raises(NotFoundError, match="no channel sandbox/stack/uint61"):
        lab.client.create(config)
    with pytest.raises(PreflightFailed, match=r"no channel 'uint61'.*uint16"):
        preflight(lab.client, config)


@pytest.mark.parametrize(
    "params",
    [{"token": "x1"}, {"auth": {"api_key": "x1"}}, {"urls": ["0" * 40]}, {"id": "AKIA" + "A" * 16}, {"password": "p"}]
    + [{"storage_options": {name: "x1"}} for name in ("key", "secret", "sas_token", "account_key", "username")]
    + [{"storage_options": {"client_kwargs": {"headers": {"X": "x1"}}}}, {"a": "-----BEGIN PRIVATE KEY-----x1"}],
)
def test_secrets_in_plugin_parameters_are_refused(params: dict[str, Any]) -> None:
    [problem] = problems(changed("client.tile_processor.params", params))
    assert "looks like a secret" in problem
    assert "x1" not in problem


def test_the_rule_of_padding_is_named() -> None:
    assert IngestConfig.load(CATMAID).padding(7) == ()
    odd = IngestConfig.load(changed("ingest_job.extent.x", [0, 2000]))
    count = odd.tile_count // 4
    told = f"The last tiles are not full (464 of 512 in x): {count} of {odd.tile_count}; the rest of each is 7."
    assert odd.padding(7) == (told,)
    assert "Of 2 tiles the source lacks a part" in odd.padding(7, {"a", "b"})[1]
    chunks = IngestConfig.load(volumetric(extent={"x": [0, 1000], "y": [0, 1024], "z": [0, 60], "t": [0, 1]}))
    assert "".join(chunks.padding(7)).endswith("the rest of each is 0.")


def test_options_that_are_no_keys_are_taken() -> None:
    options = {"anon": True, "endpoint_url": "https://s3.example.org", "client_kwargs": {"region_name": "x"}, "key": ""}
    assert IngestConfig.load(changed("client.tile_processor.params", {"storage_options": options})).storage is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (changed("schema.name", "boss-v9-schema"), "unknown"),
        (changed("schema.validator", "BossValidatorV02"), "goes with BossValidatorV01"),
        (changed("client.backend.protocol", "ftp"), "neither http nor https"),
        (changed("client.tile_processor", None), "client.tile_processor: required"),
        (changed("client.path_processor.class", "os.system('x')"), "not the dotted path"),
        (changed("database.channel", "a/b"), "not a name the Boss allows"),
        (changed("ingest_job.extent.x", [0, 0]), "empty or negative"),
        (changed("ingest_job.extent.x", [0]), "field required"),
        (changed("ingest_job.extent.x", [0, 512.0]), "valid integer"),
        (changed("ingest_job.tile_size.z", 2), "one slice"),
        (changed("ingest_job.tile_size", None), "ingest_job.tile_size: required"),
        (changed("ingest_job.ingest_type", "volumetric"), "boss-v0.2-schema"),
        (volumetric(extent={"x": [0, 1024], "y": [0, 1024], "z": [0, 64], "t": [0, 2]}), "sample 0 only"),
        (volumetric(extent={"x": [512, 1024], "y": [0, 1024], "z": [0, 64], "t": [0, 1]}), "512 off"),
    ],
)
def test_each_mistake_is_named(config: dict[str, Any], says: str) -> None:
    assert any(says in problem for problem in problems(config)), problems(config)


def test_all_problems_are_reported_at_once_also_as_a_flow_parameter() -> None:
    bad = changed("ingest_job.extent.x", [100, 612], changed("ingest_job.tile_size.t", 0))
    bad = changed("database.channel", "a b", changed("schema.name", "nothing", bad))
    bad = changed("client.tile_processor.params", {"token": "abc"}, bad)
    assert len(problems(bad)) == 5
    with pytest.raises(ValidationError, match="5 problems"):
        IngestConfig.model_validate(bad)


def test_a_file_that_is_missing_or_no_json_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        IngestConfig.load(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigurationError, match="is not JSON"):
        IngestConfig.load(tmp_path / "bad.json")


def test_the_schema_is_exported_for_forms() -> None:
    schema = IngestConfig.model_json_schema()
    assert set(schema["required"]) == {"schema", "client", "database", "ingest_job"}
    assert IngestConfig.model_validate_json(IngestConfig.load(CATMAID).model_dump_json()) == IngestConfig.load(CATMAID)
    assert "IngestConfig" in json.dumps(parameter_schema(boss_ingest).model_dump())


def test_a_preflight_compares_with_frame_time_and_dtype(lab: Lab) -> None:
    extent = {"x": [0, 204800], "y": [0, 512], "z": [0, 16], "t": [0, 2000]}
    config = lab.config(extent=extent, channel="labels")
    with pytest.raises(PreflightFailed) as caught:
        preflight(lab.client, IngestConfig.load(config))
    text = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "coordinate frame [0, 200000)" in text
    assert "1000 time samples" in text
    assert "volumetric" in text


def test_tokens_are_found_in_the_order_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("INTERN_TOKEN", raising=False)
    with pytest.raises(ConfigurationError, match="No Boss token was found"):
        find_token()
    (tmp_path / ".intern").mkdir()
    settings = tmp_path / ".intern" / "intern.cfg"
    monkeypatch.setenv("INTERN_TOKEN", "of the environment")
    assert find_token().get_secret_value() == "of the environment"
    settings.write_bytes(b"\xff\xfe no text")
    with pytest.raises(ConfigurationError, match="not a configuration file of intern"):
        find_token()
    settings.write_text("[Project Service]\ntoken = of intern\n")
    assert find_token().get_secret_value() == "of intern"
    settings.write_text("[Default]\ntoken = of %intern\n[Project Service]\ntoken = no\n")
    assert find_token().get_secret_value() == "of %intern"
    (tmp_path / "token.json").write_text('{"token": "of the folder", "host": "h"}')
    assert find_token().get_secret_value() == "of the folder"
    assert find_token(SecretStr("one")).get_secret_value() == "one"
    assert "one" not in repr(BossClient("h", "one"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class": "ingestclient.plugins.catmaid.CatmaidFileImageStakPathProcessor"}, "could not be loaded"),
        ({"params": {"root_dir": "/no/such/folder", "filetype": "png"}}, "no such file"),
        ({"params": {"filetype": "png"}}, "needs the parameter 'root_dir'"),
        (
            {"class": "ingestclient.plugins.multipage_tiff.SingleTimeTiffPathProcessor", "params": {"z_0": "a.tif"}},
            "needs the parameter 'z_1'",
        ),
    ],
)
def test_a_preflight_looks_at_the_sources(lab: Lab, change: dict[str, Any], said: str) -> None:
    config = lab.config()
    preflight(lab.client, IngestConfig.load(config))
    config["client"]["path_processor"] |= change
    with pytest.raises(PreflightFailed, match=said):
        preflight(lab.client, IngestConfig.load(config))


def test_a_listing_names_the_slices_that_are_missing(lab: Lab) -> None:
    lab.write_stack(np.zeros((16, 512, 512), "uint8"))
    config = IngestConfig.load(lab.config())
    preflight(lab.client, config, UploadSettings())
    (lab.folder / "stack" / "5" / "0_0_0.png").unlink()
    with pytest.raises(PreflightFailed, match=r"1 source files are not there: .*stack/5/0_0_0\.png"):
        preflight(lab.client, config, UploadSettings())
    preflight(lab.client, config, UploadSettings(on_bad_source="blank"))


@pytest.mark.parametrize(
    "url",
    [
        "https://user:canary@host/stack/",
        "https://host/stack?X-Amz-Signature=canary",
        "https://host/stack?access_token=canary",
    ],
)
def test_a_secret_in_an_address_is_refused(lab: Lab, url: str) -> None:
    config = lab.config()
    config["client"]["tile_processor"]["params"]["url"] = url
    with pytest.raises(PreflightFailed, match="looks like a secret") as caught:
        IngestConfig.load(config)
    assert "canary" not in str(caught.value)
