"""What a collection would ask and cost, before anything is sent."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from proxykd_jax.collecting.ledger import Ledger
from proxykd_jax.collecting.requests import Request, most_answer_tokens
from proxykd_jax.collecting.rows import unwanted
from proxykd_jax.config.price_file import Price
from proxykd_jax.config.schema import CollectConfig
from proxykd_jax.texts.progress import Progress


@dataclass(frozen=True)
class Estimate:
    """Sums over the requests that have no answer yet.

    Attributes:
      requests: their number; ``known`` have an end or lie in a batch file, ``repeated`` were
        counted before.
      prompt_tokens: about how many tokens the prompts have, at four bytes a token.
      most_prompt_tokens: a bound on them.
      most_answer_tokens: a bound on the answers' tokens; None if the parameters set none.
    """

    requests: int
    known: int
    repeated: int
    prompt_tokens: int
    most_prompt_tokens: int
    most_answer_tokens: int | None

    def render(self, price: Price | None) -> str:
        """The figures in lines, with costs if there are prices."""
        most = self.most_answer_tokens
        answers = "unbounded (set max_tokens)" if most is None else f"at most {most:,}"
        lines = [
            f"requests to send:  {self.requests:,} ({self.known:,} more have an end or lie in a "
            f"batch file, {self.repeated:,} are repeated)",
            f"tokens of prompts: about {self.prompt_tokens:,}, at four bytes a token",
            f"tokens of answers: {answers}",
        ]
        if price is not None:
            about = price.cost(self.prompt_tokens, 0)
            lines.append(f"cost of prompts:   about {about:,.4f}")
            if most is not None:
                whole = price.cost(self.prompt_tokens, most)
                lines.append(f"cost of all:       about {whole:,.4f} if every answer is as long as")
                lines.append(
                    f"                   it may be; in batch files {whole * price.batch:,.4f}"
                )
                bound = price.cost(self.most_prompt_tokens, most)
                lines.append(f"bound:             {bound:,.4f}, at a byte a token, without retries")
        return "\n".join(lines)


def estimate(config: CollectConfig, requests: Iterator[Request], ledger: Ledger) -> Estimate:
    """Reads all prompts, in constant memory, and counts.

    Args:
      config: the section ``collect``.
      requests: ``read_requests``.
      ledger: what is answered already.

    Raises:
      UserError: a source of prompts is missing, damaged or of unknown format.
    """
    seen = sqlite3.connect("", isolation_level=None)  # a file that vanishes with its connection
    seen.execute("pragma journal_mode = off")
    seen.execute("create table seen (key blob primary key) without rowid")
    seen.execute("begin")
    count = known = repeated = tokens = most_tokens = 0
    with Progress() as progress:
        for request in requests:
            progress("requests read", count + known + repeated)
            key = bytes.fromhex(request.key)
            if not seen.execute("insert or ignore into seen values (?)", (key,)).rowcount:
                repeated += 1
                continue
            if unwanted(ledger.lookup(request.key), config) is not None:
                known += 1
                continue
            count += 1
            tokens += request.about_prompt_tokens
            most_tokens += request.most_prompt_tokens
    seen.close()
    most = most_answer_tokens(config.parameters)
    return Estimate(
        count, known, repeated, tokens, most_tokens, None if most is None else most * count
    )
