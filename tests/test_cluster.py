"""The files of cluster/, checked offline: what a cloud, an operator or Ray would refuse, or accept and leave open."""

import copy
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import InvalidRequirement, Requirement
from paths import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws", "gcp")
MANIFESTS = ("raycluster", "rayjob", "rayservice")
STACK = {"ray": "2.60.0", "deepspeed": "0.19.8", "torch": "2.13.0", "transformers": "5.24.0"}

Config = dict[str, Any]


def launcher(name: str) -> Config:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def manifest(name: str) -> list[Config]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text()))


def ray_schema() -> Config:
    spec = importlib.util.find_spec("ray")  # finds the file without importing Ray
    assert spec is not None
    return json.loads((Path(str(spec.origin)).parent / "autoscaler" / "ray-schema.json").read_text())


def our_requirements() -> list[Requirement]:
    path = ROOT / "pyproject.toml"
    if not path.exists():
        return [Requirement(f"{name}=={version}") for name, version in STACK.items()]
    project = tomllib.loads(path.read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(text) for text in (*project["dependencies"], *(line for extra in extras for line in extra))]


# --- versions -------------------------------------------------------------------------------------------------


def installed(commands: list[str]) -> list[str]:
    """Every argument of every `pip install` in the commands."""
    words = [word for command in commands for part in command.split("&&") for word in pip_arguments(part)]
    return [word for word in words if not word.startswith("-")]


def pip_arguments(command: str) -> list[str]:
    _, found, arguments = command.partition("pip install ")
    return shlex.split(arguments) if found else []


def version_problems(packages: list[str]) -> list[str]:
    """Each package pinned, each of the stack present, and none outside what pyproject.toml allows."""
    problems = []
    pinned: dict[str, str] = {}
    for package in packages:
        if package.startswith((".", "$HOME/")):  # this repository
            continue
        try:
            requirement = Requirement(package)
        except InvalidRequirement:
            problems.append(f"not a pinned package: {package}")
            continue
        exact = re.fullmatch(r"==([\w.]+)", str(requirement.specifier))
        if requirement.url or not exact:
            problems.append(f"not a pinned package: {package}")
        else:
            pinned[requirement.name] = exact[1]
    problems += [f"{name} is not installed" for name in STACK if name not in pinned]
    for ours in our_requirements():
        version = pinned.get(ours.name)
        if version and not ours.specifier.contains(version, prereleases=True):
            problems.append(f"{ours.name}=={version} against pyproject.toml's {ours.specifier}")
    order = [name for name in pinned if name in ("torch", "deepspeed")]
    if order == ["deepspeed", "torch"]:
        problems.append("deepspeed before torch: its setup imports torch")
    return problems


# --- launcher files -------------------------------------------------------------------------------------------


def is_spot(node: Config) -> bool:
    return (
        node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or dict(node.get("scheduling", {})).get("provisioningModel") == "SPOT"
    )


def launcher_problems(config: Config) -> list[str]:
    """What is wrong with a launcher file; empty when it is fit to use."""
    errors = jsonschema.Draft7Validator(ray_schema()).iter_errors(config)
    problems = [f"schema: {error.message}" for error in errors]
    problems += node_problems(config)
    problems += start_problems(config)
    setup = [*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"]]
    problems += version_problems(list(dict.fromkeys(installed(setup))))
    text = json.dumps(config)
    problems += [f"open to the world: {found}" for found in re.findall(r"0\.0\.0\.0\S*", text)]
    problems += [f"not a release: {found}" for found in re.findall(r"[^\s\"]*(?:\.whl|nightly|\.dev\d|:latest)", text)]
    for remote, local in config["file_mounts"].items():
        if local.startswith("cluster/") and not (ROOT / local).is_file():
            problems.append(f"file_mounts: {local} does not exist (for {remote})")
    if not any("mount -t nfs" in command for command in config["setup_commands"]):
        problems.append("driver and workers share no storage")
    if "~/.ray/auth_token" not in config["file_mounts"]:
        problems.append("the token is not mounted")
    return problems


def node_problems(config: Config) -> list[str]:
    problems = []
    head, types = config["head_node_type"], config["available_node_types"]
    if head not in types:
        return [f"head_node_type {head} is not a node type"]
    if types[head]["resources"].get("CPU") != 0:
        problems.append("the head has CPUs")
    if is_spot(types[head]["node_config"]):
        problems.append("the head is a spot VM")
    workers = {name: node for name, node in types.items() if name != head}
    if not any(node["resources"].get("GPU", 0) for node in workers.values()):
        problems.append("no worker has a GPU")
    for name, node in workers.items():
        if not is_spot(node["node_config"]):
            problems.append(f"{name} is not a spot VM")
        if not 0 <= node["min_workers"] < node["max_workers"] <= config["max_workers"]:
            problems.append(f"{name} does not autoscale within max_workers")
    if config["provider"].get("cache_stopped_nodes") is not False:
        problems.append("stopped VMs would be reused")
    closed = {"aws": aws_node_problems, "gcp": gcp_node_problems}[config["provider"]["type"]]
    for name, node in types.items():
        problems += [f"{name}: {problem}" for problem in closed(node["node_config"])]
    return problems


def aws_node_problems(node: Config) -> list[str]:
    problems = [f"no {key}: Ray's default is unsafe" for key in AWS_NO_DEFAULT if not node.get(key)]
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        problems.append("IMDSv1 is on")
    if not all(disk["Ebs"].get("Encrypted") for disk in node.get("BlockDeviceMappings", [])):
        problems.append("a disk is not encrypted")
    return problems


AWS_NO_DEFAULT = ("ImageId", "SecurityGroupIds", "IamInstanceProfile", "BlockDeviceMappings")


def gcp_node_problems(node: Config) -> list[str]:
    interfaces = node.get("networkInterfaces", [])
    problems = [] if interfaces else ["no networkInterfaces: Ray takes the first network, open on port 22"]
    if any("default" in interface["subnetwork"] for interface in interfaces):
        problems.append("the default network is open on port 22")
    metadata = {item["key"]: item["value"] for item in node.get("metadata", {}).get("items", [])}
    if metadata.get("block-project-ssh-keys") != "TRUE":
        problems.append("the project's SSH keys are let in")
    if not all(disk.get("autoDelete") for disk in node["disks"]):
        problems.append("a disk outlives its VM")
    return problems


def exports(command: str) -> dict[str, str]:
    """The variables that the command's `export ...;` sets."""
    words = shlex.split(command.partition(";")[0])
    return dict(word.split("=", 1) for word in words[1:]) if words[:1] == ["export"] else {}


def ray_start(command: str) -> list[str]:
    """The arguments of `ray start` in the command, without the rest of the shell line."""
    words = shlex.split(command.replace("&&", " && ").replace(";", " ; "))
    first = next((i for i, pair in enumerate(pairwise(words)) if pair == ("ray", "start")), None)
    if first is None:
        return []
    rest = words[first + 2 :]
    return rest[: next((i for i, word in enumerate(rest) if word in ("&&", ";", "&")), len(rest))]


def start_problems(config: Config) -> list[str]:
    problems = []
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    for name, command in (("head", head), ("worker", worker)):
        if exports(command).get("RAY_AUTH_MODE") != "token":
            problems.append(f"{name}: RAY_AUTH_MODE=token is not exported")
        if exports(command).get("RAY_AUTH_TOKEN_PATH") != "$HOME/.ray/auth_token":
            problems.append(f"{name}: RAY_AUTH_TOKEN_PATH is not the mounted token")
        if "--object-spilling-directory=/scratch/spill" not in ray_start(command):
            problems.append(f"{name}: spills to the root disk")
    for flag in ("--head", "--num-cpus=0", "--dashboard-host=127.0.0.1"):
        if flag not in ray_start(head):
            problems.append(f"head: no {flag}")
    if "--block" not in ray_start(worker) or "unit.sh ray-worker ray start" not in worker:
        problems.append("worker: not a service that drains on SIGTERM")
    if exports(worker).get("TMPDIR") != "/scratch":
        problems.append("worker: builds checkpoints on the root disk")
    if not float(exports(worker).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 0)) > 0:
        problems.append("worker: no drain timeout")
    if f"spot_watcher.py --cloud={config['provider']['type']}" not in worker:
        problems.append("worker: no spot watcher")
    return problems


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_is_fit(name: str) -> None:
    assert launcher_problems(launcher(name)) == []


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_stays_fit_when_ray_has_merged_its_defaults(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config

    merged = prepare_config(launcher(name))
    assert launcher_problems(merged) == []
    assert not merged["docker"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_shutdown_leaves_the_drain_its_time(name: str) -> None:
    worker = launcher(name)["worker_start_ray_commands"][-1]
    power_cut_s = {"aws": 120, "gcp": 30}[name]
    assert float(exports(worker)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) + 5 < power_cut_s


def unknown_key(config: Config) -> None:
    config["head_nodes"] = {}


def headless(config: Config) -> None:
    config["head_node_type"] = "ray.head.default"


def spot_head(config: Config) -> None:
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["gpu_spot"]
    head["node_config"].update(copy.deepcopy(worker["node_config"]))


def on_demand_worker(config: Config) -> None:
    node = config["available_node_types"]["gpu_spot"]["node_config"]
    node.pop("InstanceMarketOptions", None)
    node.pop("scheduling", None)


def nightly(config: Config) -> None:
    config["setup_commands"].append("pip install -U 'ray[default] @ https://example.com/ray-3.0.0.dev0-cp312.whl'")


def drifted(config: Config) -> None:
    config["setup_commands"] = [line.replace("==2.60.0", "==2.59.0") for line in config["setup_commands"]]


def unpinned(config: Config) -> None:
    config["setup_commands"] = [line.replace("deepspeed==0.19.8", "deepspeed") for line in config["setup_commands"]]


def torch_last(config: Config) -> None:
    config["setup_commands"] = config["setup_commands"][::-1]


def public_dashboard(config: Config) -> None:
    config["head_start_ray_commands"] = [
        line.replace("127.0.0.1", "0.0.0.0") for line in config["head_start_ray_commands"]
    ]


def open_workers(config: Config) -> None:
    config["worker_start_ray_commands"] = [
        line.replace("RAY_AUTH_MODE=token ", "") for line in config["worker_start_ray_commands"]
    ]


def open_ssh(config: Config) -> None:
    for node in config["available_node_types"].values():
        node["node_config"].pop("SecurityGroupIds", None)
        node["node_config"].pop("networkInterfaces", None)


def busy_head(config: Config) -> None:
    config["available_node_types"]["head"]["resources"] = {}


def rays_own_start(config: Config) -> None:
    del config["head_start_ray_commands"], config["worker_start_ray_commands"]
    config.update(head_start_ray_commands=["ray start --head"], worker_start_ray_commands=["ray start"])


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (unknown_key, "schema: Additional properties"),
        (headless, "is not a node type"),
        (spot_head, "the head is a spot VM"),
        (on_demand_worker, "is not a spot VM"),
        (nightly, "not a release"),
        (nightly, "not a pinned package"),
        (drifted, "against pyproject.toml"),
        (unpinned, "not a pinned package: deepspeed"),
        (torch_last, "deepspeed before torch"),
        (public_dashboard, "open to the world"),
        (open_workers, "worker: RAY_AUTH_MODE=token"),
        (open_ssh, "Ray"),
        (busy_head, "the head has CPUs"),
        (rays_own_start, "worker: not a service"),
    ],
)
def test_damage_to_a_launcher_is_caught(name: str, damage: Callable[[Config], None], complaint: str) -> None:
    config = launcher(name)
    damage(config)
    assert any(complaint in problem for problem in launcher_problems(config))


# --- Ray's own command line -----------------------------------------------------------------------------------


def shell_lines(path: Path) -> list[str]:
    return path.read_text().replace("\\\n", " ").splitlines()


def starts() -> Iterator[Any]:
    for name in LAUNCHERS:
        for role in ("head", "worker"):
            yield pytest.param(ray_start(launcher(name)[f"{role}_start_ray_commands"][-1]), id=f"{name}-{role}")
    slurm = [line for line in shell_lines(CLUSTER / "slurm.sh") if "ray start" in line and not line.startswith("#")]
    yield from (pytest.param(ray_start(line), id=f"slurm-{i}") for i, line in enumerate(slurm))
    for name in MANIFESTS:
        for group in ray_groups(manifest(name)[0]):
            flags = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
            yield pytest.param(flags, id=f"{name}-{group.get('groupName', 'head')}")


def ray_groups(resource: Config) -> list[Config]:
    cluster = cluster_of(resource)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def cluster_of(resource: Config) -> Config:
    key = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}[resource["kind"]]
    return resource["spec"][key] if key else resource["spec"]


@pytest.mark.parametrize("arguments", list(starts()))
def test_the_pinned_ray_accepts_every_start(arguments: list[str]) -> None:
    from ray.scripts.scripts import start

    assert arguments
    start.make_context("start", list(arguments))  # raises on an unknown option or a bad value; starts nothing


def test_the_pinned_ray_accepts_the_readme_commands() -> None:
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts import scripts
    from ray.serve.scripts import deploy

    commands = {
        "ray job submit": submit,
        "ray up": scripts.up,
        "ray down": scripts.down,
        "ray dashboard": scripts.dashboard,
        "ray monitor": scripts.monitor,
        "ray attach": scripts.attach,
        "serve deploy": deploy,
        "ray get-auth-token": scripts.get_auth_token,
    }
    text = (CLUSTER / "README.md").read_text()
    for name, command in commands.items():
        found = re.findall(rf"(?:^|`){name} ([^`\n]*)", text, flags=re.MULTILINE)
        assert found, name
        for line in found:
            arguments = shlex.split(line.replace("<job>", "toy"), comments=True)
            ends = [i for i, word in enumerate(arguments) if word in ("&", ">")]
            command.make_context(name, arguments[: min(ends, default=len(arguments))])


# --- Serve ----------------------------------------------------------------------------------------------------


def serve_problems(config: Config, public_host: bool = False) -> list[str]:
    """Ray's schema lets unknown keys pass, so they are looked for here."""
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    parsed = ServeDeploySchema.model_validate(config)
    problems = [f"unknown key {key}" for key in config.keys() - ServeDeploySchema.model_fields.keys()]
    http = config.get("http_options", {})
    problems += [f"unknown key http_options.{key}" for key in http.keys() - HTTPOptionsSchema.model_fields.keys()]
    if not public_host and parsed.http_options.host != "127.0.0.1":
        problems.append(f"listens on {parsed.http_options.host}")
    for raw, application in zip(config["applications"], parsed.applications, strict=True):
        problems += [f"unknown key {key}" for key in raw.keys() - ServeApplicationSchema.model_fields.keys()]
        if application.import_path != "dtrpo_ray.serve.server:build":
            problems.append(f"import_path {application.import_path}")
        expected = {"checkpoint": str, "model_name": str, "num_replicas": int, "api_key_file": str}
        if {key: type(value) for key, value in application.args.items()} != expected:
            problems.append(f"args {application.args}")
    return problems


def serve_config() -> Config:
    return yaml.safe_load((CLUSTER / "serve.yaml").read_text())


def test_serve_config_is_fit() -> None:
    assert serve_problems(serve_config()) == []
    assert serve_config()["http_options"]["port"] == 8000


def test_serve_config_keeps_what_the_file_says() -> None:
    from ray.serve.schema import ServeDeploySchema

    kept = ServeDeploySchema.model_validate(serve_config()).model_dump(mode="json", exclude_unset=True)
    assert kept == serve_config()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda config: config["http_options"].pop("host"), "listens on 0.0.0.0"),
        (lambda config: config["http_options"].update(timeout_s=1), "unknown key http_options.timeout_s"),
        (lambda config: config.update(application=[]), "unknown key application"),
        (lambda config: config["applications"][0]["args"].pop("api_key_file"), "args"),
    ],
)
def test_damage_to_the_serve_config_is_caught(damage: Callable[[Config], object], complaint: str) -> None:
    config = serve_config()
    damage(config)
    assert any(complaint in problem for problem in serve_problems(config))


def test_serve_args_are_fields_of_our_config() -> None:
    from dtrpo_ray.config.serve import ServeConfig

    args = serve_config()["applications"][0]["args"]
    assert ServeConfig.model_validate(args).model_dump(mode="json", exclude_unset=True) == args


def test_rayservice_serves_the_same_application() -> None:
    inner = yaml.safe_load(manifest("rayservice")[0]["spec"]["serveConfigV2"])
    assert serve_problems(inner, public_host=True) == []
    for config in (inner, outer := serve_config()):
        del config["proxy_location"], config["http_options"]["host"]
        del config["applications"][0]["args"]["checkpoint"], config["applications"][0]["args"]["api_key_file"]
    assert inner == outer


# --- Kubernetes -----------------------------------------------------------------------------------------------

SCALARS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def crd_types() -> Config:
    return yaml.safe_load((ROOT / "tests" / "crds" / "kuberay.yaml").read_text())


def field_problems(value: Any, kind: str, types: Config, path: str) -> list[str]:
    """Compare a manifest with the field lists; `{str}` also catches the 0 that should be "0"."""
    if kind in SCALARS:
        good = isinstance(value, SCALARS[kind]) and isinstance(value, bool) == (kind == "bool")
        return [] if good else [f"{path}: {value!r} is not {kind}"]
    if kind[0] in "[{":
        if not isinstance(value, list if kind[0] == "[" else dict):
            return [f"{path}: {value!r} is not {kind}"]
        items = enumerate(value) if isinstance(value, list) else value.items()
        return [p for key, item in items for p in field_problems(item, kind[1:-1], types, f"{path}.{key}")]
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is not {kind}"]
    problems = []
    for key, item in value.items():
        if key in types[kind]:
            problems += field_problems(item, types[kind][key], types, f"{path}.{key}")
        else:
            problems.append(f"{path}: {kind} has no field {key}")
    return problems


def gibibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([MGT]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**-10, "Gi": 1, "Ti": 2**10}[unit]


def container_problems(container: Config, ray_version: str) -> list[str]:
    problems = []
    tag = container["image"].partition(":")[2]
    if not tag.endswith(f"-ray{ray_version}"):
        problems.append(f"image {container['image']} is not pinned to Ray {ray_version}")
    limits = container["resources"]["limits"]
    if not {"cpu", "memory"} <= limits.keys():
        problems.append("no cpu or memory limit")
    if container["securityContext"].get("allowPrivilegeEscalation") is not False:
        problems.append("may gain privileges")
    if container["securityContext"].get("capabilities") != {"drop": ["ALL"]}:
        problems.append("keeps capabilities")
    return problems


def pod_problems(pod: Config, ray_version: str) -> list[str]:
    problems = [p for container in pod["containers"] for p in container_problems(container, ray_version)]
    security = pod["securityContext"]
    if security.get("runAsNonRoot") is not True or security.get("runAsUser", 0) == 0:
        problems.append("runs as root")
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    mounts = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
    if volumes != mounts:
        problems.append(f"volumes {sorted(volumes ^ mounts)} are mounted or declared, not both")
    return problems


def ray_pod_problems(pod: Config, ray_version: str) -> list[str]:
    problems = pod_problems(pod, ray_version)
    container = pod["containers"][0]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    drain_s = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
    if not pod.get("terminationGracePeriodSeconds", 30) > drain_s:
        problems.append(f"killed within its drain of {drain_s} s")
    if pod["restartPolicy"] != "Never":
        problems.append("the v2 autoscaler needs restartPolicy Never")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container["volumeMounts"]}
    shm = mounts.get("/dev/shm", {}).get("emptyDir", {})
    if shm.get("medium") != "Memory":
        problems.append("/dev/shm is not memory")
    elif not gibibytes(shm["sizeLimit"]) < gibibytes(container["resources"]["limits"]["memory"]):
        problems.append("/dev/shm can fill the memory limit")
    if "/scratch" not in mounts:
        problems.append("no scratch disk")
    return problems


def manifest_problems(documents: list[Config], ray_version: str = STACK["ray"]) -> list[str]:
    """What is wrong with a manifest of cluster/kuberay; empty when it is fit to apply."""
    resource, policy = documents
    types = crd_types()
    problems = field_problems(resource, resource["kind"], types, resource["kind"])
    problems += field_problems(policy, "NetworkPolicy", types, "NetworkPolicy")
    cluster = cluster_of(resource)
    if resource["apiVersion"] != "ray.io/v1" or cluster["rayVersion"] != ray_version:
        problems.append("wrong apiVersion or rayVersion")
    if cluster.get("authOptions", {}).get("mode") != "token":
        problems.append("no token")
    if not cluster["enableInTreeAutoscaling"] or cluster["autoscalerOptions"].get("version") != "v2":
        problems.append("no v2 autoscaler")
    if str(cluster["headGroupSpec"]["rayStartParams"].get("num-cpus")) != "0":
        problems.append("the head has CPUs")
    for group in cluster["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] > 0:
            problems.append(f"{group['groupName']}: min <= replicas <= max does not hold")
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        if not int(limits.get("nvidia.com/gpu", 0)):
            problems.append(f"{group['groupName']}: no GPU")
    templates = [group["template"] for group in ray_groups(resource)]
    problems += [p for template in templates for p in ray_pod_problems(template["spec"], ray_version)]
    problems += kind_problems(resource)
    if submitter := resource["spec"].get("submitterPodTemplate"):
        templates.append(submitter)
        problems += pod_problems(submitter["spec"], ray_version)
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    if not all(selected <= template["metadata"]["labels"].items() for template in templates):
        problems.append("a pod is outside the network policy")
    if policy["spec"]["policyTypes"] != ["Ingress"] or not all(rule.get("from") for rule in policy["spec"]["ingress"]):
        problems.append("the network policy lets everyone in")
    return problems


def kind_problems(resource: Config) -> list[str]:
    spec = resource["spec"]
    if resource["kind"] == "RayJob":
        good = spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] and spec["preRunningDeadlineSeconds"] > 0
        return [] if good else ["the job does not retry, or does not clean up"]
    if resource["kind"] == "RayService" and not spec.get("excludeHeadPodFromServeSvc"):
        return ["the head is behind the public service"]
    return []


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_fit(name: str) -> None:
    assert manifest_problems(manifest(name)) == []


def worker_pod(documents: list[Config]) -> Config:
    return cluster_of(documents[0])["workerGroupSpecs"][0]["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda docs: docs[0]["spec"].update(authOption={}), "has no field authOption"),
        (lambda docs: cluster_of(docs[0])["authOptions"].update(mode="disabled"), "no token"),
        (
            lambda docs: cluster_of(docs[0])["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
            "the head has CPUs",
        ),
        (
            lambda docs: cluster_of(docs[0])["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            "0 is not str",
        ),
        (lambda docs: worker_pod(docs).update(terminationGracePeriodSeconds=100), "killed within its drain"),
        (lambda docs: worker_pod(docs).pop("terminationGracePeriodSeconds"), "killed within its drain"),
        (lambda docs: worker_pod(docs)["containers"][0].update(image="dtrpo-ray:latest"), "is not pinned"),
        (lambda docs: worker_pod(docs)["securityContext"].update(runAsNonRoot=False), "runs as root"),
        (lambda docs: worker_pod(docs)["volumes"].pop(0), "mounted or declared, not both"),
        (
            lambda docs: worker_pod(docs)["volumes"][0]["emptyDir"].update(sizeLimit="900Gi"),
            "fill the memory limit",
        ),
        (
            lambda docs: docs[1]["spec"]["podSelector"].update(matchLabels={"app": "x"}),
            "outside the network policy",
        ),
        (lambda docs: docs[1]["spec"]["ingress"].append({}), "lets everyone in"),
    ],
)
def test_damage_to_a_manifest_is_caught(name: str, damage: Callable[[list[Config]], object], complaint: str) -> None:
    documents = manifest(name)
    damage(documents)
    assert any(complaint in problem for problem in manifest_problems(documents))


# --- image and scripts ----------------------------------------------------------------------------------------


def dockerfile() -> list[tuple[str, str]]:
    lines = [line for line in shell_lines(CLUSTER / "Dockerfile") if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_image_is_pinned_unprivileged_and_without_secrets() -> None:
    steps = dockerfile()
    assert re.fullmatch(r"FROM \S+:\d[\w.-]*", " ".join(steps[0]))
    assert steps[-1] == ("USER", "1000")
    assert version_problems(installed([text for step, text in steps if step == "RUN"])) == []
    copied = [word for step, text in steps if step == "COPY" for word in text.split()[:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(allowed)
    assert not re.search(r"token|secret|password|api_key", str(steps), flags=re.IGNORECASE)


def test_image_holds_what_the_job_runs() -> None:
    script = Path(manifest("rayjob")[0]["spec"]["entrypoint"].split()[1])
    workdir = next(text for step, text in dockerfile() if step == "WORKDIR")
    assert script.relative_to(workdir) == Path("jobs/run.py")
    assert ("COPY", "jobs ./jobs") in dockerfile()


@pytest.mark.parametrize("name", ["slurm.sh", "unit.sh"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)


def test_unit_hands_its_environment_to_a_service_that_outlasts_the_drain(tmp_path: Path) -> None:
    fakes = {
        "sudo": 'exec "$@"',
        "systemctl": "exit 5",  # no such unit: the first start
        "systemd-run": 'printf "%s\\n" "$@" > "$HOME/options"; while [[ $1 == --* ]]; do shift; done; exec env -i "$@"',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 96, "GPU": 8}',
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "100",
    }
    command = [
        "bash",
        str(CLUSTER / "unit.sh"),
        "ray-worker",
        "bash",
        "-c",
        'echo "$RAY_OVERRIDE_RESOURCES|$1"',
        "x",
        "a b",
    ]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == '{"CPU": 96, "GPU": 8}|a b'
    options = (tmp_path / "options").read_text().splitlines()
    assert {"--unit=ray-worker", "--property=KillMode=mixed", "--property=TimeoutStopSec=105"} <= set(options)
    assert (tmp_path / ".ray" / "ray-worker.env").stat().st_mode & 0o077 == 0


def test_readme_names_every_file_and_every_blank() -> None:
    text = (CLUSTER / "README.md").read_text()
    files = [
        path.relative_to(CLUSTER) for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    blanks = {
        blank for name in LAUNCHERS for blank in re.findall(r"REPLACE_\w+", (CLUSTER / f"{name}.yaml").read_text())
    }
    assert [name for name in [*map(str, files), *blanks] if name not in text and name != "README.md"] == []


# --- spot watcher ---------------------------------------------------------------------------------------------

NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)
TERMINATE = '{"action": "terminate", "time": "2026-05-04T12:01:50Z"}'


@pytest.fixture(scope="module")
def watcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spot_watcher", CLUSTER / "spot_watcher.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["spot_watcher"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def answers(action: tuple[int, str], token: tuple[int, str] = (200, "T")) -> Callable[..., tuple[int, str]]:
    """An IMDSv2 that insists on its token, or a Google metadata server that insists on its header."""

    def fetch(method: str, url: str, headers: Mapping[str, str]) -> tuple[int, str]:
        if method == "PUT":
            return token if "X-aws-ec2-metadata-token-ttl-seconds" in headers else (400, "")
        known = headers.get("X-aws-ec2-metadata-token") == "T" or headers.get("Metadata-Flavor") == "Google"
        return action if known else (401, "")

    return fetch


def silent(method: str, url: str, headers: Mapping[str, str]) -> tuple[int, str]:
    raise urllib.error.URLError("no route")


def test_aws_notice_is_read_with_its_deadline(watcher: ModuleType) -> None:
    notice = watcher.aws_notice(answers((200, TERMINATE)), NOW)
    assert notice.seconds_left == 110
    assert "terminate" in notice.reason


def test_no_notice_is_no_drain(watcher: ModuleType) -> None:
    assert watcher.aws_notice(answers((404, "")), NOW) is None
    assert watcher.gcp_notice(answers((200, "FALSE\n")), NOW) is None


def test_a_deadline_in_the_past_is_zero_not_negative(watcher: ModuleType) -> None:
    assert watcher.aws_notice(answers((200, TERMINATE)), NOW.replace(hour=13)).seconds_left == 0


@pytest.mark.parametrize("body", ["", "{}", "[]", "soon", '{"action": "stop", "time": "12:01"}'])
def test_an_unreadable_aws_notice_still_drains(watcher: ModuleType, body: str) -> None:
    assert 0 < watcher.aws_notice(answers((200, body)), NOW).seconds_left < 120


def test_gcp_preemption_leaves_less_than_thirty_seconds(watcher: ModuleType) -> None:
    assert 0 < watcher.gcp_notice(answers((200, "TRUE")), NOW).seconds_left < 30


@pytest.mark.parametrize("cloud", LAUNCHERS)
@pytest.mark.parametrize("fetch", [answers((500, "")), answers((403, ""), token=(403, "")), silent])
def test_a_failing_service_is_an_error_not_an_answer(watcher: ModuleType, cloud: str, fetch: Any) -> None:
    with pytest.raises(watcher.MetadataError):
        watcher.NOTICES[cloud](fetch, NOW)


def test_google_answering_something_else_is_an_error(watcher: ModuleType) -> None:
    with pytest.raises(watcher.MetadataError, match="expected TRUE or FALSE"):
        watcher.gcp_notice(answers((200, "<html>")), NOW)


def test_http_status_is_an_answer_and_proxies_are_ignored(watcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/yes" else 404)
            self.end_headers()
            self.wfile.write(b"body")

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert watcher.http_fetch("GET", f"{url}/yes", {}) == (200, "body")
        assert watcher.http_fetch("GET", f"{url}/no", {}) == (404, "")
        server.shutdown()


def fake_process(proc: Path, pid: int, *arguments: str) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_bytes("\0".join((*arguments, "")).encode())


def test_the_local_raylet_is_found_by_its_command_line(watcher: ModuleType, tmp_path: Path) -> None:
    fake_process(tmp_path, 1, "/sbin/init")
    fake_process(tmp_path, 7, "python", "agent.py", "--node_id=other", "--gcs-address=other")
    with pytest.raises(watcher.RayletError):
        watcher.local_raylet(tmp_path)
    fake_process(tmp_path, 9, "/env/raylet", "--head", "--node_id=ab12", "--gcs-address=10.0.0.1:6379")
    assert watcher.local_raylet(tmp_path) == watcher.Raylet("ab12", "10.0.0.1:6379")


def test_the_pinned_ray_accepts_the_drain_command(watcher: ModuleType) -> None:
    from ray.scripts.scripts import drain_node

    notice = watcher.Notice("AWS spot terminate at noon", 110)
    command = watcher.drain_command("/env/bin/ray", watcher.Raylet("ab12", "10.0.0.1:6379"), notice)
    assert command[:2] == ["/env/bin/ray", "drain-node"]
    assert drain_node.make_context("drain-node", command[2:]).params == {
        "address": "10.0.0.1:6379",
        "node_id": "ab12",
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason_message": "AWS spot terminate at noon",
        "deadline_remaining_seconds": 110,
    }


def test_watch_outlives_outages_and_drains_until_it_works(
    watcher: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    notice = watcher.Notice("gone soon", 60)
    down = watcher.MetadataError("no route")
    polls = iter([None, down, down, down, None, notice, notice, notice])
    drains = iter([watcher.RayletError("not up yet"), subprocess.CalledProcessError(1, "ray"), None])
    sleeps: list[float] = []

    def poll() -> Any:
        if isinstance(answer := next(polls), Exception):
            raise answer
        return answer

    def drain(_: object) -> None:
        if isinstance(failure := next(drains), Exception):
            raise failure

    with caplog.at_level("INFO", logger="spot_watcher"):
        assert watcher.watch(poll, drain, sleeps.append, 2.0) == notice
    assert sleeps == [2.0] * 7
    assert len([record for record in caplog.records if "no route" in record.message]) == 1
    assert len([record for record in caplog.records if "drain failed" in record.message]) == 2
