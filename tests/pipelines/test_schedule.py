"""`ldm schedule`: the YAML a cluster gets, what its shells make of it, and mistakes."""

import json
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from command_line import assert_mistake
from kuberay_schema import RayCronJob, RayJob

from pipelines.cron import Cron

NIGHTLY = ("--cron", "0 3 * * *")
PLACES = ("--data", "s3://b/pictures", "--root", "s3://b/run")
ENCODE = ("schedule", "encode", "image-tiny")
WHOLE = (*ENCODE, *NIGHTLY, *PLACES, "--image", "registry/ldm:1")


def documents(ldm, *words):
    result = ldm(*WHOLE, "--dry-run", *words)
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(result.stdout))


def ray_cron_job(ldm, *words):
    (document,) = documents(ldm, *words)
    return RayCronJob.model_validate(document)


def ray_job_spec(found):
    """Of the RayJobs that the objects make, wherever it is kept."""
    files = [document["data"] for document in found if document["kind"] == "ConfigMap"]
    if not files:
        return found[0]["spec"]["jobTemplate"]
    job = yaml.safe_load(files[0]["rayjob.yaml"])
    RayJob.model_validate(job)
    return job["spec"]


def program(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)
    return file


def test_a_ray_cron_job_is_what_kuberay_takes(ldm):
    words = ("--workers", 3, "--cpus", 4, "--memory", "16Gi", "--gpus", 1, "--time-zone", "Japan")
    words += ("--service-account", "reader", "--env-from", "bucket", "--namespace", "pictures")
    cron = ray_cron_job(ldm, *words)
    assert (cron.metadata.name, cron.metadata.namespace) == ("ldm-encode-image-tiny", "pictures")
    assert (cron.spec.schedule, cron.spec.timeZone) == ("0 3 * * *", "Japan")
    job = cron.spec.jobTemplate
    assert job.shutdownAfterJobFinishes
    gone_after = job.activeDeadlineSeconds + job.ttlSecondsAfterFinished
    assert timedelta(hours=23) < timedelta(seconds=gone_after) < timedelta(days=1)
    (workers,) = job.rayClusterSpec.workerGroupSpecs
    assert (workers.replicas, workers.minReplicas, workers.maxReplicas) == (3, 3, 3)
    pods = [job.rayClusterSpec.headGroupSpec.template.spec, workers.template.spec]
    assert [pod.serviceAccountName for pod in pods] == ["reader"] * 2
    head, worker = (container for pod in pods for container in pod.containers)
    assert head.resources.limits == {"cpu": "4", "memory": "16Gi"}
    assert worker.resources.limits == {**head.resources.limits, "nvidia.com/gpu": "1"}
    for container in (head, worker):
        assert container.image == "registry/ldm:1"
        assert [source.secretRef.name for source in container.envFrom] == ["bucket"]


def test_the_cluster_is_as_large_as_the_recipe_asks(ldm):
    sets = ("--set", "encode.workers.count=5", "--set", "encode.workers.gpus=0.5")
    cluster = ray_cron_job(ldm, *sets).spec.jobTemplate.rayClusterSpec
    (workers,) = cluster.workerGroupSpecs
    assert workers.replicas == 5
    assert workers.template.spec.containers[0].resources.limits["nvidia.com/gpu"] == "1"
    alone = ray_cron_job(ldm, "--workers", 0, "--cpus", 8, "--gpus", 1, "--set",
                         "encode.workers.gpus=0.5")  # fmt: skip
    assert alone.spec.jobTemplate.rayClusterSpec.workerGroupSpecs == []
    (head,) = alone.spec.jobTemplate.rayClusterSpec.headGroupSpec.template.spec.containers
    assert head.resources.limits["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("kind", ["ray", "kubernetes"])
def test_a_shell_reads_the_entrypoint_as_the_command(ldm, tmp_path, kind):
    odd = 'model_name=it\'s "$HOME" `x` \\ & ; * ü {a} $(date)\n#end'
    found = documents(ldm, "--kind", kind, "--set", odd, "--verbose")
    entrypoint = ray_job_spec(found)["entrypoint"]
    program(
        tmp_path, "python", f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))"
    )
    run = subprocess.run(
        entrypoint, shell=True, env={"PATH": str(tmp_path)}, capture_output=True, check=True
    )
    expected = ["-m", "pipelines.cli", "encode", "image-tiny", *PLACES, "--set", odd, "--verbose"]
    assert json.loads(run.stdout)[1:] == expected
    assert shlex.split(entrypoint) == ["python", *expected]


@pytest.mark.parametrize("kind", ["ray", "kubernetes"])
def test_nothing_of_the_environment_is_written_down(ldm, monkeypatch, kind):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hush@mlflow")
    result = ldm(*WHOLE, "--dry-run", "--kind", kind, "--env-from", "bucket")
    assert result.exit_code == 0
    assert "hush" not in result.output
    assert "secretRef" in result.stdout


def test_places_on_a_disk_that_all_pods_share(ldm):
    words = ("--data", "/mnt/run/pictures", "--root", "/mnt/run", "--shared-disk", "run:/mnt/run")
    cron = ray_cron_job(ldm, *words, "--set", "text.t5=/mnt/run/t5")
    job = cron.spec.jobTemplate
    (workers,) = job.rayClusterSpec.workerGroupSpecs
    for pod in (job.rayClusterSpec.headGroupSpec.template.spec, workers.template.spec):
        assert [volume.persistentVolumeClaim.claimName for volume in pod.volumes] == ["run"]
        assert [mount.mountPath for mount in pod.containers[0].volumeMounts] == ["/mnt/run"]
    assert "--data /mnt/run/pictures --root /mnt/run" in job.entrypoint
    assert_mistake(ldm(*WHOLE, *words, "--data", "/mnt/other"), "data", "/mnt/other", "/mnt/run")


def test_a_cron_job_with_the_rights_to_start_a_ray_job(ldm):
    found = documents(ldm, "--kind", "kubernetes", "--cron", "* * * * *", "--name", "nightly")
    kinds = ["ServiceAccount", "Role", "RoleBinding", "ConfigMap", "CronJob"]
    assert [document["kind"] for document in found] == kinds
    account, role, binding, _, cron = found
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    assert (subject["name"], subject["namespace"]) == (account["metadata"]["name"], "default")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["timeZone"] == "UTC"
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert "activeDeadlineSeconds" not in ray_job_spec(found)


@pytest.mark.parametrize(
    ("state", "verbs"),
    [
        ("", "get create"),
        ("nightly Complete", "get delete create"),
        ("nightly Failed", "get delete create"),
        ("nightly Running", "get"),
        ("nightly Retrying", "get"),
        ("nightly ", "get"),  # just made: the operator has not seen it
    ],
)
def test_the_starter_skips_while_the_last_run_is_not_finished(ldm, tmp_path, state, verbs):
    *_, cron = documents(ldm, "--kind", "kubernetes", "--name", "nightly")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    says = f"[ $1 != get ] || printf '%s' '{state}'"
    program(tmp_path, "kubectl", f'#!/bin/sh\necho "$1 $2 $3" >> calls\n{says}\n')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(
        container["command"], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    objects = {"get": "rayjob nightly", "delete": "rayjob nightly"}
    objects["create"] = "-f /manifest/rayjob.yaml"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"{verb} {objects[verb]}" for verb in verbs.split()]
    assert run.stdout.startswith(b"skipped") == (verbs == "get")


def test_it_is_applied_with_kubectl(ldm, tmp_path, monkeypatch):
    text = ldm(*WHOLE, "--dry-run").stdout
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "kubectl", '#!/bin/sh\necho "$@"\ncat > got\n')
    result = ldm(*WHOLE)
    assert (result.exit_code, result.stdout) == (0, "apply -f -\n")
    assert (tmp_path / "got").read_text() == text
    program(tmp_path, "kubectl", "#!/bin/sh\ncat >/dev/null\necho no\necho matches >&2\nexit 1\n")
    assert_mistake(ldm(*WHOLE), "kubectl apply: matches", "--kind kubernetes")
    monkeypatch.setenv("PATH", "")
    assert_mistake(ldm(*WHOLE), "no kubectl", "--dry-run")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--cron", "0 3 * *"), ("'0 3 * *' has 4 fields", "minute, hour, day, month, weekday")),
        (("--cron", "@daily"), ("'@daily'", "'0 3 * * *'")),
        (("--cron", "61 3 * * *"), ("minute '61'", "0-59")),
        (("--cron", "0 3-1 * * *"), ("hour '3-1'", "0-23")),
        (("--cron", "0 3 L * *"), ("day 'L'", "1-31")),
        (("--cron", "0 3 * MAI *"), ("month 'MAI'", "1-12")),
        (("--cron", "0 3 * * 7"), ("weekday '7'", "0 is Sunday")),
        (("--cron", "0 3 * * MON#1"), ("weekday 'MON#1'",)),
        (("--cron", "0 3 */2 * 1"), ("day '*/2'", "weekday '1'")),
        (("--cron", "0 3 30 2 *"), ("'0 3 30 2 *' never comes round",)),
        (("--cron", "*/5 * * * *"), ("300 s", "--kind kubernetes")),
        (("--time-zone", "Mars/Base"), ("'Mars/Base'", "Europe/Berlin")),
        (("--time-zone", "Europe"), ("'Europe'", "Europe/Berlin")),
        (("--data", "pictures"), ("data: ", "/pictures", "s3://", "--shared-disk")),
        (("--root", "/run"), ("root: /run", "s3://")),
        (("--set", "text.clip=clip"), ("text.clip: ", "/clip")),
        (("--set", "train.stesp=3"), ("train.steps?",)),
        (("--set", "tracking_uri=https://me:pw@m"), ("https://***@m", "--env-from")),
        (("--shared-disk", "claim"), ("--shared-disk claim", "CLAIM:PATH")),
        (("--name", "My Job"), ("name is 'My Job'",)),
        (("--name", "a" * 37), ("name is 'aaa", "36")),
        (("--memory", "lots"), ("memory is 'lots'",)),
        (("--workers", "-1"), ("workers is -1",)),
        (("--set", "encode.workers.count=9", "--workers", "2"), ("9 CPUs", "has 3", "--cpus")),
        (("--set", "encode.workers.gpus=1", "--gpus", "0"), ("2 GPUs", "has 0", "--gpus")),
        (("--runs", "2"), ("--runs 2", "--kind local")),
        (("--kind", "crontab"), ("crontab", "kubernetes")),
    ],
)
def test_a_mistake_is_one_line(ldm, words, named):
    result = ldm(*WHOLE, "--dry-run", *words)
    assert_mistake(result, *named)
    assert "pw" not in result.stderr


def test_what_is_missing_is_said(ldm):
    assert_mistake(ldm(*ENCODE, *NIGHTLY, *PLACES), "--image")
    assert_mistake(ldm(*ENCODE, *PLACES), "--cron")
    assert_mistake(ldm("schedule", "demo", *NIGHTLY), "demo", "encode")


def test_a_night_of_the_clock_change_is_the_shortest():
    start = datetime(2026, 1, 1, tzinfo=UTC)
    berlin = Cron("0 3 * * *", "Europe/Berlin")
    first = next(berlin.times(start))
    assert first.astimezone(UTC) == datetime(2026, 1, 1, 2, tzinfo=UTC)
    assert berlin.shortest_gap(start) == timedelta(hours=23)
    assert Cron("0 3 * * *").shortest_gap(start) == timedelta(days=1)
    assert Cron("0 1,3 * * *", "Europe/Berlin").shortest_gap(start) == timedelta(hours=1)
    assert Cron("*/15 9-17 * jan mon-fri").shortest_gap(start) == timedelta(minutes=15)
