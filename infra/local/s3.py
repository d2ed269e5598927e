#!/usr/bin/env python3
"""A real S3 server on loopback, for tests: Ceph's RADOS gateway from Debian's packages.

    infra/local/s3.py start           start what does not run; installs packages first (as root)
    infra/local/s3.py status          say which of the three daemons run; exit code 1 if not all
    infra/local/s3.py env             print what a shell needs to reach it: eval "$(... env)"
    infra/local/s3.py kill-gateway    SIGKILL the gateway; start brings it back
    infra/local/s3.py stop            end the daemons and delete what they stored
    infra/local/s3.py run COMMAND     start, run a command that reaches it, stop

One monitor, one storage daemon on a sparse file, one gateway, and no systemd. Whatever they write
is under LDM_S3_DIR, and they listen on 127.0.0.1, LDM_S3_PORT and the one after it.
"""

import configparser
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

FOLDER = Path(os.environ.get("LDM_S3_DIR", Path(tempfile.gettempdir(), "ldm-s3")))
PORT = int(os.environ.get("LDM_S3_PORT", "9480"))
ENDPOINT = f"http://127.0.0.1:{PORT}"
PACKAGES = {  # by a program of theirs
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "radosgw": "radosgw",
    "ceph": "ceph-common",
}
MONITOR = f"v2:127.0.0.1:{PORT + 1}"
FSID = str(uuid.uuid5(uuid.NAMESPACE_URL, ENDPOINT))
KEY, SECRET = "ldm-test-key", "ldm-test-secret"
PATIENCE_S = 90
STARTED = {
    "monitor": ("ceph-mon", "-f", "-i", "a"),
    "storage": ("ceph-osd", "-f", "-i", "0"),
    "gateway": ("radosgw", "-f", "-n", "client.admin"),
}
REACHES = {
    "LDM_TEST_S3": ENDPOINT,
    "AWS_ENDPOINT_URL": ENDPOINT,
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
    # The gateway does not take bodies with a checksum behind them.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
}


def main(words: Sequence[str]) -> int:
    """Do what the command line says; returns the exit code."""
    os.environ["CEPH_CONF"] = str(FOLDER / "ceph.conf")
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command == "start":
        start()
    elif command == "stop":
        stop()
    elif command == "status":
        print(", ".join(f"{name} {'runs' if runs(name) else 'is down'}" for name in STARTED))
        return 0 if all(map(runs, STARTED)) else 1
    elif command == "env":
        print("\n".join(f"export {name}={value}" for name, value in REACHES.items()))
    elif command == "kill-gateway":
        os.kill(pid_of("gateway"), signal.SIGKILL)
    elif command == "run" and rest:
        return run(rest)
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


def start() -> None:
    """Start every daemon that does not run, and wait until the gateway answers."""
    install()
    if not (FOLDER / "made").exists():
        make_monitor()
    launch("monitor")
    wait("monitor", lambda: ceph("mon", "stat"))
    if not (FOLDER / "made").exists():
        make_storage()
    launch("storage")
    wait("storage", lambda: '"num_up_osds":1' in ceph("osd", "stat", "-f", "json"))
    if not (FOLDER / "made").exists():
        tool("radosgw-admin", "-n", "client.admin", "user", "create", "--uid=ldm",
             "--display-name=ldm", f"--access-key={KEY}", f"--secret={SECRET}")  # fmt: skip
        (FOLDER / "made").touch()
    launch("gateway")
    wait("gateway", answers)


def stop() -> None:
    """End the daemons, the gateway first, and delete their folder."""
    for name in reversed(STARTED):
        if runs(name):
            os.kill(pid_of(name), signal.SIGTERM)
            deadline = time.monotonic() + 15
            while runs(name) and time.monotonic() < deadline:
                time.sleep(0.1)
            if runs(name):
                os.kill(pid_of(name), signal.SIGKILL)
    shutil.rmtree(FOLDER, ignore_errors=True)


def run(command: Sequence[str]) -> int:
    """Run a command with the server, which ends with it."""
    try:
        began = time.monotonic()
        start()
        print(f"S3 at {ENDPOINT} after {time.monotonic() - began:.0f} s", flush=True)
        return subprocess.run(command, env=os.environ | REACHES, check=False).returncode
    finally:
        stop()


# The cluster: https://docs.ceph.com/en/pacific/install/manual-deployment/, without its systemd


def make_monitor() -> None:
    """Configuration, keys and the monitor's own store."""
    stop()  # what an attempt before this one left
    FOLDER.mkdir(parents=True)
    with (FOLDER / "ceph.conf").open("w") as file:
        configuration().write(file)
    rings = {
        "mon.": ("mon",),
        "client.admin": ("mon", "osd"),
        "osd.0": ("mon", "osd"),
    }
    for name, daemons in rings.items():
        caps = [word for each in daemons for word in ("--cap", each, "allow *")]
        create = () if (FOLDER / "keyring").exists() else ("--create-keyring",)
        tool("ceph-authtool", *create, str(FOLDER / "keyring"), "--gen-key", "-n", name, *caps)
    members, keys = str(FOLDER / "monmap"), str(FOLDER / "keyring")
    tool("monmaptool", "--create", "--fsid", FSID, "--addv", "a", f"[{MONITOR}]", members)
    tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", members, "--keyring", keys)


def make_storage() -> None:
    """The storage daemon's sparse file."""
    name = str(uuid.uuid4())
    (FOLDER / "osd").mkdir(exist_ok=True)
    ceph("osd", "new", name, "0")
    tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", name)


def configuration() -> configparser.ConfigParser:
    """The daemons' settings: everything in one folder, one copy of every object."""
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = {
        "fsid": FSID,
        "mon_host": MONITOR,
        "public_addr": "127.0.0.1",
        "cluster_addr": "127.0.0.1",
        "keyring": f"{FOLDER}/keyring",
        "run_dir": str(FOLDER),
        "crash_dir": str(FOLDER),
        "log_file": f"{FOLDER}/$name.log",
        "mon_cluster_log_file": f"{FOLDER}/cluster.log",
        "mon_data": f"{FOLDER}/mon",
        "osd_data": f"{FOLDER}/osd",
        "bluestore_block_size": str(20 * 2**30),
        "osd_pool_default_size": "1",
        "osd_pool_default_pg_num": "4",
        "osd_pool_default_pg_autoscale_mode": "off",
        "osd_crush_chooseleaf_type": "0",
        "mon_data_avail_crit": "1",  # per cent: a test's disk may be nearly full
        "auth_allow_insecure_global_id_reclaim": "false",
        "rgw_frontends": f"beast endpoint=127.0.0.1:{PORT}",
    }
    return config


def install() -> None:
    """Debian's packages, if a program is missing."""
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if missing:
        quiet = ("apt-get", "-qq", "-o", "Dpkg::Use-Pty=0")
        tool(*quiet, "update")
        tool(*quiet, "install", "-y", "--no-install-recommends", *missing)


# Processes


def launch(name: str) -> None:
    """Start a daemon that outlives this process."""
    if runs(name):
        return
    with (FOLDER / f"{name}.out").open("ab") as out:
        daemon = subprocess.Popen(
            STARTED[name], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    (FOLDER / f"{name}.pid").write_text(str(daemon.pid))


def pid_of(name: str) -> int:
    """The daemon's process id, 0 if it was never started."""
    try:
        return int((FOLDER / f"{name}.pid").read_text())
    except FileNotFoundError:
        return 0


def runs(name: str) -> bool:
    """Whether a daemon is there, a dead one that nobody has buried aside."""
    try:
        program, state = Path(f"/proc/{pid_of(name)}/stat").read_text().split("(")[1].split(")")
    except OSError:
        return False
    return program == STARTED[name][0] and not state.startswith(" Z")


def wait(name: str, ready: Callable[[], object]) -> None:
    """Wait until a daemon is ready; say what it said if it does not become so."""
    deadline = time.monotonic() + PATIENCE_S
    while not (runs(name) and ready()):
        if time.monotonic() > deadline or not runs(name):
            said = (FOLDER / f"{name}.out").read_text(errors="replace")[-2000:]
            raise SystemExit(f"the {name} does not start; see {FOLDER}:\n{said}")
        time.sleep(0.2)


def answers() -> bool:
    """Whether the gateway speaks HTTP."""
    try:
        build_opener(ProxyHandler({})).open(ENDPOINT, timeout=5).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True


def ceph(*words: str) -> str:
    """What the cluster answers; nothing if it does not within seconds."""
    command = ("ceph", "--connect-timeout", "5", *words)
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def tool(*words: str) -> None:
    """Run a program that is to succeed; its words are shown only if it does not."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
