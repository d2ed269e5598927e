"""The encode job as a command of its own, and the CPU time of all that it starts."""

import resource
import subprocess
import sys
import threading
import time
from collections import Counter

import psutil

from pipelines.recipes.schema import Recipe


def run_job(recipe: Recipe) -> tuple[float, float]:
    """Wall-clock seconds of the command, CPU seconds of it and everything it starts."""
    script = (
        "import sys; from pipelines.encode_latents import encode; "
        "from pipelines.recipes.schema import Recipe; from pipelines.stage import Options; "
        "encode(Recipe.model_validate_json(sys.argv[1]), Options())"
    )
    start, used, names, done = time.perf_counter(), {}, {}, threading.Event()
    before = _buried()
    job = subprocess.Popen([sys.executable, "-c", script, recipe.model_dump_json()])

    def watch() -> None:
        root = psutil.Process(job.pid)
        while not done.wait(0.1):
            for process in [root, *_children(root)]:
                used[process.pid] = max(used.get(process.pid, 0.0), _cpu(process))
                names[process.pid] = _name(process, job.pid) or names.get(process.pid, "")

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = job.wait()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    assert code == 0, f"the job ended with {code}"
    by_name: Counter[str] = Counter()
    for pid, cpu in used.items():
        by_name[names[pid]] += cpu
    told = ", ".join(f"{name} {cpu:.0f}" for name, cpu in by_name.most_common())
    print(f"CPU seconds of the job's processes: {told}", flush=True)
    # what the watcher saw last lacks a process's last moments; what the kernel counts lacks those
    # that outlive their parents, as Ray's do
    return seconds, max(sum(used.values()), _buried() - before)


def _buried() -> float:
    """CPU seconds of this process's children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def _name(process: psutil.Process, driver: int) -> str:
    """What a process is for; a worker is told by what it did last."""
    if process.pid == driver:
        return "the command"
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    kinds = {"guarded_child": "decoding", "MapWorker": "encoding", "ray::IDLE": "idle workers"}
    return next((kind for part, kind in kinds.items() if part in " ".join(words)), "Ray's own")


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
        return times.user + times.system
    except psutil.Error:
        return 0.0
