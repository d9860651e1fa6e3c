"""Rates of requests and tokens, and the hard stops on requests and cost."""

from __future__ import annotations

_BURST_S = 1.0


class Rate:
    """Lets an amount through that never exceeds a limit in any minute.

    A second's worth may go at once. The steady rate is lower by as much, so that the two together
    keep the limit.

    Args:
      per_minute: the limit; None for none.
      now: seconds of a monotonic clock.
    """

    def __init__(self, per_minute: float | None, now: float) -> None:
        self._per_s = None if per_minute is None else per_minute / (60 + _BURST_S)
        self._most = max(1.0, _BURST_S * (self._per_s or 0))
        self._level, self._at = self._most, now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until the amount may go. One that exceeds a second's worth goes into debt."""
        if self._per_s is None:
            return 0.0
        self._level = min(self._most, self._level + (now - self._at) * self._per_s)
        self._at = now
        return max(0.0, min(amount, self._most) - self._level) / self._per_s

    def take(self, amount: float) -> None:
        """Counts an amount that goes; a negative one was counted too much before."""
        self._level -= amount


class Budget:
    """How many requests may still be sent, and for how much.

    Args:
      max_requests: most requests of the folder, over all runs and retries; None for no bound.
      max_cost: most that they may cost together, in the currency of the prices; None for no bound.
      requests, spent: what earlier runs sent and what it may have cost.
    """

    def __init__(
        self, max_requests: int | None, max_cost: float | None, *, requests: int, spent: float
    ) -> None:
        self._max_requests, self._max_cost = max_requests, max_cost
        self.requests, self.spent = requests, spent
        self._held = 0.0

    def stop(self, most_cost: float) -> str | None:
        """Why one more request, which costs at most this, must not be sent; None if it may."""
        if self._max_requests is not None and self.requests >= self._max_requests:
            return f"--max-requests {self._max_requests} is reached: {self.requests} were sent"
        # Sums of prices are not exact.
        if self._max_cost is not None and self.spent + self._held + most_cost > (
            self._max_cost * (1 + 1e-9)
        ):
            return (
                f"--max-cost {self._max_cost:g} is reached: {self.spent:.6g} is spent, "
                f"{self._held:.6g} is held for requests under way, and the next request could "
                f"cost {most_cost:.6g}"
            )
        return None

    def hold(self, most_cost: float) -> None:
        """Counts a request that is about to be sent."""
        self.requests += 1
        self._held += most_cost

    def settle(self, most_cost: float, cost: float) -> None:
        """Replaces what was held for a request by what it cost."""
        self._held -= most_cost
        self.spent += cost

    def take_back(self, most_cost: float) -> None:
        """Undoes ``hold`` for a request that was not sent after all."""
        self.requests -= 1
        self._held -= most_cost
