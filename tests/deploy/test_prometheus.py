"""The files of `deploy/prometheus` and the dashboard, with the real Prometheus on a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from clients import Client
from tests.server_process import ServerProcess, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMTOOL = shutil.which("promtool")
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "prefixserve.json").read_text())
DEADLINE_SECONDS = 30

needs_prometheus = pytest.mark.skipif(PROMTOOL is None, reason="prometheus is not installed")


def expressions() -> list[str]:
    """Everything the dashboard asks for."""
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def exposition(replicas: list[ServerProcess], key: str) -> str:
    """`/metrics` of a server that has answered a request."""
    with Client(replicas[0].url, api_key=key) as client:
        client.upload("observed", text="Hello")
        client.generate("Hello", task_id="observed", max_new_tokens=3)
        return client.metrics()


def test_every_metric_of_the_dashboard_and_the_alerts_is_there(exposition: str) -> None:
    asked = set(re.findall(r"prefixserve_\w+", " ".join(expressions())))
    asked |= set(re.findall(r"prefixserve_\w+", (DEPLOY / "prometheus/alerts.yml").read_text()))
    asked |= {DASHBOARD["templating"]["list"][1]["definition"].split("(")[1].split(",")[0]}
    there = {re.split(r"[ {]", line)[0] for line in exposition.splitlines() if line[0] != "#"}
    assert asked - there == set()
    assert len(asked) > 20


@needs_prometheus
@pytest.mark.parametrize(
    "command", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]]
)
def test_the_alerts_are_valid_and_fire_when_they_should(command: list[str]) -> None:
    finished = subprocess.run(
        [str(PROMTOOL), *command],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs_prometheus
def test_every_alert_is_tested() -> None:
    rules, tests = (
        yaml.safe_load((DEPLOY / "prometheus" / name).read_text())
        for name in ("alerts.yml", "alerts_test.yml")
    )
    written = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    fired = {
        case["alertname"]
        for test in tests["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == written


@contextmanager
def prometheus(folder: Path, targets: list[str], key: Path) -> Iterator[httpx.Client]:
    """A Prometheus with the files of `deploy/prometheus`, which scrapes these targets at once.

    Args:
        key: the file with the key that it shows, in place of the one of the containers.
    """
    shutil.copytree(DEPLOY / "prometheus", folder, dirs_exist_ok=True)
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    config["scrape_configs"][0]["authorization"]["credentials_file"] = str(key)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    checked = subprocess.run(
        [str(PROMTOOL), "check", "config", "prometheus.yml"],
        cwd=folder,
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], cwd=folder, stdout=log, stderr=log
        )
    try:
        with httpx.Client(
            base_url=f"http://{address}/api/v1",
            transport=httpx.HTTPTransport(retries=10),
            timeout=DEADLINE_SECONDS,
        ) as http:
            yield http
    finally:
        process.terminate()
        process.wait(DEADLINE_SECONDS)


def query(http: httpx.Client, expression: str) -> list[Any]:
    """What Prometheus answers now; none while it starts."""
    answer = http.get("/query", params={"query": expression})
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return []
    assert answer.status_code == httpx.codes.OK, (expression, answer.text)
    result: list[Any] = answer.json()["data"]["result"]
    return result


def until_there(http: httpx.Client, expression: str) -> None:
    """Poll until an expression has a value."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not query(http, expression):
        assert time.monotonic() < deadline, f"{expression} has no value"
        time.sleep(0.1)


@needs_prometheus
@pytest.mark.usefixtures("exposition")
def test_prometheus_scrapes_servers_and_every_panel_has_data(
    replicas: list[ServerProcess], tmp_path: Path
) -> None:
    targets = [replica.url.removeprefix("http://") for replica in replicas]
    assert {httpx.get(f"{replica.url}/metrics").status_code for replica in replicas} == {401}
    with prometheus(tmp_path, targets, replicas[0].data_dir / "metrics.key") as http:
        until_there(http, f'count(up{{job="prefixserve"}} == 1) == {len(targets)}')
        for expression in expressions():
            asked = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
            until_there(http, asked)
        rules = http.get("/rules").json()["data"]["groups"][0]["rules"]
    assert {(rule["health"], rule["state"]) for rule in rules} == {("ok", "inactive")}
