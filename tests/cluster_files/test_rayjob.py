"""cluster/rayjob.yaml against those fields of a RayJob and of a pod that it uses, and their rules.

The fields are written down by hand: KubeRay's own definition is a megabyte, and is not in the repository.
"""

import copy
import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.version import Version
from typer.main import get_command

from flows.cli import app

ROOT = Path(__file__).resolve().parents[2]
JOB = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())
QUANTITY = (str, int)
AMOUNTS = {"cpu": QUANTITY, "memory": str, "nvidia.com/gpu": int}
RESOURCES = {"requests": AMOUNTS, "limits": AMOUNTS}
CONTAINER = {
    "name": str,
    "image": str,
    "envFrom": [{"secretRef": {"name": str}}],
    "ports": [{"name": str, "containerPort": int}],
    "resources": RESOURCES,
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "allowPrivilegeEscalation": bool},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "tolerations": [{"key": str, "operator": {"Exists", "Equal"}, "effect": {"NoSchedule"}}],
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": str,
            "emptyDir": {"medium": {"Memory"}, "sizeLimit": str},
            "configMap": {"name": str, "optional": bool},
        }
    ],
}
GROUP = {"rayStartParams": dict, "template": {"spec": POD}}
FIELDS = {
    "apiVersion": {"ray.io/v1"},
    "kind": {"RayJob"},
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": {"disabled", "token"}},
            "enableInTreeAutoscaling": bool,
            "autoscalerOptions": {
                "version": {"v1", "v2"},
                "idleTimeoutSeconds": int,
                "resources": RESOURCES,
            },
            "headGroupSpec": GROUP,
            "workerGroupSpecs": [
                GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
            ],
        },
    },
}


def misfits(value, fields, path=""):
    """Where a document has fields that are not there, or values that do not fit."""
    if isinstance(fields, dict):
        if not isinstance(value, dict):
            return [f"{path}: not a table"]
        unknown = [f"{path}.{key}: unknown" for key in value if key not in fields]
        return unknown + [
            line
            for key in value
            if key in fields
            for line in misfits(value[key], fields[key], f"{path}.{key}")
        ]
    if isinstance(fields, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [line for at, entry in enumerate(value) for line in misfits(entry, fields[0], f"{path}[{at}]")]
    fits = value in fields if isinstance(fields, set) else isinstance(value, fields)
    return [] if fits and (fields is int) <= (type(value) is int) else [f"{path}: {value!r}"]


def gibibytes(quantity):
    return int(re.fullmatch(r"(\d+)Gi", quantity)[1])


def pod_problems(pod):
    """What Kubernetes would refuse, or Ray suffer from."""
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    names = [port["name"] for port in container["ports"]]
    memory = gibibytes(container["resources"]["limits"]["memory"])
    shared = gibibytes(volumes["shm"]["emptyDir"]["sizeLimit"]) if "shm" in volumes else 0
    checks = {
        "a mount without its volume": {mount["name"] for mount in container["volumeMounts"]} <= set(volumes),
        "the object store, 30% of the memory, does not fit into /dev/shm": 0.3 * memory <= shared < memory,
        "the name of a port is too long, or used twice": len(set(names)) == len(names)
        and all(len(name) <= 15 for name in names),
        "no port named metrics, which a PodMonitor selects": "metrics" in names,
        "requests are not limits": container["resources"]["requests"] == container["resources"]["limits"],
        "root": container["securityContext"]["runAsNonRoot"],
    }
    return [problem for problem, holds in checks.items() if not holds]


def problems(job):
    """Everything that is wrong with a RayJob, as far as this file uses it."""
    if found := misfits(job, FIELDS):
        return found
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    parameters = [value for group in groups for value in group["rayStartParams"].values()]
    checks = {
        "a name is no label": re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"]),
        "rayStartParams are texts": all(isinstance(value, str) for value in parameters),
        "token auth from Ray 2.52": Version(cluster["rayVersion"]) >= Version("2.52"),
        "replicas are not between their bounds": all(
            0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            for group in cluster["workerGroupSpecs"]
        ),
        "workers from none without an autoscaler": cluster["enableInTreeAutoscaling"],
        "nodes of several images": len({pod["containers"][0]["image"] for pod in pods}) == 1,
        "a negative limit": min(spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) >= 0,
    }
    return [problem for problem, holds in checks.items() if not holds] + [
        line for pod in pods for line in pod_problems(pod)
    ]


def test_the_job_is_sound():
    assert problems(JOB) == []


def test_it_is_what_the_readme_says():
    spec, cluster = JOB["spec"], JOB["spec"]["rayClusterSpec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == 0
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_its_command_is_one_of_lossray():
    """The options exist, and the overrides are settings of the study."""
    from lossray.study import load_study

    name, *arguments = shlex.split(JOB["spec"]["entrypoint"])
    assert name == "lossray"
    command = get_command(app)
    with command.make_context("lossray", list(arguments)) as context:
        run = command.get_command(context, "run").make_context("run", arguments[1:]).params
    assert run["address"] == "auto"
    assert run["out"].startswith("s3://")
    resources = load_study(run["study"], run["overrides"]).study.resources
    assert resources.train.gpus == resources.curvature.gpus == 0.5


MISTAKES = {
    "spec.backofLimit: unknown": lambda job: job["spec"].update(backofLimit=3),
    "spec.rayClusterSpec.autoscalerOptions.version: 2": lambda job: cluster_of(job)[
        "autoscalerOptions"
    ].update(version=2),
    "authOptions.mode: True": lambda job: cluster_of(job).update(authOptions={"mode": True}),
    "backoffLimit: '3'": lambda job: job["spec"].update(backoffLimit="3"),
    "shutdownAfterJobFinishes: 1": lambda job: job["spec"].update(shutdownAfterJobFinishes=1),
    "workerGroupSpecs: not a list": lambda job: cluster_of(job).update(workerGroupSpecs={}),
    "rayStartParams are texts": lambda job: cluster_of(job)["headGroupSpec"].update(
        rayStartParams={"num-cpus": 0}
    ),
    "token auth from Ray 2.52": lambda job: cluster_of(job).update(rayVersion="2.9.0"),
    "replicas are not between their bounds": lambda job: workers_of(job).update(maxReplicas=-1),
    "a mount without its volume": lambda job: workers_of(job)["template"]["spec"]["volumes"].pop(),
    "does not fit into /dev/shm": lambda job: workers_of(job)["template"]["spec"]["volumes"].pop(0),
    "no port named metrics": lambda job: container_of(job)["ports"][0].update(name="metric"),
    "the name of a port": lambda job: container_of(job)["ports"].append(
        {"name": "metrics", "containerPort": 1}
    ),
    "nodes of several images": lambda job: container_of(job).update(image="another"),
    "requests are not limits": lambda job: container_of(job)["resources"]["requests"].pop("nvidia.com/gpu"),
    "template.spec.container: unknown": lambda job: workers_of(job)["template"]["spec"].update(container=[]),
}


def cluster_of(job):
    return job["spec"]["rayClusterSpec"]


def workers_of(job):
    return cluster_of(job)["workerGroupSpecs"][0]


def container_of(job):
    return workers_of(job)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("problem", MISTAKES)
def test_mistakes_are_noticed(problem):
    job = copy.deepcopy(JOB)
    MISTAKES[problem](job)
    assert any(problem in line for line in problems(job)), problems(job)
