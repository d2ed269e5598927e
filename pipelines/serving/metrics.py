"""The endpoint's numbers, told twice: to Ray for the cluster's scrape, and to our own `/metrics`.

A user without a Prometheus on the cluster still sees them at the endpoint; there they cover the
ingress replica that answers.
"""

import functools

import prometheus_client as prometheus
from ray.serve import metrics as ray_metrics

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
PICTURES = (1, 2, 4, 8, 16, 32, 64)


class Meter:
    """Counts answers, times requests, and says in how large batches pictures were made."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._answers = _Counter(
            "ldm_requests",
            "Answers to generation requests, by HTTP status",
            "status",
            self.registry,
        )
        self._seconds = _Histogram(
            "ldm_request_seconds", "Time to answer with pictures", SECONDS, self.registry
        )
        self._queue = _Histogram(
            "ldm_queue_seconds", "Part of that time not spent sampling", SECONDS, self.registry
        )
        self._batch = _Histogram(
            "ldm_batch_size", "Pictures in the batch that made a picture", PICTURES, self.registry
        )
        self._open = _Gauge("ldm_requests_open", "Requests not answered yet", self.registry)

    def opened(self) -> None:
        """A generation request arrived."""
        self._open.add(1)

    def answered(self, status: int) -> None:
        """It was answered; 499 is a client that left before."""
        self._open.add(-1)
        self._answers.add(str(status))

    def drew(self, seconds: float, sampling_s: float, batch_sizes: list[int]) -> None:
        """It was answered with pictures."""
        self._seconds.observe(seconds)
        self._queue.observe(max(0.0, seconds - sampling_s))
        for size in batch_sizes:
            self._batch.observe(size)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)


@functools.cache
def meter() -> Meter:
    """This process's meter; made on first use, as Ray's metrics need a running replica."""
    return Meter()


class _Counter:
    def __init__(
        self, name: str, text: str, label: str, registry: prometheus.CollectorRegistry
    ) -> None:
        self._label = label
        self._ours = prometheus.Counter(name, text, (label,), registry=registry)
        self._rays = ray_metrics.Counter(name, description=text, tag_keys=(label,))

    def add(self, value: str) -> None:
        self._ours.labels(value).inc()
        self._rays.inc(tags={self._label: value})


class _Histogram:
    def __init__(
        self,
        name: str,
        text: str,
        buckets: tuple[float, ...],
        registry: prometheus.CollectorRegistry,
    ) -> None:
        self._ours = prometheus.Histogram(name, text, buckets=buckets, registry=registry)
        self._rays = ray_metrics.Histogram(name, description=text, boundaries=list(buckets))

    def observe(self, value: float) -> None:
        self._ours.observe(value)
        self._rays.observe(value)


class _Gauge:
    def __init__(self, name: str, text: str, registry: prometheus.CollectorRegistry) -> None:
        self._value = 0
        self._ours = prometheus.Gauge(name, text, registry=registry)
        self._rays = ray_metrics.Gauge(name, description=text)

    def add(self, change: int) -> None:
        self._value += change
        self._ours.set(self._value)
        self._rays.set(self._value)
