"""What is counted of every call, under the names that dashboards know from go-grpc.

In one process, in memory; of several workers each keeps its numbers in a file, and whoever is asked
adds them up (prometheus-client's multiprocess mode, switched on by PROMETHEUS_MULTIPROC_DIR).
"""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

METHOD = ("grpc_type", "grpc_service", "grpc_method")
# Seconds: from one message found to a long wait for a lock.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

STARTED = Counter("grpc_server_started", "Calls that arrived.", METHOD)
HANDLED = Counter("grpc_server_handled", "Calls that ended, by status.", (*METHOD, "grpc_code"))
SECONDS = Histogram("grpc_server_handling_seconds", "How long calls took.", METHOD, buckets=BUCKETS)

WATCHES = Gauge("parley_watches", "Watches that are open.", multiprocess_mode="livesum")
DELIVERED = Counter("parley_events_delivered", "Events that watches were told of.")
HORIZON_AGE = Gauge(
    "parley_horizon_age_seconds",
    "For how long the oldest open writing transaction has held up the watches of more than one "
    "conversation.",
    multiprocess_mode="livemax",
)
CONNECTIONS = Gauge(
    "parley_database_connections_in_use",
    "Connections of the pool that are at work.",
    multiprocess_mode="livesum",
)
# As many as there were batches; their sum is that of the calls in them.
BATCH_ITEMS = Histogram(
    "parley_batch_items",
    "Calls that shared one statement or transaction.",
    ("batch",),
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)


class MethodMetrics:
    """The metrics of one method, looked up once."""

    def __init__(self, kind: str, name: str) -> None:
        """`kind` is unary, server_stream or bidi_stream; `name` is `package.Service/Method`."""
        service, _, method = name.rpartition("/")
        self._labels = (kind, service, method)
        self._started = STARTED.labels(*self._labels)
        self._seconds = SECONDS.labels(*self._labels)
        self._handled: dict[str, Counter] = {}

    def started(self) -> None:
        self._started.inc()

    def ended(self, code: str, seconds: float) -> None:
        handled = self._handled.get(code)
        if handled is None:
            handled = self._handled[code] = HANDLED.labels(*self._labels, code)
        handled.inc()
        self._seconds.observe(seconds)


def registry(folder: str | None = None) -> CollectorRegistry:
    """What to show: this process's numbers, or the sum of those that workers keep in `folder`."""
    if folder is None:
        return REGISTRY
    together = CollectorRegistry()
    MultiProcessCollector(together, path=folder)  # type: ignore[no-untyped-call]
    return together
