"""Keeps the libraries' own chatter off the user's screen, unless it is asked for."""

import logging
import os
import warnings

# Read when the libraries are imported, here and in Ray's workers, which inherit them. Not among
# them RAY_BACKEND_LOG_LEVEL, as Ray says on stderr that it was set.
VARIABLES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    # Serve ends by killing the actor that it waits for, Data those of an interrupted run, which Ray
    # tells as failures; that a worker has died it tells in a line of its own
    "RAY_DEDUP_LOGS_SKIP_REGEX": (
        "ServeController.graceful_shutdown failed|There are infinite retries remaining"
    ),
    "GRPC_VERBOSITY": "NONE",
    "PYTHONWARNINGS": "ignore",
}


def quiet() -> None:
    """Silence transformers, diffusers, MLflow, Ray and warnings; call it before their import.

    Variables the user has set stay as they are.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    logging.disable(logging.INFO)  # MLflow and alembic set up their loggers anew when imported
    warnings.simplefilter("ignore")
