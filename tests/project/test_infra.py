"""Image, compose file, manifests and job templates: valid by their schemas, pinned, closed, and of one mind.

    pytest tests/project/test_infra.py

No container engine and no cluster is at hand, so no image is built and nothing is applied here. tests/services/test_postgres.py runs
the compose file's commands.
"""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import kubernetes_validate
import pytest
from docker.types import HostConfig
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect_docker.worker import DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
OURS = "tunegate:0.1.0"
POOL = "tunegate"
KUBERNETES = ("1.29", "1.34")  # the oldest and the newest it is meant for
SECRET = re.compile(r"PASSWORD|SECRET|_KEY|TOKEN")
PASSWORD = re.compile(r"://[^/@]*:(?!\$)[^/@]*@")  # in an address, and no variable


def yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path)


COMPOSE = yaml(INFRA / "compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
MANIFESTS = [
    pytest.param(manifest, id=f"{manifest['kind']}-{manifest['metadata']['name']}")
    for path in sorted((INFRA / "kubernetes").glob("*.yaml"))
    for manifest in YAML(typ="safe").load_all(path)
]
PODS = {
    manifest["metadata"]["name"]: manifest["spec"]["template"]["spec"]
    for (manifest,) in (parameter.values for parameter in MANIFESTS)
    if "template" in manifest.get("spec", {})
}


def template(name: str) -> dict[str, Any]:
    return json.loads((INFRA / "job-templates" / f"{name}.json").read_text(encoding="utf-8"))


def configured(kind: Any, name: str, values: dict[str, Any]) -> Any:
    """What a worker makes of a template and a deployment's job variables."""

    async def make() -> Any:
        async with PrefectClient("http://127.0.0.1:9/api") as client:  # asked for blocks only, and there are none
            return await kind.from_template_and_values(template(name), values, client=client)

    made = asyncio.run(make())
    made.prepare_for_flow_run(FlowRun(id=uuid4(), name="happy-otter", flow_id=uuid4()))
    return made


def job(**values: Any) -> dict[str, Any]:
    return configured(KubernetesWorkerJobConfiguration, "kubernetes", values).job_manifest


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from PODS.items()
    yield "job", job()["spec"]["template"]["spec"]


# --- by their schemas ---------------------------------------------------------------------------------------


def test_the_compose_file_is_valid_by_the_specifications_own_schema():
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_is_valid_by_the_clusters_own_schema(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_kustomize_names_every_manifest_and_every_file_it_names_is_there():
    kustomization = yaml(INFRA / "kustomization.yaml")
    manifests = [f"kubernetes/{path.name}" for path in (INFRA / "kubernetes").iterdir()]
    assert sorted(kustomization["resources"]) == sorted(manifests)
    named = [file for maps in kustomization["configMapGenerator"] for file in maps["files"]]
    assert [file for file in named if not (INFRA / file.split("=")[-1]).is_file()] == []


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here")
def test_what_kustomize_makes_of_the_manifests_is_valid():
    made = subprocess.run(["kubectl", "kustomize", INFRA], check=True, capture_output=True, text=True).stdout
    manifests = [manifest for manifest in YAML(typ="safe").load_all(made) if manifest]
    assert len(manifests) == len(MANIFESTS) + 2  # the two config maps
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES[-1], strict=True)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "tunegate"
    ours = {"mlflow", "prefect", "worker"}
    images = {
        m["metadata"]["name"]: m["spec"]["template"]["spec"]["containers"][0]["image"]
        for m in manifests
        if "template" in m.get("spec", {})
    }
    assert {images[name] for name in ours} == {OURS}


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_kubernetes_template_makes_a_valid_job_on_a_gpu(version):
    made = job(env={"DO_NOT_TRACK": "1"})
    pod = made["spec"]["template"]["spec"]
    # Prefect wants these two in the pod and no cluster knows them there: the server drops them.
    del pod["parallelism"], pod["completions"]
    kubernetes_validate.validate(made, version, strict=True)
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "DO_NOT_TRACK", "value": "1"} in container["env"]
    assert container["args"] == ["prefect", "flow-run", "execute"]


def test_a_job_that_trains_nothing_takes_no_gpu_and_one_that_does_may_choose_its_card():
    small = job(gpus=0)["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert (small["requests"]["nvidia.com/gpu"], small["limits"]["nvidia.com/gpu"]) == (0, 0)
    assert job(node_selector={"nvidia.com/gpu.product": "NVIDIA-L4"})["spec"]["template"]["spec"]["nodeSelector"] == {
        "nvidia.com/gpu.product": "NVIDIA-L4"
    }


def test_the_docker_template_makes_a_container_of_the_compose_files_image_network_and_store():
    gpu = [{"driver": "nvidia", "count": 1, "capabilities": [["gpu"]]}]
    made = configured(DockerWorkerJobConfiguration, "docker", {"gpus": gpu, "env": {"DO_NOT_TRACK": "1"}})
    assert made.image == OURS
    assert made.networks == [f"{COMPOSE['name']}_front"]
    assert made.volumes == [f"{COMPOSE['name']}_store:/store"]
    # A deployment's own variables come on top; the server is found by its name in that network.
    assert made.env["DO_NOT_TRACK"] == "1"
    assert made.env["PREFECT_API_URL"] == SERVICES["worker"]["environment"]["PREFECT_API_URL"]
    asked = HostConfig(version="1.44", mem_limit=made.mem_limit, **made.container_create_kwargs)
    assert asked["DeviceRequests"][0]["Count"] == 1
    assert asked["CapDrop"] == ["ALL"]


@pytest.mark.parametrize("name", ["docker", "kubernetes"])
def test_every_variable_of_a_template_is_used_and_every_one_it_uses_is_there(name):
    made = template(name)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(made["job_configuration"])))
    assert used == set(made["variables"]["properties"])
    jsonschema.Draft202012Validator.check_schema(made["variables"])


# --- the image ----------------------------------------------------------------------------------------------

DOCKERFILE = (INFRA / "Dockerfile").read_text(encoding="utf-8")
STEPS = [
    line.partition(" ")[::2]
    for line in re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    if line
]


def test_everything_the_image_copies_is_there_and_let_through():
    copied = [source for step, rest in STEPS if step == "COPY" for source in rest.split()[:-1]]
    assert copied
    ignore = (INFRA / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(copied)
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_image_runs_as_nobody_special_and_starts_what_is_installed():
    steps = [step for step, _ in STEPS]
    (user,) = [rest for step, rest in STEPS if step == "USER"]
    assert int(user) > 0
    assert steps.index("USER") > max(i for i, step in enumerate(steps) if step == "RUN")
    assert STEPS[-1] == ("CMD", '["tunegate", "--help"]')


def test_the_image_names_no_index_and_holds_no_secret():
    assert "://" not in DOCKERFILE
    assert [rest for step, rest in STEPS if step in ("ENV", "ARG") and SECRET.search(rest)] == []
    installs = [line for step, rest in STEPS if step == "RUN" for line in rest.split("&&") if "pip install" in line]
    assert len(installs) == 4
    assert all("--constraint constraints.txt" in line or "--no-deps" in line for line in installs)


# --- pinned, closed, without secrets ------------------------------------------------------------------------


def test_every_image_is_pinned_to_a_version():
    images = [service["image"] for service in SERVICES.values()]
    images += [container["image"] for _, pod in pods() for container in pod["containers"]]
    images += [rest for step, rest in STEPS if step == "FROM"]
    images += [made["variables"]["properties"]["image"]["default"] for made in map(template, ("docker", "kubernetes"))]
    # The manifests name ours alone; the kustomization gives it its tag.
    named = yaml(INFRA / "kustomization.yaml")["images"]
    assert [f"{image['name']}:{image['newTag']}" for image in named] == [OURS]
    others = {image for image in images if image not in ("tunegate", OURS)}
    assert len(others) >= 3
    assert [image for image in others if not re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", image)] == []


def test_ports_are_published_on_loopback_only_and_only_those_of_the_pages():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"mlflow": ["127.0.0.1:5000:5000"], "prefect": ["127.0.0.1:4200:4200"]}
    for manifest in (parameter.values[0] for parameter in MANIFESTS):
        assert manifest["kind"] != "Ingress"
        assert manifest["kind"] != "Service" or manifest["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_the_database_and_the_object_store_are_reached_by_servers_only():
    reach = {name: set(service["networks"]) for name, service in SERVICES.items()}
    assert [name for name, networks in COMPOSE["networks"].items() if not networks.get("internal")] == ["front"]
    assert {name for name, networks in reach.items() if networks & reach["postgres"]} == {
        "postgres",
        "mlflow",
        "prefect",
    }
    assert {name for name, networks in reach.items() if networks & reach["s3"]} == {"s3", "mlflow"}


def test_no_file_holds_a_secret():
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET.search(name) or re.fullmatch(r"\$\{\w+(:\?[^}]+)?\}", value), name
            assert not PASSWORD.search(value), name
    for _, pod in pods():
        for entry in pod["containers"][0].get("env", []):
            assert not SECRET.search(entry["name"]) or "secretKeyRef" in entry["valueFrom"], entry
            assert not PASSWORD.search(entry.get("value", "")), entry
    assert "infra/.env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_every_variable_of_the_compose_file_stands_in_the_example_and_its_secrets_are_empty():
    example = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    used = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text(encoding="utf-8")))
    assert used | {"COMPOSE_PROFILES"} == set(example)
    assert {value for name, value in example.items() if SECRET.search(name)} == {""}


def test_every_key_of_the_clusters_secret_is_in_the_command_that_makes_it():
    asked = {
        entry["valueFrom"]["secretKeyRef"]["key"]
        for _, pod in pods()
        for entry in pod["containers"][0].get("env", [])
        if "valueFrom" in entry
    }
    made = re.findall(r"--from-literal=([\w-]+)=", (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"))
    assert asked <= set(made)
    assert asked


@pytest.mark.parametrize("name", [*PODS, "job"])
def test_a_pod_can_do_little_and_says_what_it_needs(name):
    pod = dict(pods())[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["enableServiceLinks"] is False
    # Only the one that makes Jobs may talk to the cluster.
    assert pod.get("automountServiceAccountToken", True) is (name == "worker")
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]


def test_our_containers_can_do_little():
    ours = {name: service for name, service in SERVICES.items() if service["image"] == OURS}
    assert set(ours) == {"mlflow", "prefect", "worker", "worker-gpu"}
    for service in ours.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    for service in SERVICES.values():
        assert "no-new-privileges:true" in service["security_opt"]
        assert service["restart"] == "unless-stopped"


# --- of one mind --------------------------------------------------------------------------------------------


def commands() -> dict[str, list[str]]:
    """What starts the image's containers, in the compose file and in the manifests."""
    found = {f"compose {name}": service["command"] for name, service in SERVICES.items() if service["image"] == OURS}
    return found | {
        f"manifest {name}": pod["containers"][0]["args"] for name, pod in PODS.items() if name != "postgres"
    }


def test_a_container_starts_what_the_image_installs():
    scripts = {script.name for script in entry_points(group="console_scripts")}
    assert {"tunegate", "prefect", "mlflow"} <= scripts
    assert {command[0] for command in commands().values()} <= scripts


def test_compose_file_and_manifests_start_the_servers_alike():
    started = commands()
    for name in ("mlflow", "prefect"):
        assert started[f"compose {name}"] == started[f"manifest {name}"]


def test_workers_and_deployments_name_one_pool():
    named = {name: command[command.index("--pool") + 1] for name, command in commands().items() if "--pool" in command}
    assert set(named) == {"compose worker", "compose worker-gpu", "manifest worker"}
    assert set(named.values()) == {POOL}
    text = (INFRA / "prefect.yaml").read_text(encoding="utf-8")
    assert {deployment["work_pool"]["name"] for deployment in YAML(typ="safe").load(text)["deployments"]} == {POOL}
    assert f"prefect work-pool create {POOL} " in text


def test_whoever_waits_for_another_waits_for_one_that_tells_its_health():
    waits = [(name, other) for name, service in SERVICES.items() for other in service.get("depends_on", {})]
    assert waits
    for name, other in waits:
        assert SERVICES[name]["depends_on"][other] == {"condition": "service_healthy"}
        assert SERVICES[other]["healthcheck"]["test"][0] == "CMD"


def test_one_of_two_workers_is_started_by_its_profile():
    assert {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service} == {
        "worker": ["cpu"],
        "worker-gpu": ["gpu"],
    }
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_a_service_of_the_cluster_finds_its_pods_and_their_port():
    manifests = [parameter.values[0] for parameter in MANIFESTS]
    services = [manifest for manifest in manifests if manifest["kind"] == "Service"]
    assert len(services) == 3
    for service in services:
        (workload,) = [
            manifest
            for manifest in manifests
            if manifest["kind"] in ("Deployment", "StatefulSet")
            and manifest["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]
        ]
        assert workload["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
        ports = {port["containerPort"] for port in workload["spec"]["template"]["spec"]["containers"][0]["ports"]}
        assert {port["port"] for port in service["spec"]["ports"]} == ports


def test_every_volume_that_is_mounted_is_there():
    claims = {p.values[0]["metadata"]["name"] for p in MANIFESTS if p.values[0]["kind"] == "PersistentVolumeClaim"}
    for name, pod in pods():
        volumes = {volume["name"] for volume in pod["volumes"]} | ({"data"} if name == "postgres" else set())
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
        assert {
            v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
        } <= claims
    named = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert {volume for volume in named if not volume.startswith(".")} == set(COMPOSE["volumes"])


def test_the_script_that_makes_databases_makes_those_that_the_servers_ask_for():
    script = (INFRA / "postgres-databases.sh").read_text(encoding="utf-8")
    assert (INFRA / "postgres-databases.sh").stat().st_mode & 0o111
    asked = re.findall(r"@postgres:5432/(\w+)", (INFRA / "compose.yaml").read_text(encoding="utf-8"))
    assert sorted(asked) == sorted(re.findall(r"CREATE DATABASE (\w+)", script))
