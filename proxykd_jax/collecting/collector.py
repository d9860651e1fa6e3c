"""The loop that sends requests, and sorts what comes back.

One thread decides, and alone touches the disk. Each round of its loop takes the replies that are
there, chooses what is sent next, makes both durable at once, and only then hands the chosen
requests to the threads that talk to the server. So every attempt is on disk before it is sent.
As many attempts wait ready as replies come while the disk works, so that no thread idles.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

from proxykd_jax import peers
from proxykd_jax.collecting.askers import Askers, Task
from proxykd_jax.collecting.exchange import ExchangeError
from proxykd_jax.collecting.ledger import (
    ANSWERED,
    FAILED,
    GAVE_UP,
    PENDING,
    SENT,
    SET_ASIDE,
    Entry,
    Ledger,
)
from proxykd_jax.collecting.limits import Budget, Rate
from proxykd_jax.collecting.replies import Again, Answer, Hopeless, Refused, Verdict
from proxykd_jax.collecting.requests import Request, body_of, most_answer_tokens
from proxykd_jax.collecting.rows import answer_row, failed_row, unwanted
from proxykd_jax.config.price_file import Price
from proxykd_jax.config.schema import CollectConfig
from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.generation.server import clean_text
from proxykd_jax.texts.progress import Progress

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
# Refusals for lack of capacity that a request endures.
MOST_BUSY = 30
# So many requests that end without an answer, one after another, end the run.
FAILURES_IN_A_ROW = 10
_TICK_S = 0.2
_ROWS_A_ROUND = 1000
_FORGETS = 0.95
_USUAL_ANSWER_TOKENS = 256


class Collector:
    """Answers the requests of a config.

    Args:
      config: the section ``collect``.
      requests: ``read_requests``.
      ledger: the folder.
      budget: the hard stops.
      price: prices of the model; None if costs are not counted.
      secret: the server's key, or "".
      retry_failed: also ask again what the server refused for good.

    Attributes:
      seen: what this run met: requests by outcome, and ``known``, ``repeated``, ``waiting``.
    """

    def __init__(
        self,
        config: CollectConfig,
        requests: Iterator[Request],
        ledger: Ledger,
        budget: Budget,
        *,
        price: Price | None = None,
        secret: str = "",
        retry_failed: bool = False,
    ) -> None:
        self._config, self._requests, self._ledger = config, requests, ledger
        self._budget, self._price, self._secret = budget, price, secret
        self._retry_failed = retry_failed
        self.seen: Counter[str] = Counter()
        self._askers = Askers(config, secret)
        self._ahead = 0.0
        self._most_active = 4 * config.concurrency
        now = time.monotonic()
        self._request_rate = Rate(config.requests_per_minute, now)
        self._token_rate = Rate(config.tokens_per_minute, now)
        self._active: set[str] = set()
        self._under_way = 0
        self._chosen: list[Task] = []
        self._retries: list[tuple[float, int, Task]] = []
        self._numbers = itertools.count()
        self._put_back: Task | None = None
        self._read_all = False
        self._paused_until = self._wake = now
        self._failures_in_a_row = 0
        self._stop: BaseException | None = None
        self._interrupted = False
        self._served: set[str] = set()

    def run(self) -> None:
        """Works until every request has an end, or something stops the run.

        Raises:
          UserError: a limit is reached, the server would refuse every request, or too many fail.
          Stopped: the run was asked to stop; what was under way has been answered and kept.
        """
        with peers.saves_on_stop(), self._soft_interrupt(), self._askers, Progress() as progress:
            while not self._is_over():
                self._receive()
                self._choose()
                self._keep()
                for task in self._chosen:
                    self._askers.send(task)
                self._chosen.clear()
                self._show(progress)
        self._keep()
        if self._stop is not None:
            raise self._stop

    def _is_over(self) -> bool:
        if self._under_way:
            return False
        waits = self._put_back is not None or self._retries or not self._read_all
        return self._stop is not None or not waits

    def _keep(self) -> None:
        self._ledger.requests, self._ledger.spent = self._budget.requests, self._budget.spent
        self._ledger.sync()

    # --- choosing what is sent --------------------------------------------------------------------

    def _choose(self) -> None:
        now = time.monotonic()
        self._wake = now + _TICK_S
        if self._interrupted:
            self._end(KeyboardInterrupt())
        elif peers.stop_wanted():
            self._end(Stopped(peers.STOPPED))
        most = self._config.concurrency + min(int(self._ahead), self._config.concurrency)
        while self._stop is None and self._under_way < most:
            if now < self._paused_until:
                self._wake = min(self._wake, self._paused_until)
                return
            task = self._next(now)
            if task is None:
                return
            why = self._budget.stop(task.most_cost)
            wait_s = max(
                self._request_rate.wait_s(1, now), self._token_rate.wait_s(task.tokens, now)
            )
            if why is not None or wait_s > 0:
                self._put_back = task
                self._wake = min(self._wake, now + wait_s) if why is None else self._wake
                if why is not None and not self._under_way:  # else a reply may make room
                    self._end(UserError(
                        f"stopped: {why}. What has come is kept; the same command with a higher "
                        "limit continues."
                    ))  # fmt: skip
                return
            self._send(task)

    def _send(self, task: Task) -> None:
        self._budget.hold(task.most_cost)
        self._request_rate.take(1)
        self._token_rate.take(task.tokens)
        entry = task.entry
        task.entry = entry._replace(
            state=SENT, attempts=entry.attempts + 1, held=task.most_cost, run=self._ledger.run
        )
        self._ledger.put(task.request.key, task.entry)
        self._under_way += 1
        self._chosen.append(task)

    def _next(self, now: float) -> Task | None:
        if self._put_back is not None:
            task, self._put_back = self._put_back, None
            return task
        if self._retries and self._retries[0][0] <= now:
            return heapq.heappop(self._retries)[2]
        if self._retries:
            self._wake = min(self._wake, self._retries[0][0])
        if self._read_all or len(self._active) >= self._most_active:
            return None
        for _ in range(_ROWS_A_ROUND):
            try:
                request = next(self._requests, None)
            except UserError as error:  # a damaged file of prompts; what is under way is kept
                self._end(error)
                return None
            if request is None:
                self._read_all = True
                return None
            if request.key in self._active:
                self.seen["repeated"] += 1
                continue
            entry = self._ledger.lookup(request.key)
            if self._is_wanted(entry):
                self._active.add(request.key)
                return self._task(request, entry or Entry())
        self._wake = now
        return None

    def _is_wanted(self, entry: Entry | None) -> bool:
        if entry is not None and entry.run == self._ledger.run and entry.state != PENDING:
            self.seen["repeated"] += 1
            return False
        why_not = unwanted(entry, self._config, retry_failed=self._retry_failed)
        if why_not is not None:
            self.seen[why_not] += 1
        return why_not is None

    def _task(self, request: Request, entry: Entry) -> Task:
        most = most_answer_tokens(self._config.parameters)
        most_cost = 0.0
        if self._price is not None:
            most_cost = self._price.cost(request.most_prompt_tokens, most or 0)
        body = json.dumps(body_of(self._config, request)).encode()
        tokens = request.about_prompt_tokens + (most or _USUAL_ANSWER_TOKENS)
        return Task(request, entry, body, tokens, most_cost)

    # --- taking what comes back -------------------------------------------------------------------

    def _receive(self) -> None:
        wait_s = max(self._wake - time.monotonic(), 0.0)
        replies = self._askers.replies(min(wait_s, _TICK_S))
        for task, verdict in replies:
            self._take(task, verdict)
        self._ahead = max(2.0 * len(replies), _FORGETS * self._ahead)

    def _take(self, task: Task, verdict: Verdict | BaseException) -> None:
        self._under_way -= 1
        entry = task.entry
        if isinstance(verdict, ExchangeError):
            reason = clean_text(str(verdict), self._secret)
            self._settle(task, task.most_cost if verdict.sent else 0.0)
            self._try_again(task, reason, lost=entry.lost or verdict.sent)
        elif isinstance(verdict, BaseException):
            raise verdict
        elif isinstance(verdict, Answer):
            self._finish(task, verdict)
        elif isinstance(verdict, Hopeless):
            self._settle(task, 0.0)
            self._give_back(task, entry)
            reason = clean_text(verdict.reason, self._secret)
            self._end(UserError(
                f"{self._config.url} refuses: {reason}. Nothing more is sent; set it right, then "
                "run the same command again to continue."
            ))  # fmt: skip
        elif isinstance(verdict, Refused):
            self._settle(task, 0.0)
            self._fail(task, clean_text(verdict.reason, self._secret), final=True)
        else:
            self._settle(task, task.most_cost if verdict.status == 200 else 0.0)
            self._again(task, verdict)

    def _again(self, task: Task, verdict: Again) -> None:
        entry = task.entry
        # A complete reply to this idempotency key may be repeated for ever, so the next try has
        # another one. Not so if an attempt under this key may have been paid and has no reply.
        paid, server_error = verdict.status == 200, verdict.status >= 500
        if paid or (server_error and not entry.lost):
            task.entry = entry = entry._replace(turn=entry.turn + 1, lost=False)
        reason = clean_text(verdict.reason, self._secret)
        due = self._try_again(
            task, reason, lost=entry.lost, asked_s=verdict.wait_s, busy=verdict.busy
        )
        if verdict.status == 429:  # of the key, not of this request
            self._paused_until = max(self._paused_until, due)

    def _try_again(
        self,
        task: Task,
        reason: str,
        *,
        lost: bool,
        asked_s: float | None = None,
        busy: bool = False,
    ) -> float:
        """Puts the request back until a time, which is returned, or gives it up."""
        task.entry = task.entry._replace(lost=lost)
        task.reasons.append(reason)
        if busy:
            task.busy += 1
        else:
            task.tries += 1
        if task.tries > self._config.retries or task.busy > MOST_BUSY:
            self._fail(task, reason, final=False)
            return 0.0
        self._give_back(task, task.entry)
        if self._stop is not None:
            return 0.0
        self._active.add(task.request.key)
        count = task.tries + task.busy - 1
        wait_s = min(FIRST_WAIT_S * 2 ** min(count, 20), LONGEST_WAIT_S)
        wait_s *= random.uniform(0.75, 1.25)
        if asked_s is not None:  # spread a little, so that not all come back at once
            wait_s = asked_s + random.uniform(0, 0.1) * min(asked_s + FIRST_WAIT_S, 10.0)
        due = time.monotonic() + wait_s
        heapq.heappush(self._retries, (due, next(self._numbers), task))
        return due

    def _finish(self, task: Task, answer: Answer) -> None:
        cost = task.most_cost
        if answer.usage is not None and self._price is not None:
            cost = self._price.cost(
                answer.usage["prompt_tokens"], answer.usage["completion_tokens"]
            )
        cost = cost if answer.paid else 0.0
        self._settle(task, cost)
        if answer.usage is not None:
            self._token_rate.take(sum(answer.usage.values()) - task.tokens)
        kind = "answers" if answer.outcome == "answered" else "set_aside"
        state = ANSWERED if kind == "answers" else SET_ASIDE
        shown_cost = None if self._price is None else cost
        row = answer_row(
            self._config, task.request, answer, attempts=task.entry.attempts, cost=shown_cost
        )
        self._ledger.append(kind, row)
        self._ledger.put(task.request.key, task.entry._replace(state=state, held=0.0))
        self._active.discard(task.request.key)
        self.seen[answer.outcome] += 1
        self._failures_in_a_row = 0
        self._note_model(answer.served_model)

    def _note_model(self, served: str | None) -> None:
        if served is not None and served not in self._served and len(self._served) < 100:
            self._served.add(served)
            if not served.startswith(self._config.model):
                name = clean_text(served, self._secret)
                peers.say(f"collect: {self._config.model} is answered by {name}")

    def _fail(self, task: Task, reason: str, *, final: bool) -> None:
        request = task.request
        row = failed_row(
            request,
            reason,
            final=final,
            before=task.reasons[:-1],
            attempts=task.entry.attempts,
        )
        self._ledger.append("failed", row)
        state = FAILED if final else GAVE_UP
        self._ledger.put(request.key, task.entry._replace(state=state, held=0.0))
        self._active.discard(request.key)
        self.seen["refused by the server" if final else "gave up"] += 1
        if final and self._ledger.has_answers:  # so the parameters, which all share, are fine
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            self._end(UserError(
                f"{self._config.url}: {self._failures_in_a_row} requests in a row had no answer, "
                f"the last for this reason: {reason}. Check the server and the parameters, then "
                "run the same command again to continue."
            ))  # fmt: skip

    def _settle(self, task: Task, cost: float) -> None:
        self._budget.settle(task.most_cost, cost)

    def _give_back(self, task: Task, entry: Entry) -> None:
        """The request is to be sent again, in this run or in another."""
        task.entry = entry._replace(state=PENDING, held=0.0)
        self._ledger.put(task.request.key, task.entry)
        self._active.discard(task.request.key)

    # --- ending -----------------------------------------------------------------------------------

    def _end(self, error: BaseException) -> None:
        """Sends nothing more; what waits ready is taken back, what is under way is awaited."""
        if self._stop is not None:
            return
        self._stop = error
        for task in self._askers.recall():
            self._under_way -= 1
            self._budget.take_back(task.most_cost)
            self._give_back(task, task.entry._replace(attempts=task.entry.attempts - 1))
        if self._under_way:
            peers.say(f"collect: stopping; waits for {self._under_way} replies")

    @contextlib.contextmanager
    def _soft_interrupt(self) -> Iterator[None]:
        """While active, the first Ctrl-C waits for what is under way, and the second does not."""

        def on_interrupt(number: int, frame: FrameType | None) -> None:
            self._interrupted = True
            signal.signal(number, before)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: Any = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _show(self, progress: Progress) -> None:
        others = sum(
            self.seen[name] for name in ("empty", "cut", "filtered", "refused", "unusable")
        )
        failed = self.seen["gave up"] + self.seen["refused by the server"]
        spent = f", {self._budget.spent:.4g} spent" if self._price is not None else ""
        progress(f"answered; {others} set aside, {failed} failed{spent}", self.seen["answered"])
