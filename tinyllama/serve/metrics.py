"""What Prometheus may ask: how much was asked and answered, and how long it took."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..machine.limits import used_memory
from .engine import Engine

SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)


class Metrics:
    """Figures of one server."""

    def __init__(self, engine: Engine, paths: Iterable[str]):
        self._registry, self._paths = CollectorRegistry(), frozenset(paths)
        about = {"registry": self._registry, "namespace": "tinyllama"}
        self._requests = Counter("requests", "Requests that were answered", ["path", "status"], **about)
        self._seconds = Histogram("request_seconds", "How long they took", ["path"], buckets=SECONDS, **about)
        self._tokens = Counter("tokens", "Tokens of prompts, and written ones", ["kind"], **about)
        gauges = {
            "running": ("Texts and other jobs that are being computed", lambda: engine.n_running),
            "waiting": ("Those that wait", lambda: max(0, engine.n_texts - engine.n_running)),
            "memory_bytes": ("Memory of the process", used_memory),
        }
        for name, (help, value) in gauges.items():
            Gauge(name, help, **about).set_function(value)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request has its answer."""
        path = path if path in self._paths else "other"
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def computed(self, n_prompt: int, n_written: int = 0) -> None:
        """So many tokens have gone through the model."""
        self._tokens.labels("prompt").inc(n_prompt)
        self._tokens.labels("written").inc(n_written)

    def page(self) -> bytes:
        """All figures, in Prometheus's format."""
        return generate_latest(self._registry)
