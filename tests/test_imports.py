import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

IMPORT_ALL = """
import importlib, json, pkgutil, sys

absent = ("ray", "mlflow", "typer", "rich", "fastapi", "pipelines")
sys.modules.update(dict.fromkeys(absent))  # as if they were not installed
import ldm_core
names = [m.name for m in pkgutil.walk_packages(ldm_core.__path__, "ldm_core.")]
for name in names:
    importlib.import_module(name)
for name in absent:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} could have been imported")
print(json.dumps(names))
"""


def test_ldm_core_needs_neither_ray_nor_mlflow_nor_the_pipelines(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules = [path for path in (ROOT / "ldm_core").rglob("*.py") if path.name != "__init__.py"]
    assert len(modules) > 30
    expected = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules}
    assert expected <= set(json.loads(done.stdout.splitlines()[-1]))
