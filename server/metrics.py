"""Everything `/metrics` shows. Every name begins with `prefixserve_`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from server.engine.protocol import EngineStats, StepStats

NAMESPACE = "prefixserve"
BASE_LABEL = "base"
OTHER_LABEL = "other"

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_GAP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
BATCH = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)


class BoundedLabels:
    """The value of a label such as `task`, bounded: the first so many names, the rest `other`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._named: set[str] = set()

    def known(self, name: str | None) -> str:
        """The label of what exists; None is the bare base model."""
        if name is None:
            return BASE_LABEL
        if name not in self._named and len(self._named) < self._most:
            self._named.add(name)
        return self.unchecked(name)

    def unchecked(self, name: str | None) -> str:
        """The label of what may not exist; it never takes up a new one."""
        if name is None:
            return BASE_LABEL
        return name if name in self._named else OTHER_LABEL


class Collectors:
    """Makes collectors on a registry of their own, under one prefix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(
            name, text, labels, buckets=buckets, namespace=NAMESPACE, registry=self.registry
        )


class PrefixCacheMetrics:
    """What the tiers of the prefix cache do."""

    def __init__(self, make: Collectors) -> None:
        tier = "tier"
        self.hits = make.counter("prefix_cache_hits", "Uses of a prefix that was there", tier)
        self.misses = make.counter("prefix_cache_misses", "Uses that waited for a load", tier)
        self.evictions = make.counter(
            "prefix_cache_evictions", "Prefixes dropped to make room", tier
        )
        self.bytes = make.gauge("prefix_cache_bytes", "Memory of prefixes", tier)
        self.pinned_bytes = make.gauge("prefix_cache_pinned_bytes", "Memory that is pinned", tier)
        self.max_bytes = make.gauge("prefix_cache_max_bytes", "Memory they may take", tier)
        self.prefixes = make.gauge("prefix_cache_prefixes", "Prefixes there or loading", tier)
        self.waiting = make.gauge("prefix_cache_waiting", "Prefixes that wait for room", tier)
        self.load_seconds = make.histogram(
            "prefix_load_seconds", "Bringing a prefix to a tier", LATENCY, tier
        )


class TierMetrics:
    """A `CacheObserver` that counts for one tier."""

    def __init__(self, metrics: PrefixCacheMetrics, tier: str, max_bytes: int) -> None:
        self._hits = metrics.hits.labels(tier)
        self._misses = metrics.misses.labels(tier)
        self._evictions = metrics.evictions.labels(tier)
        self._bytes = metrics.bytes.labels(tier)
        self._pinned_bytes = metrics.pinned_bytes.labels(tier)
        self._prefixes = metrics.prefixes.labels(tier)
        self._waiting = metrics.waiting.labels(tier)
        self._load_seconds = metrics.load_seconds.labels(tier)
        metrics.max_bytes.labels(tier).set(max_bytes)

    def hit(self) -> None:
        """See `CacheObserver.hit`."""
        self._hits.inc()

    def miss(self) -> None:
        """See `CacheObserver.miss`."""
        self._misses.inc()

    def eviction(self) -> None:
        """See `CacheObserver.eviction`."""
        self._evictions.inc()

    def loaded(self, seconds: float) -> None:
        """See `CacheObserver.loaded`."""
        self._load_seconds.observe(seconds)

    def occupied(self, nbytes: int, pinned: int, prefixes: int, waiting: int) -> None:
        """See `CacheObserver.occupied`."""
        self._bytes.set(nbytes)
        self._pinned_bytes.set(pinned)
        self._prefixes.set(prefixes)
        self._waiting.set(waiting)


class SplitMetrics:
    """What compares the versions of split tasks; bounded as `BoundedLabels` is."""

    def __init__(self, collectors: Collectors, max_versions: int) -> None:
        self._max_versions = max_versions
        self._named: set[tuple[str, str]] = set()
        labels = ("task", "version")
        self._requests = collectors.counter(
            "split_requests", "Sequences started for a split task", *labels
        )
        self._tokens = collectors.counter(
            "split_generated_tokens", "Tokens generated for a split task", *labels
        )
        self._seconds = collectors.histogram(
            "split_request_seconds", "As request_seconds, for a split task", LATENCY, *labels
        )

    def started(self, task_id: str, version: str) -> SplitSequence:
        """Count a sequence, and get what counts the rest of it."""
        labels = (task_id, version)
        if len(self._named) < self._max_versions:
            self._named.add(labels)
        if labels not in self._named:
            labels = (OTHER_LABEL, OTHER_LABEL)
        self._requests.labels(*labels).inc()
        return SplitSequence(self._tokens.labels(*labels), self._seconds.labels(*labels))


@dataclass(frozen=True, slots=True)
class SplitSequence:
    """Where one sequence of a split task is counted."""

    tokens: Counter
    seconds: Histogram


class Metrics:
    """Everything that is measured. `observe_step` is a `StepObserver`."""

    def __init__(self, max_tasks: int = 100) -> None:
        make = self._collectors = Collectors()
        ProcessCollector(namespace=NAMESPACE, registry=make.registry)
        self.tasks = BoundedLabels(max_tasks)
        self.tenants = BoundedLabels(max_tasks)
        self._prefix_cache = PrefixCacheMetrics(make)
        self.prefix_compute_seconds = make.histogram(
            "prefix_compute_seconds", "Computing a prefix from text", LATENCY
        )
        self.build = Info("build", "What runs", namespace=NAMESPACE, registry=make.registry)
        self.requests = make.counter(
            "requests",
            "Requests by task and HTTP status, 499 when the client went",
            "task",
            "status",
        )
        self.refused_keys = make.counter("refused_keys", "Requests without an API key that is good")
        self.prompt_tokens = make.counter(
            "prompt_tokens", "Tokens of prompts, each as often as clients were told", "task"
        )
        self.generated_tokens = make.counter("generated_tokens", "Tokens generated", "task")
        self.splits = SplitMetrics(make, max_tasks)
        self.tenant_tokens = make.counter(
            "tenant_tokens", "Tokens that tenants were told of", "tenant", "kind"
        )
        self.store_connected = make.gauge(
            "store_connected", "1 while the prefix store answers, 0 while it is away"
        )
        self.store_errors = make.counter("store_errors", "Calls the prefix store did not answer")
        self.queue_seconds = make.histogram("queue_seconds", "Wait for a slot", LATENCY, "tenant")
        self.ttft_seconds = make.histogram(
            "time_to_first_token_seconds", "From the request to its first token", LATENCY
        )
        self.itl_seconds = make.histogram(
            "inter_token_seconds",
            "Between two tokens of a sequence, as delivered; without those of beam search",
            TOKEN_GAP,
        )
        self.e2e_seconds = make.histogram(
            "request_seconds", "From the request to its last token", LATENCY
        )
        self._batch_size = make.histogram(
            "batch_size", "Sequences that got a token in one step", BATCH
        )
        self._preempted = make.counter(
            "preempted", "Sequences that lost their slot to a tenant below its share"
        )
        self._step_seconds = make.histogram("step_seconds", "One step of the engine", TOKEN_GAP)

    def prefix_tier(self, tier: str, max_bytes: int) -> TierMetrics:
        """What observes one tier of the prefix cache."""
        return TierMetrics(self._prefix_cache, tier, max_bytes)

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Read the requests off the engine at each scrape."""
        gauge = self._collectors.gauge
        gauge("running_requests", "Sequences in a slot").set_function(lambda: stats().running)
        gauge("waiting_requests", "Sequences without one").set_function(lambda: stats().waiting)
        gauge("slots", "Sequences that can run at once").set_function(lambda: stats().max_slots)

    def observe_step(self, step: StepStats) -> None:
        """Count one step; called on the engine's thread."""
        self._step_seconds.observe(step.seconds)
        self._preempted.inc(step.preempted)
        if step.decode_rows:
            self._batch_size.observe(step.decode_rows)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._collectors.registry)
