"""What Prometheus reads at /metrics: vLLM's names where the thing is the same, so that its dashboards carry over; ``criadero:`` else."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from criadero.serve.worker import Worker

_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """One server's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ["model_name"]

        def counter(name: str, about: str, labels: list[str] = model) -> Counter:
            return Counter(name, about, labels, registry=self.registry)

        def gauge(name: str, about: str, labels: list[str] = model) -> Gauge:
            return Gauge(name, about, labels, registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, about, model, buckets=buckets, registry=self.registry)

        self.running = gauge("vllm:num_requests_running", "answers that are being computed")
        self.waiting = gauge("vllm:num_requests_waiting", "answers that wait for a slot")
        self.cache = gauge("vllm:kv_cache_usage_perc", "share of the cache's pages in use, 0 to 1")
        self.preemptions = gauge(
            "vllm:num_preemptions_total", "answers that had to give their pages back and were computed again"
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "prompt tokens of finished requests")
        self.generation_tokens = counter("vllm:generation_tokens", "generated tokens of finished requests")
        self.success = counter("vllm:request_success", "finished answers by reason", ["model_name", "finished_reason"])
        self.cache_queries = counter("vllm:prefix_cache_queries", "prompt tokens looked up among those computed before")
        self.cache_hits = counter("vllm:prefix_cache_hits", "prompt tokens that were found there")
        self.first_token = histogram("vllm:time_to_first_token_seconds", "from arrival to the first token")
        self.between_tokens = histogram("vllm:inter_token_latency_seconds", "between two tokens of an answer")
        self.whole = histogram("vllm:e2e_request_latency_seconds", "from arrival to the end")
        self.queued = histogram("vllm:request_queue_time_seconds", "from arrival to the start")
        self.prompt_size = histogram("vllm:request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self.answer_size = histogram("vllm:request_generation_tokens", "generated tokens of a request", _TOKENS)
        self.refused = counter("criadero:requests_refused", "requests answered with 4xx or 5xx, by code", ["code"])
        self.gone = counter("criadero:client_disconnects", "clients that went away before their answer was whole")
        self.receipts_lost = counter("criadero:receipts_lost", "receipts that the database did not take", [])
        self.loaded = gauge("criadero:model_loaded", "1 when the model is in memory")
        self.speed = gauge("criadero:tokens_per_second", "of an answer, a moving average")
        self._speeds: dict[str, float] = {}

    def speed_of(self, model: str) -> float | None:
        """Tokens a second of one answer, a moving average; None before the first."""
        return self._speeds.get(model)

    def saw_speed(self, model: str, tokens: int, seconds: float) -> None:
        """An answer had ``tokens`` after its first, in ``seconds``."""
        if tokens >= 4 and seconds > 0:
            known = self._speeds.get(model, tokens / seconds)
            self._speeds[model] = known + 0.2 * (tokens / seconds - known)

    def text(self, workers: dict[str, Worker], names: list[str]) -> bytes:
        """The page, with gauges as they are now."""
        for name in names:
            self.loaded.labels(name).set(name in workers)
        for name, worker in workers.items():
            stats = worker.llm.engine.stats()
            self.running.labels(name).set(stats["running"])
            self.waiting.labels(name).set(stats["waiting"])
            self.cache.labels(name).set(stats["pages_used"] / max(1, stats["pages"]))
            self.preemptions.labels(name).set(stats["preemptions"])
        for name, speed in self._speeds.items():
            self.speed.labels(name).set(speed)
        return generate_latest(self.registry)
