"""The Ray Serve application: one ingress in front of autoscaled samplers.

serve run pipelines.serving.app:build_app model=/path/to/model
serve deploy config.yaml        # from `ldm serve RECIPE --dry-run`
"""

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from ldm_core.files import absolute
from ldm_core.generation import PictureGenerator
from pipelines.recipes.sections import ServeSection
from pipelines.serving.api import RETRY_AFTER_S
from pipelines.serving.ingress import Ingress
from pipelines.serving.sampler import Load, Sampler

IMPORT_PATH = "pipelines.serving.app:build_app"
APP_NAME = "ldm"
# The ingress only waits for samplers: its own limit must never be the one that holds requests back.
INGRESS_REQUESTS = 1000
SHUTDOWN_POLL_S = 0.2  # an idle replica stops this soon; a busy one finishes first


class ServeArgs(ServeSection):
    """Arguments of the application: the recipe's serve section and the model.

    Attributes:
        model: model directory, `s3://` URI, or `models:/name@alias`.
        name: the id clients see; None takes the last part of `model`, or its name in the registry.
    """

    model: str
    name: str | None = None

    @property
    def model_id(self) -> str:
        """What clients call the model."""
        if self.model.startswith("models:/"):
            return self.name or self.model.removeprefix("models:/")
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


def build_app(args: ServeArgs) -> serve.Application:
    """The application for a model; a registry alias is resolved here, once per deployment."""
    from pipelines.model_registry import resolve_model  # here: replicas need no MLflow

    found = absolute(resolve_model(args.model))
    return application(args.model_copy(update={"model": found, "name": args.model_id}))


def application(args: ServeArgs, load: Load = PictureGenerator.load) -> serve.Application:
    """The application around any `load(uri, device)` that returns a generator."""
    sampler = serve.deployment(**_sampler_options(args))(Sampler).bind(
        model=args.model,
        threads=args.workers.threads,
        device=args.workers.device,
        load=load,
    )
    return serve.deployment(**_ingress_options())(Ingress).bind(
        sampler,
        name=args.model_id,
        room=args.max_replicas * _held(args) + args.max_queued_pictures,
        max_pictures=args.max_pictures,
        max_steps=args.max_steps,
    )


def serve_config(args: ServeArgs) -> dict[str, Any]:
    """The same application as Serve's declarative config, for `serve deploy` and RayService."""
    location = args.model if args.model.startswith("models:/") else absolute(args.model)
    arguments = args.model_copy(update={"model": location, "name": args.model_id})
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": args.host, "port": args.port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": arguments.model_dump(mode="json", exclude={"host", "port"}),
                "deployments": [
                    {"name": "Ingress", **_ingress_options()},
                    {"name": "Sampler", **_sampler_options(args)},
                ],
            }
        ],
    }


def _held(args: ServeArgs) -> int:
    """Pictures a replica holds: a batch on the device and the next one waiting beside it."""
    return 2 * args.max_batch_size


def _sampler_options(args: ServeArgs) -> dict[str, Any]:
    scaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        # one even where zero is allowed: a model that does not load fails the deployment at once
        initial_replicas=max(1, args.min_replicas),
        max_replicas=args.max_replicas,
        target_ongoing_requests=args.target_ongoing_requests,
    )
    return {
        "autoscaling_config": scaling.model_dump(mode="json", exclude_unset=True),
        "max_ongoing_requests": max(_held(args), args.target_ongoing_requests),
        "graceful_shutdown_wait_loop_s": SHUTDOWN_POLL_S,
        "user_config": {"max_batch_size": args.max_batch_size, "batch_wait_s": args.batch_wait_s},
        "ray_actor_options": {"num_cpus": args.workers.cpus, "num_gpus": args.workers.gpus},
    }


def _ingress_options() -> dict[str, Any]:
    return {
        "max_ongoing_requests": INGRESS_REQUESTS,
        "max_queued_requests": INGRESS_REQUESTS,
        "backpressure_config": BackpressureConfig(
            status_code=429, retry_after_s=RETRY_AFTER_S
        ).model_dump(),
        "graceful_shutdown_wait_loop_s": SHUTDOWN_POLL_S,
        "ray_actor_options": {"num_cpus": 0},  # it waits; the CPUs are the samplers'
    }
