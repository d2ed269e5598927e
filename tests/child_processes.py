"""Processes of tests, forked from one that has imported torch and Delta and runs nothing.

A fork of the tests' own process would take over locks of threads that it lacks; a process from
scratch imports for seconds. What a test puts into the environment does not reach these.
"""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "ldm_core.backbones.mmdit",
        "ldm_core.latents.verify",
        "ldm_core.training.checkpoints",
        "ldm_core.training.parallel",
        "ldm_core.training.power_ema",
    ]
)
