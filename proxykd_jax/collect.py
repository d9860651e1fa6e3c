"""Asks a teacher behind an OpenAI-compatible API, and writes its answers as a corpus.

    proxykd collect --config run.yaml --estimate
    proxykd collect --config run.yaml --max-cost 20

It reads the section ``collect`` alone; docs/collecting.md describes files, retries and limits.
After a kill the same command continues: what is answered is not asked again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxykd_jax.cli import base_parser, run_work
from proxykd_jax.config import ConfigLike, as_collect, load_collect
from proxykd_jax.config.price_file import Price, load_price
from proxykd_jax.config.schema import CollectConfig
from proxykd_jax.errors import UserError
from proxykd_jax.peers import say

if TYPE_CHECKING:
    from proxykd_jax.collecting.batch import Form
    from proxykd_jax.collecting.ledger import Ledger

SUMMARY = "Ask a teacher behind an OpenAI-compatible API, and write its answers as a corpus."


@dataclass(frozen=True)
class CollectResult:
    """What a run left.

    Attributes:
      answers: the file for ``corpus.sources``.
      seen: requests of this run by what became of them.
      requests, spent: sums over all runs of the folder.
    """

    answers: Path
    seen: Mapping[str, int]
    requests: int
    spent: float


def main(
    config: CollectConfig | ConfigLike,
    *,
    max_requests: int | None = None,
    max_cost: float | None = None,
    retry_failed: bool = False,
) -> CollectResult:
    """Collects every answer that is not there yet.

    Args:
      config: the section ``collect``, or what has it, see ``as_collect``.
      max_requests: most requests to send, over all runs of the folder, retries included.
      max_cost: most that they may cost together, in the currency of the prices.
      retry_failed: ask again what the server refused for good.

    Raises:
      UserError: a limit is reached, prompts or folder are damaged, the server would refuse every
        request, or requests remain that failed in ways that may pass.
      Stopped: the run was asked to stop, and everything that came is kept.
    """
    config = as_collect(config)
    from proxykd_jax.collecting.collector import Collector
    from proxykd_jax.collecting.ledger import FILES
    from proxykd_jax.collecting.limits import Budget
    from proxykd_jax.collecting.requests import read_requests
    from proxykd_jax.generation.server import read_key
    from proxykd_jax.texts.records import Drops

    secret = read_key(config.api_key_env, "collect")
    price = _checked_price(config, max_cost)
    drops = Drops()
    ledger = open_ledger(config, secret)
    try:
        if ledger.in_doubt:
            then = {
                "resend": "they are sent again with the same Idempotency-Key",
                "hold": "they are left, because of collect.in_doubt: hold",
            }[config.in_doubt]
            say(
                f"collect: {ledger.in_doubt} requests were under way when the last run was killed "
                f"and may have been paid; {then}. Their ids are in "
                f"{ledger.folder / 'in_doubt.log'}"
            )
        budget = Budget(max_requests, max_cost, requests=ledger.requests, spent=ledger.spent)
        collector = Collector(
            config,
            read_requests(config, drops),
            ledger,
            budget,
            price=price,
            secret=secret,
            retry_failed=retry_failed,
        )
        try:
            collector.run()
        finally:
            _tell(collector.seen, budget.requests, budget.spent, price)
        if drops.total:
            say(f"collect: prompts left out: {drops}")
        if gave_up := collector.seen["gave up"]:
            raise UserError(
                f"{gave_up} requests failed in ways that may pass; "
                f"{ledger.folder / FILES['failed']} gives the reasons. Run the same command again "
                "to try them again."
            )
        return CollectResult(
            ledger.folder / FILES["answers"], dict(collector.seen), budget.requests, budget.spent
        )
    finally:
        ledger.close()


def write_batch(
    config: CollectConfig,
    path: Path,
    form: Form,
    *,
    max_requests: int | None = None,
    max_cost: float | None = None,
) -> list[Path]:
    """Writes what is not answered yet for a batch service; see ``collecting.batch``.

    Args:
      config, max_requests, max_cost: as in ``main``; a limit makes the file shorter.
      path: the file, or the first of several.
      form: whose form.

    Returns:
      The files.

    Raises:
      UserError: nothing is left to ask, a file exists, or the form cannot say what is asked.
    """
    from proxykd_jax.collecting import batch
    from proxykd_jax.collecting.limits import Budget
    from proxykd_jax.collecting.requests import read_requests
    from proxykd_jax.texts.records import Drops

    price, drops = _checked_price(config, max_cost), Drops()
    ledger = open_ledger(config)
    try:
        budget = Budget(max_requests, max_cost, requests=ledger.requests, spent=ledger.spent)
        files, count, stopped = batch.write_batch(
            config, read_requests(config, drops), ledger, path, form, budget, price
        )
    finally:
        ledger.close()
    if stopped is not None:
        say(f"collect: the file ends early: {stopped}")
    if not count:
        raise UserError("there is nothing to write: every request has an end or is in a batch.")
    say(f"collect: {count:,} requests wait for results; collect does not send them")
    return files


def read_batch(config: CollectConfig, paths: Sequence[Path]) -> CollectResult:
    """Takes the results of a batch service, see ``collecting.batch``.

    Args:
      config: the section ``collect``.
      paths: files of results and of errors.

    Raises:
      UserError: a file is damaged or of another form.
    """
    from proxykd_jax.collecting import batch
    from proxykd_jax.collecting.ledger import FILES
    from proxykd_jax.collecting.requests import read_requests
    from proxykd_jax.texts.records import Drops

    price, drops = price_of(config), Drops()
    secret = os.environ.get(config.api_key_env or "", "").strip()  # not needed, only kept out
    ledger = open_ledger(config, secret)
    try:
        seen = batch.read_batch(config, read_requests(config, drops), ledger, paths, price, secret)
        _tell(seen, ledger.requests, ledger.spent, price)
        answers = ledger.folder / FILES["answers"]
        return CollectResult(answers, dict(seen), ledger.requests, ledger.spent)
    finally:
        ledger.close()


def forget_batch(config: CollectConfig, path: Path) -> int:
    """Frees the requests of a batch file that is not submitted; returns their number.

    Raises:
      UserError: the file is no batch file.
    """
    from proxykd_jax.collecting import batch

    ledger = open_ledger(config)
    try:
        return batch.forget_batch(ledger, path)
    finally:
        ledger.close()


def _checked_price(config: CollectConfig, max_cost: float | None) -> Price | None:
    from proxykd_jax.collecting.requests import most_answer_tokens

    price = price_of(config)
    if max_cost is not None and (price is None or most_answer_tokens(config.parameters) is None):
        raise UserError(
            "--max-cost needs to know what a request can cost: name a file of prices under "
            "collect.prices, and set max_tokens or max_completion_tokens in collect.parameters."
        )
    return price


def price_of(config: CollectConfig) -> Price | None:
    """The price of the config's model, if the config names a file of prices."""
    return None if config.prices is None else load_price(config.prices, config.model)


def open_ledger(config: CollectConfig, secret: str = "") -> Ledger:
    """The folder of a config.

    Raises:
      UserError: it is in use, damaged, or holds answers to other requests.
    """
    from proxykd_jax.collecting.ledger import Ledger
    from proxykd_jax.collecting.requests import settings_of

    return Ledger(Path(config.folder), settings_of(config), secret)


def _tell(seen: Mapping[str, int], requests: int, spent: float, price: Price | None) -> None:
    ended = ", ".join(f"{count:,} {what}" for what, count in seen.items())
    cost = "" if price is None else f", {spent:.6g} spent at most"
    say(f"collect: {ended or 'no request ended in this run'}; {requests:,} requests so far{cost}")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = base_parser(
        "collect",
        SUMMARY,
        what="YAML file with the section collect (others are not needed)",
    )
    add = found.add_argument
    what = found.add_mutually_exclusive_group()
    what.add_argument(
        "--estimate", action="store_true", help="count requests, tokens and cost; send nothing"
    )
    what.add_argument(
        "--write-batch", type=Path, metavar="FILE",
        help="write what is not answered for a batch service; send nothing",
    )  # fmt: skip
    what.add_argument(
        "--read-batch", type=Path, nargs="+", metavar="FILE",
        help="take a batch service's results (and errors) of either form",
    )  # fmt: skip
    what.add_argument(
        "--forget-batch", type=Path, metavar="FILE",
        help="free the requests of a batch file that is not going to be submitted",
    )  # fmt: skip
    add(
        "--form", choices=("openai", "anthropic"), default="openai",
        help="with --write-batch: whose form (default openai)",
    )  # fmt: skip
    add(
        "--max-requests", type=_whole, metavar="N",
        help="stop before request N + 1, over all runs of the folder, retries included",
    )  # fmt: skip
    add(
        "--max-cost", type=_amount, metavar="COST",
        help="stop before a request that could exceed this cost, over all runs of the folder",
    )  # fmt: skip
    add("--retry-failed", action="store_true", help="also ask again what the server refused")
    return found


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount")
    return value


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    arguments = parser().parse_args(argv)

    def work() -> int:
        config = load_collect(arguments.config, arguments.set)
        if arguments.estimate:
            _print_estimate(config)
            return 0
        if arguments.write_batch:
            limits = {"max_requests": arguments.max_requests, "max_cost": arguments.max_cost}
            print(*write_batch(config, arguments.write_batch, arguments.form, **limits), sep="\n")
            return 0
        if arguments.read_batch:
            print(read_batch(config, arguments.read_batch).answers)
            return 0
        if arguments.forget_batch:
            count = forget_batch(config, arguments.forget_batch)
            say(f"collect: {count:,} requests are free to be sent")
            return 0
        result = main(
            config,
            max_requests=arguments.max_requests,
            max_cost=arguments.max_cost,
            retry_failed=arguments.retry_failed,
        )
        print(result.answers)
        return 0

    return run_work(work)


def _print_estimate(config: CollectConfig) -> None:
    from proxykd_jax.collecting.estimate import estimate
    from proxykd_jax.collecting.requests import read_requests
    from proxykd_jax.texts.records import Drops

    price, drops = price_of(config), Drops()
    ledger = open_ledger(config)
    try:
        print(estimate(config, read_requests(config, drops), ledger).render(price))
    finally:
        ledger.close()
    if drops.total:
        say(f"collect: prompts left out: {drops}")


if __name__ == "__main__":
    sys.exit(command())
