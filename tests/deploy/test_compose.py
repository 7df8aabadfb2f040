"""`deploy/compose.yaml` names what exists, and its parts name each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ENV_PREFIX, Settings, load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVERS = [name for name in COMPOSE["services"] if name.startswith("server-")]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_it_is_a_compose_file(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    finished = subprocess.run(
        [*command, str(DEPLOY / name)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_file_it_mounts_is_there() -> None:
    mounts = [
        volume.split(":")[0]
        for service in COMPOSE["services"].values()
        for volume in service.get("volumes", ())
    ]
    files = [mount for mount in mounts if mount.startswith(".")]
    assert files
    assert [mount for mount in files if not (DEPLOY / mount).exists()] == []
    assert {mount for mount in mounts if not mount.startswith(".")} == set(COMPOSE["volumes"])


def test_every_variable_it_asks_for_is_in_the_example() -> None:
    asked = set(re.findall(r"\$\{(\w+)", json.dumps(COMPOSE)))
    example = (DEPLOY / "env.example").read_text()
    assert asked == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_starts_with_what_it_is_given(name: str) -> None:
    service = COMPOSE["services"][name]
    serve, *flags = service["command"]
    settings = load_settings(flags)
    assert serve == "serve"
    given = {variable.removeprefix(ENV_PREFIX).lower() for variable in service["environment"]}
    assert given <= set(Settings.model_fields)
    assert float(service["stop_grace_period"].removesuffix("s")) > settings.drain_seconds + 10


def test_balancer_prometheus_and_compose_name_the_same_servers() -> None:
    addresses = [f"{name}:8000" for name in SERVERS]
    nginx = (DEPLOY / "nginx" / "servers.conf").read_text()
    assert re.findall(r"^server (\S+) max_fails=0;$", nginx, re.MULTILINE) == addresses
    batches = (DEPLOY / "nginx" / "batches.conf").read_text()
    assert re.findall(r"^server (\S+) max_fails=0;$", batches, re.MULTILINE) == addresses[:1]
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": addresses}]
    assert set(yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]) == set(
        SERVERS
    )


def test_only_loopback_is_published() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_store_keeps_what_it_acknowledged_and_asks_for_a_password() -> None:
    redis: dict[str, Any] = COMPOSE["services"]["redis"]
    command = redis["command"][-1]
    for flag in ("--appendonly yes", "--appendfsync always", "noeviction", "--requirepass"):
        assert flag in command


def test_the_servers_make_the_keys_and_prometheus_shows_its_own() -> None:
    volumes = {name: mounts(name) for name in (*SERVERS, "prometheus")}
    [shared] = set.intersection(*map(set, volumes.values()))
    assert {volumes[name][shared] for name in SERVERS} == {"/keys"}
    assert volumes["prometheus"][shared] == "/keys:ro"
    settings = COMPOSE["services"][SERVERS[0]]["environment"]
    assert settings["PREFIXSERVE_ADMIN_KEY_FILE"] == "/keys/admin.key"
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [job] = prometheus["scrape_configs"]
    assert job["authorization"]["credentials_file"] == settings["PREFIXSERVE_METRICS_KEY_FILE"]
    [group] = COMPOSE["services"]["prometheus"]["group_add"]
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text()
    assert f"groupadd --gid {group} prefixserve" in dockerfile
    assert "--owner=prefixserve --group=prefixserve /data /keys" in dockerfile


def mounts(service: str) -> dict[str, str]:
    """Where a service has each volume."""
    volumes: list[str] = COMPOSE["services"][service]["volumes"]
    pairs = [volume.split(":", 1) for volume in volumes]
    return {name: place for name, place in pairs if not name.startswith(".")}
