"""What the checks of a run find, and how it is printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from proxykd_jax.errors import UserError

_Found = TypeVar("_Found")
_WIDTH = 10
_GREEN, _YELLOW, _RED, _PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[0m"


def colours() -> bool:
    """Whether standard output shows colours: a terminal without ``NO_COLOR`` (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def green(text: str) -> str:
    """The text in green on a terminal, and as it is elsewhere."""
    return f"{_GREEN}{text}{_PLAIN}" if colours() else text


@dataclass
class Findings:
    """What the checks found, printed line by line.

    Attributes:
      here: the run is about to start on this machine, so an absent local file is a problem.
        Otherwise it is only unchecked.
      force: what ``refuse`` is told is a warning.
      quiet: print warnings alone.
      problems: one sentence for each thing that would stop the run.
      warnings: one sentence for each thing that a user should look at.
      unchecked: one sentence for each thing that could not be checked, because it is absent.
    """

    here: bool = False
    force: bool = False
    quiet: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def say(self, title: str, text: str) -> None:
        """Prints something that is as it should be."""
        if not self.quiet:
            _print(title, text, _GREEN)

    def warn(self, what: str, text: str) -> None:
        """Prints something that a user should look at; the run may start."""
        self.warnings.append(f"{what}: {text}")
        _print("warning", f"{what}: {text}", _YELLOW)

    def refuse(self, what: str, text: str) -> None:
        """Adds a problem that stops a run's start; ``--force`` makes it a warning."""
        if self.force or not self.here:
            self.warn(what, text)
        else:
            self.problems.append(f"{what}: {text} --force starts the run nevertheless.")

    def absent(self, what: str, text: str) -> None:
        """Adds something that is not on this machine."""
        (self.problems if self.here else self.unchecked).append(f"{what}: {text}")

    def attempt(self, what: str, check: Callable[[], _Found]) -> _Found | None:
        """The result of a check; None, and a problem, if it raises UserError."""
        try:
            return check()
        except UserError as error:
            self.problems.append(f"{what}: {error}")
            return None

    def close(self, name: str) -> None:
        """Prints what was not checked, and the verdict.

        Args:
          name: name of the check, for the last line.

        Raises:
          UserError: there are problems; one message lists all of them.
        """
        for missing in self.unchecked:
            _print("unchecked", missing, _YELLOW)
        if self.problems:
            raise UserError("\n".join(self.problems))
        if self.quiet:
            return
        said = "nothing is wrong with what could be checked"
        if self.warnings:
            said = f"no error, {len(self.warnings)} warnings"
        print(f"{name}: {said}", flush=True)


def _print(title: str, text: str, colour: str) -> None:
    shown = f"{title:<{_WIDTH}}"
    print(f"{colour}{shown}{_PLAIN} {text}" if colours() else f"{shown} {text}", flush=True)
