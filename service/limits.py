"""How fast one caller may call, so that it takes nothing from the others."""

import time

from service.errors import ResourceExhausted

MAX_CALLERS = 10_000


class CallRate:
    """A token bucket for each caller, which holds one second's worth of calls.

    In this process alone: with N workers or replicas a caller gets up to N times as much.
    """

    def __init__(self, calls_per_second: float) -> None:
        """Zero: as fast as they like."""
        self._rate = calls_per_second
        # Of each caller: how many calls it has left, and when that was so.
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> None:
        """One call of this caller's; raises ResourceExhausted where none is left."""
        if not self._rate:
            return
        now = time.monotonic()
        size = max(self._rate, 1.0)
        left, at = self._buckets.get(caller, (size, now))
        left = min(size, left + (now - at) * self._rate)
        if left < 1:
            raise ResourceExhausted(
                "RATE_LIMITED", subject=f"calls of {caller}", retry_after=(1 - left) / self._rate
            )
        if len(self._buckets) >= MAX_CALLERS:
            self._buckets.clear()
        self._buckets[caller] = (left - 1, now)
