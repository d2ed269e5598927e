"""A scheduled stage as Kubernetes objects: plain functions from one validated object to dicts.

Two ways to keep a schedule on a cluster with the KubeRay operator:

- a `RayCronJob`, KubeRay's own (alpha in 1.7), which makes a RayJob whenever its time comes;
- where there is none, a Kubernetes `CronJob` whose container makes the RayJob with `kubectl`.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import yaml
from pydantic import Field

from pipelines.recipes.sections import Section

Manifest = dict[str, Any]

RAY_API = "ray.io/v1"
# KubeRay appends its own to a RayCronJob's name, and pods are named after the result.
LONGEST_NAME = 36
LINGER_S = 60  # that a cluster is kept after its job, which is stopped with it at the latest

Name = Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=LONGEST_NAME)]
OtherName = Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]

START = """\
set -eu
state=$(kubectl get rayjob "$1" --ignore-not-found \\
  -o jsonpath='{.metadata.name} {.status.jobDeploymentStatus}')
case "$state" in
  "") ;;
  *" Complete" | *" Failed" | *" ValidationFailed") kubectl delete rayjob "$1" ;;
  *) echo "skipped: the last run is not finished: $state"; exit 0 ;;
esac
kubectl create -f /manifest/rayjob.yaml
"""


class Disk(Section):
    """A disk that all pods share: a PersistentVolumeClaim and where it is mounted."""

    claim: OtherName
    path: str = Field(pattern="^/.")


class ClusterJob(Section):
    """A stage on a schedule, as a cluster needs to know it.

    Attributes:
        name: of the schedule and of what it makes.
        schedule, time_zone: when.
        entrypoint: the shell line to run.
        image: holds this package; of every Ray pod.
        ray_version: in the image.
        workers: Ray pods beside the head, which computes too.
        cpus, memory: of every pod.
        gpus: of every worker, or of the head if it is alone.
        deadline_s: after which a run is stopped.
        service_account: the pods' own, which may be what lets them read the bucket.
        env_from: a Secret whose entries become variables of every pod.
        disk: mounted in every pod.
        kubectl_image: runs `START`, so it has a shell too.
    """

    name: Name
    namespace: str = Field("default", pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    schedule: str
    time_zone: str
    entrypoint: str
    image: str = Field(min_length=1)
    ray_version: str
    workers: int = Field(ge=0)
    cpus: float = Field(ge=0.001)
    memory: str = Field(pattern="^[1-9][0-9]*([kMGTP]i?)?$")
    gpus: int = Field(ge=0)
    deadline_s: int | None = Field(None, ge=1)
    service_account: OtherName | None = None
    env_from: OtherName | None = None
    disk: Disk | None = None
    kubectl_image: str = Field("alpine/kubectl:1.36.0", min_length=1)


def ray_cron_job(job: ClusterJob) -> list[Manifest]:
    """The schedule as a RayCronJob."""
    spec = {
        "schedule": job.schedule,
        "timeZone": job.time_zone,
        "jobTemplate": _ray_job_spec(job),
    }
    return [_object(RAY_API, "RayCronJob", job, job.name, spec=spec)]


def kubernetes_cron_job(job: ClusterJob) -> list[Manifest]:
    """The schedule as a CronJob that makes a RayJob, with the account and rights it needs."""
    starter = _starter(job)
    rbac = "rbac.authorization.k8s.io"
    rights = {
        "apiGroups": ["ray.io"],
        "resources": ["rayjobs"],
        "verbs": ["create", "delete", "get", "list", "watch"],  # two of them to wait for a deletion
    }
    subject = {"kind": "ServiceAccount", "name": starter, "namespace": job.namespace}
    role = {"apiGroup": rbac, "kind": "Role", "name": starter}
    ray_job = _object(RAY_API, "RayJob", job, job.name, spec=_ray_job_spec(job))
    file = {"rayjob.yaml": _yaml([ray_job])}
    cron = {
        "schedule": job.schedule,
        "timeZone": job.time_zone,
        "concurrencyPolicy": "Forbid",
        "jobTemplate": {"spec": {"template": {"spec": _starter_pod(job)}}},
    }
    return [
        _object("v1", "ServiceAccount", job, starter),
        _object(f"{rbac}/v1", "Role", job, starter, rules=[rights]),
        _object(f"{rbac}/v1", "RoleBinding", job, starter, roleRef=role, subjects=[subject]),
        _object("v1", "ConfigMap", job, starter, data=file),
        _object("batch/v1", "CronJob", job, job.name, spec=cron),
    ]


def written(comment: str, objects: Iterable[Manifest]) -> str:
    """The objects as YAML under the comment."""
    return "".join(f"# {line}\n" for line in comment.splitlines()) + _yaml(objects)


def _object(api: str, kind: str, job: ClusterJob, name: str, **rest: Any) -> Manifest:
    metadata = {
        "name": name,
        "namespace": job.namespace,
        "labels": {"app.kubernetes.io/name": job.name},
    }
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}


def _ray_job_spec(job: ClusterJob) -> Manifest:
    deadline = {"activeDeadlineSeconds": job.deadline_s} if job.deadline_s else {}
    return {
        "entrypoint": job.entrypoint,
        # The other modes hand the line through a shell once more, which breaks quoted words.
        "submissionMode": "HTTPMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": LINGER_S,
        **deadline,
        "rayClusterSpec": _ray_cluster_spec(job),
    }


def _ray_cluster_spec(job: ClusterJob) -> Manifest:
    workers = {
        "groupName": "workers",
        "replicas": job.workers,
        "minReplicas": job.workers,
        "maxReplicas": job.workers,
        "rayStartParams": {},
        "template": {"spec": _ray_pod(job, "ray-worker", job.gpus)},
    }
    head = _ray_pod(job, "ray-head", 0 if job.workers else job.gpus)
    return {
        "rayVersion": job.ray_version,
        "headGroupSpec": {"rayStartParams": {}, "template": {"spec": head}},
        "workerGroupSpecs": [workers] if job.workers else [],
    }


def _ray_pod(job: ClusterJob, container: str, gpus: int) -> Manifest:
    """A pod of the Ray cluster; Ray counts what the container's limits say."""
    resources: Manifest = {"cpu": f"{job.cpus:g}", "memory": job.memory}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    content: Manifest = {
        "name": container,
        "image": job.image,
        "resources": {"requests": resources, "limits": resources},
    }
    pod: Manifest = {"containers": [content]}
    if job.env_from:
        content["envFrom"] = [{"secretRef": {"name": job.env_from}}]
    if job.disk:
        content["volumeMounts"] = [{"name": "shared", "mountPath": job.disk.path}]
        pod["volumes"] = [
            {"name": "shared", "persistentVolumeClaim": {"claimName": job.disk.claim}}
        ]
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
    return pod


def _starter(job: ClusterJob) -> str:
    """What the CronJob's own account, rights and manifest are called."""
    return f"{job.name}-start"


def _starter_pod(job: ClusterJob) -> Manifest:
    content = {
        "name": "start",
        "image": job.kubectl_image,
        "command": ["/bin/sh", "-c", START, "start", job.name],
        "volumeMounts": [{"name": "manifest", "mountPath": "/manifest"}],
    }
    return {
        "serviceAccountName": _starter(job),
        "restartPolicy": "OnFailure",  # again is harmless: it finds the RayJob it made
        "containers": [content],
        "volumes": [{"name": "manifest", "configMap": {"name": _starter(job)}}],
    }


class _Dumper(yaml.SafeDumper):
    """For people to read: no anchors, and text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def _yaml(objects: Iterable[Manifest]) -> str:
    return str(yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=1000))
