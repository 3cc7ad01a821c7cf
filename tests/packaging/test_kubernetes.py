"""The Kubernetes manifests without a cluster: they follow its schemas, and name only what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from turboserve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "config" / "kubernetes"
BASE = FOLDER / "base"
VERSION = "1.34"


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


MANIFESTS = [
    document
    for file in sorted(BASE.glob("*.yaml"))
    if file.name != "kustomization.yaml"
    for document in documents(file.read_text())
]


def of_kind(kind: str, name: str) -> dict[str, Any]:
    (found,) = [m for m in MANIFESTS if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


SERVERS = of_kind("StatefulSet", "turboserve")
POD = SERVERS["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def check_schemas(manifests: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    for manifest in manifests:
        validate.validate(manifest, VERSION, strict=True)


def test_manifests_follow_the_schemas_of_kubernetes() -> None:
    check_schemas(MANIFESTS)


@pytest.mark.parametrize("overlay", ["base", "cuda"])
def test_kustomize_makes_them(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    made = subprocess.run([kubectl, "kustomize", str(FOLDER / overlay)], capture_output=True, text=True, check=True)
    manifests = documents(made.stdout)
    assert len(manifests) == len(MANIFESTS) + 2, "the two generated ConfigMaps"
    check_schemas(manifests)
    (servers,) = [m for m in manifests if m["kind"] == "StatefulSet"]
    (container,) = servers["spec"]["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == (overlay == "cuda") and container["image"].endswith(
        overlay.replace("base", "cpu")
    )


def test_settings_are_settings() -> None:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    literals = [pair for one in kustomization["configMapGenerator"] for pair in one.get("literals", [])]
    given = {pair.partition("=")[0] for pair in literals} | {one["name"] for one in CONTAINER["env"]}
    assert {name.removeprefix("TURBOSERVE_").lower() for name in given} <= set(Settings.model_fields)
    values = dict(pair.split("=", 1) for pair in literals) | {e["name"]: e.get("value", "x") for e in CONTAINER["env"]}
    Settings(**{name.removeprefix("TURBOSERVE_").lower(): value for name, value in values.items()})


def test_a_pod_that_goes_has_time_for_its_streams() -> None:
    settings = {one["name"]: one.get("value") for one in CONTAINER["env"]}
    waited = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > waited + float(settings["TURBOSERVE_SHUTDOWN_GRACE_S"] or 0) + 10


def test_probes_ask_what_is_answered() -> None:
    for probe in ("startupProbe", "readinessProbe"):
        python, dash_c, code = CONTAINER[probe]["exec"]["command"]
        assert (python, dash_c) == ("python", "-c") and "/ready" in code
        compile(code, probe, "exec")
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/health", "the one that needs no key"
    assert CONTAINER["resources"]["limits"]["memory"] == CONTAINER["resources"]["requests"]["memory"]


def test_volumes_and_paths_fit_the_image() -> None:
    mounted = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    claimed = {claim["metadata"]["name"] for claim in SERVERS["spec"]["volumeClaimTemplates"]}
    assert set(mounted.values()) == {volume["name"] for volume in POD["volumes"]} | claimed
    settings = {one["name"]: one.get("value", "") for one in CONTAINER["env"]}
    assert any(settings["TURBOSERVE_KV_STORE_DIR"].startswith(path) for path in mounted)
    cache_dir = re.search(r"TURBOSERVE_CACHE_DIR=(\S+)", (ROOT / "Dockerfile").read_text())
    assert cache_dir is not None and mounted[f"{cache_dir[1]}/calibration"] == mounted["/conversations"]
    assert of_kind("PersistentVolumeClaim", "turboserve-conversations")["spec"]["accessModes"] == ["ReadWriteMany"]
    user = re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert user is not None and POD["securityContext"]["runAsUser"] == int(user[1])


def test_the_autoscaler_asks_for_metrics_that_there_are_and_for_no_more_pods_than_the_gateway_knows() -> None:
    spec = of_kind("HorizontalPodAutoscaler", "turboserve")["spec"]
    sources = (ROOT / "server" / "turboserve" / "api" / "metrics.py").read_text()
    for metric in spec["metrics"]:
        name = metric["pods"]["metric"]["name"].removeprefix("turboserve_")
        assert f'_gauge("{name}"' in sources, name
    named = re.findall(r"^\s+server (\S+) (\S+):8000 ", (BASE / "haproxy.cfg").read_text(), re.M)
    service = SERVERS["spec"]["serviceName"]
    assert named == [(f"turboserve-{i}", f"turboserve-{i}.{service}") for i in range(spec["maxReplicas"])]
    assert spec["minReplicas"] <= SERVERS["spec"]["replicas"] <= spec["maxReplicas"]


def test_the_gateway_runs_by_the_shipped_file() -> None:
    """But for the servers, and how their names are looked up."""

    def rules(path: Path) -> list[str]:
        text = re.sub(r"^resolvers .*?\n\n", "", path.read_text(), flags=re.S | re.M)
        return [line for line in text.splitlines() if line.strip() and not re.match(r"\s*(#|server )", line)]

    assert rules(BASE / "haproxy.cfg") == rules(ROOT / "config" / "gateways" / "haproxy.cfg")


def test_disruptions_leave_servers_and_a_gateway() -> None:
    for name, rule in (("turboserve", "maxUnavailable"), ("turboserve-gateway", "minAvailable")):
        budget = of_kind("PodDisruptionBudget", name)["spec"]
        owner = SERVERS if name == "turboserve" else of_kind("Deployment", name)
        assert budget[rule] == 1 and budget["selector"] == owner["spec"]["selector"]
        assert owner["spec"]["replicas"] > 1
