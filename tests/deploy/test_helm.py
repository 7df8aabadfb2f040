"""The Helm chart, rendered by Helm itself and checked against Kubernetes' own schemas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from prefix_store.api_key import key_id_of
from server.settings import ENV_PREFIX, Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm"
KUBERNETES = ("1.31", "1.37")
CUSTOM = {"ServiceMonitor", "PrometheusRule"}  # of the Prometheus Operator
SECRET = {"secret": {"redisUrl": "redis://:word@redis:6379/0"}}
EVERYTHING = {
    "replicas": 3,
    "image": {"tag": "1.2.3", "pullSecrets": [{"name": "registry"}]},
    "settings": {"max_slots": 128, "prefix_cache_bytes": "8GiB", "max_waiting": 1_000_000},
    "secret": {"existing": "mine"},
    "nodeSelector": {"gpu": "a100"},
    "models": {"existingClaim": "models"},
    "autoscaling": {"enabled": False},
    "ingress": {
        "enabled": True,
        "host": "tasks.example.com",
        "tlsSecret": "tls",
        "batchesService": "one",
    },
    "networkPolicy": {"from": [], "https": False},
    "serviceMonitor": {"labels": {"release": "prometheus"}},
}
ONE = {
    "replicas": 1,
    "autoscaling": {"enabled": False},
    "data": {"existingClaim": "disk"},
}
Object = dict[str, Any]


def rendered(values: Object) -> dict[str, Object]:
    """The chart's objects by kind; there is one of each."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        texts = chart.render(values, name="demo", namespace="tasks")
    objects = [
        document
        for path, text in texts.items()
        if not path.endswith(".txt")
        for document in yaml.safe_load_all(text)
        if document
    ]
    by_kind = {document["kind"]: document for document in objects}
    assert len(by_kind) == len(objects)
    return by_kind


@pytest.fixture(scope="module", params=[SECRET, EVERYTHING], ids=["default", "everything"])
def objects(request: pytest.FixtureRequest) -> dict[str, Object]:
    return rendered(request.param)


@pytest.mark.parametrize("values", [SECRET, EVERYTHING], ids=["default", "everything"])
def test_helm_lint_has_nothing_to_say(values: Object) -> None:
    report = helm.lint(CHART, values, strict=True)
    told = [message for message in report["messages"] if "icon" not in message["error"]]
    assert (told, report["errors"]) == ([], [])


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_what_kubernetes_takes(objects: dict[str, Object], version: str) -> None:
    for kind, document in objects.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)


def pod(objects: dict[str, Object]) -> Object:
    spec: Object = objects["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(objects: dict[str, Object]) -> Object:
    [found] = pod(objects)["containers"]
    return dict(found)


def variables(objects: dict[str, Object]) -> dict[str, Object]:
    return {variable["name"]: variable for variable in container(objects)["env"]}


def test_pods_have_no_rights_and_write_to_their_volumes_only(objects: dict[str, Object]) -> None:
    security = {**pod(objects)["securityContext"], **container(objects)["securityContext"]}
    assert security["runAsNonRoot"] is True
    assert f"USER {security['runAsUser']}\n" in (DEPLOY.parent / "Dockerfile").read_text()
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert pod(objects)["automountServiceAccountToken"] is False
    mounts = {mount["name"]: mount["mountPath"] for mount in container(objects)["volumeMounts"]}
    models = mounts.pop("models", None)
    assert mounts == {"data": "/data", "tmp": "/tmp", "keys": "/keys"}  # noqa: S108
    if models is not None:
        mounts["models"] = models
        assert variables(objects)["HF_HOME"]["value"].startswith(f"{models}/")
    assert {volume["name"] for volume in pod(objects)["volumes"]} == set(mounts)


def test_a_pod_has_time_to_drain(objects: dict[str, Object]) -> None:
    drain = float(variables(objects)["PREFIXSERVE_DRAIN_SECONDS"]["value"])
    name, seconds = container(objects)["lifecycle"]["preStop"]["exec"]["command"]
    assert name == "sleep"
    grace = pod(objects)["terminationGracePeriodSeconds"]
    assert grace >= drain + int(seconds) + 10


def test_every_variable_is_a_setting_of_the_server(objects: dict[str, Object]) -> None:
    given = {
        name.removeprefix(ENV_PREFIX).lower(): variable.get("value")
        for name, variable in variables(objects).items()
        if name.startswith(ENV_PREFIX)
    }
    assert given.pop("redis_url") is None  # from the secret
    settings = Settings.model_validate(given)
    assert settings.model_fields_set == set(given)


def test_numbers_are_written_out() -> None:
    found = variables(rendered(EVERYTHING))
    assert found["PREFIXSERVE_MAX_WAITING"]["value"] == "1000000"
    assert found["PREFIXSERVE_PREFIX_CACHE_BYTES"]["value"] == "8GiB"


def test_secrets_are_in_the_secret_alone() -> None:
    objects = rendered(SECRET)
    assert objects["Secret"]["stringData"]["redis-url"] == SECRET["secret"]["redisUrl"]
    others = [document for kind, document in objects.items() if kind != "Secret"]
    assert ":word@" not in json.dumps(others)
    reference = variables(objects)["PREFIXSERVE_REDIS_URL"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": objects["Secret"]["metadata"]["name"], "key": "redis-url"}
    assert "Secret" not in rendered(EVERYTHING)
    assert "mine" in json.dumps(variables(rendered(EVERYTHING))["PREFIXSERVE_REDIS_URL"])


def test_keys_are_made_and_reach_the_servers_and_prometheus(objects: dict[str, Object]) -> None:
    [volume] = [found["secret"] for found in pod(objects)["volumes"] if found["name"] == "keys"]
    given = {f"/keys/{item['path']}": item["key"] for item in volume["items"]}
    keys = {
        name: given[variables(objects)[f"PREFIXSERVE_{name.upper()}_KEY_FILE"]["value"]]
        for name in ("admin", "metrics")
    }
    [mount] = [m for m in container(objects)["volumeMounts"] if m["name"] == "keys"]
    assert mount["readOnly"] is True
    assert volume["defaultMode"] & 0o027 == 0  # else the server refuses them
    [endpoint] = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {
        "name": volume["secretName"],
        "key": keys["metrics"],
    }
    if "Secret" in objects:
        assert objects["Secret"]["metadata"]["name"] == volume["secretName"]
        texts = {name: objects["Secret"]["stringData"][key] for name, key in keys.items()}
        ids = {name: key_id_of(text.encode()) for name, text in texts.items()}
        assert ids == {"admin": "admin", "metrics": "metrics"}


def test_only_another_secret_starts_new_pods() -> None:
    def checksum(url: str) -> str:
        template = rendered({"secret": {"redisUrl": url}})["Deployment"]["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/secret"]
        return found

    assert checksum("redis://a") == checksum("redis://a") != checksum("redis://b")


def test_probes_ask_for_pages_that_there_are(objects: dict[str, Object]) -> None:
    source = "".join(path.read_text() for path in (DEPLOY.parent / "server" / "api").glob("*.py"))
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert f'.get("{container(objects)[probe]["httpGet"]["path"]}"' in source
    [endpoint] = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert f'"{endpoint["path"]}"' in source


def test_objects_select_the_pods(objects: dict[str, Object]) -> None:
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    monitored = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= objects["Service"]["metadata"]["labels"].items()


def test_it_scales_by_waiting_requests_or_not_at_all() -> None:
    objects = rendered(SECRET)
    [metric] = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "prefixserve_waiting_requests"
    assert "replicas" not in objects["Deployment"]["spec"]
    assert "HorizontalPodAutoscaler" not in rendered(EVERYTHING)
    assert rendered(EVERYTHING)["Deployment"]["spec"]["replicas"] == 3


def test_the_ingress_hashes_what_clients_send() -> None:
    annotations = rendered(EVERYTHING)["Ingress"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/upstream-hash-by"] == "$http_x_task_id"


def test_the_ingress_sends_files_and_batches_to_one_server() -> None:
    [rule] = rendered(EVERYTHING)["Ingress"]["spec"]["rules"]
    services = {path["path"]: path["backend"]["service"] for path in rule["http"]["paths"]}
    assert {path: service["name"] for path, service in services.items()} == {
        "/v1/files": "one",
        "/v1/batches": "one",
        "/": rendered(EVERYTHING)["Service"]["metadata"]["name"],
    }
    one = rendered({**SECRET, **ONE})
    assert one["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    [data] = [volume for volume in pod(one)["volumes"] if volume["name"] == "data"]
    assert data["persistentVolumeClaim"] == {"claimName": "disk"}


def test_alerts_and_dashboard_are_the_files_of_deploy(objects: dict[str, Object]) -> None:
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    assert objects["PrometheusRule"]["spec"] == alerts
    dashboard = (DEPLOY / "grafana" / "dashboards" / "prefixserve.json").read_text()
    assert json.loads(objects["ConfigMap"]["data"]["prefixserve.json"]) == json.loads(dashboard)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "set secret.existing"),
        ({"secret": {"redisUrl": "http://redis"}}, "redisUrl"),
        ({**SECRET, "drainSeconds": "a minute"}, "drainSeconds"),
        ({**SECRET, "settings": {"MAX-SLOTS": 3}}, "MAX-SLOTS"),
        ({**SECRET, "ingress": {"enabled": True}}, "set ingress.host"),
        ({**SECRET, **ONE, "replicas": 2}, "the disk of one server"),
        ({**SECRET, **ONE, "autoscaling": {"enabled": True}}, "the disk of one server"),
    ],
)
def test_wrong_values_are_refused(values: Object, words: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(words)):
        rendered(values)
