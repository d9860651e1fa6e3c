"""Whether the files and folders that a config names exist on this machine."""

from __future__ import annotations

import difflib
from pathlib import Path

from proxykd_jax.checking.findings import Findings
from proxykd_jax.models.folder import is_hub_name

_SHOWN = 5


def missing_repository(findings: Findings, what: str, place: str) -> None:
    """Adds a model, tokenizer or dataset that is not on this machine.

    A hub name whose owner is no local folder is unchecked: the run downloads it.
    """
    if is_hub_name(place) and not Path(Path(place).parts[0]).exists():
        findings.unchecked.append(f"{what}: {place} is not on this machine")
    else:
        missing_path(findings, what, place)


def missing_path(findings: Findings, what: str, place: str) -> None:
    """Adds a path that does not exist, or a glob without a match.

    It is a problem if a part of it exists, or nearly so: then the rest is mistyped. Otherwise the
    config may be meant for another machine (see ``Findings.here``).
    """
    path = Path(place)
    known = next(parent for parent in path.parents if parent.exists())
    name = path.relative_to(known).parts[0]
    inside = sorted(entry.name for entry in known.iterdir()) if known.is_dir() else []
    near = difflib.get_close_matches(name, inside, 3, 0.7)
    if known in (Path(), Path(path.anchor)) and not near:
        findings.absent(what, f"{place} is not on this machine")
        return
    if not known.is_dir():
        said = f"{known} is a file."
    elif near:
        said = f"{known} has no {name}. Did you mean {' or '.join(near)}?"
    else:
        more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
        listed = ", ".join(inside[:_SHOWN]) or "nothing"
        said = f"{known} has no {name}. It holds {listed}{more}."
    findings.problems.append(f"{what}: {place} does not exist: {said}")
