"""The fields of KubeRay 1.7's RayJob and RayCronJob that we write, as its definitions have them.

A field that is not here is an error, as for `kubectl apply`; so is a number written as text.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Label = Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=36)]
Quantity = Annotated[str, Field(pattern=r"^[0-9.]+([EPTGMk]i?|m)?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Label
    namespace: Label
    labels: dict[str, str] = {}


class Named(Strict):
    name: str


class SecretRef(Strict):
    secretRef: Named


class Mount(Strict):
    name: str
    mountPath: str


class Claim(Strict):
    claimName: str


class Volume(Strict):
    name: str
    persistentVolumeClaim: Claim


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Container(Strict):
    name: Label
    image: str
    resources: Resources
    envFrom: list[SecretRef] = []
    volumeMounts: list[Mount] = []


class Pod(Strict):
    containers: list[Container] = Field(min_length=1)
    serviceAccountName: str | None = None
    volumes: list[Volume] = []


class Template(Strict):
    spec: Pod


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(HeadGroup):
    groupName: Label
    replicas: int
    minReplicas: int
    maxReplicas: int


class RayClusterSpec(Strict):
    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    activeDeadlineSeconds: int | None = Field(None, ge=1)
    rayClusterSpec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayCronJobSpec(Strict):
    schedule: str
    timeZone: str = Field(min_length=1)
    jobTemplate: RayJobSpec


class RayCronJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCronJob"]
    metadata: Metadata
    spec: RayCronJobSpec
