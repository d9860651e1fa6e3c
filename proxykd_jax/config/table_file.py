"""The file of a table or a figure of the paper: one run per row. Imports only pydantic and yaml."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from proxykd_jax.config.load import _explain, _read_yaml, load_config
from proxykd_jax.config.schema import Config
from proxykd_jax.config.section import NamedPathText, PathText, Section
from proxykd_jax.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
NONE = "–"


class TableRow(Section):
    """A row: its first columns as printed in the paper, and the run that is measured."""

    name: Name = Field(description="name of the row's run, also for --only")
    group: str = Field(NONE, description="heading above the row")
    method: str = Field(description="the paper's column (Table 3: model and method)")
    student: str = Field(NONE, description="the paper's column")
    proxy: str = Field(NONE, description="the paper's column, in Table 5 and Figure 3")
    teacher: str = Field(NONE, description="the paper's column")
    reading: str = Field(
        "", description="how else the paper's row above is read here; it is not printed again"
    )
    config: PathText | None = Field(
        None, description="the run's recipe, relative to the table's file (default: the table's)"
    )
    set: tuple[str, ...] = Field((), description="keys changed in it, in the form of --set")
    model: NamedPathText = Field(
        "student",
        description="the model that answers the benchmarks, as in evaluate.benchmarks.models; the "
        "row is left out if it is a .jsonl of collected outputs that does not exist",
    )
    phase: Literal["warmup", "rounds", "student"] | None = Field(
        None, description="Table 3: the phase that is timed"
    )
    after: Name | None = Field(
        None, description="an earlier row whose stages this row uses; a separate job waits for it"
    )


class TableFile(Section):
    """A table or a figure of the paper."""

    table: Literal[1, 2, 3, 5] | None = Field(None, description="number of the paper's table")
    figure: Literal[3, 6, 7] | None = Field(
        None, description="number of the paper's figure; either this or table"
    )
    name: Name = Field(description="name of the table or figure; its runs are in runs/<name>/<row>")
    runs: PathText = Field(
        "runs", description="folder of the runs; runs link finished stages of other runs in it"
    )
    config: PathText | None = Field(None, description="recipe of the rows that name none")
    set: tuple[str, ...] = Field(
        (), description="keys changed in all rows, before the row's own changes"
    )
    note: str = Field("", description="a sentence above the table")
    rows: tuple[TableRow, ...] = Field(min_length=1, description="the rows, in the paper's order")

    _place: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def _fits(self) -> TableFile:
        if (self.table is None) == (self.figure is None):
            raise ValueError("name either the paper's table or its figure, by number")
        above: list[str] = []
        for row in self.rows:
            if row.name in above:
                raise ValueError(f"two rows are called {row.name}")
            if row.after is not None and row.after not in above:
                raise ValueError(f"row {row.name}: after names no row above it ({row.after})")
            if row.config is None and self.config is None:
                raise ValueError(f"row {row.name}: neither the row nor the table names a config")
            if (self.table == 3) != (row.phase is not None):
                has = "needs a phase" if self.table == 3 else "has a phase, which is for Table 3"
                raise ValueError(f"row {row.name} {has}")
            above.append(row.name)
        return self

    @property
    def title(self) -> str:
        """``Table 2``, ``Figure 6``."""
        return f"Figure {self.figure}" if self.table is None else f"Table {self.table}"

    @property
    def has_curves(self) -> bool:
        """Whether the rows are curves of a student's training."""
        return self.figure in (6, 7)

    @property
    def folder(self) -> Path:
        """Folder of the table and its runs."""
        return Path(self.runs) / self.name

    def chosen(self, names: Sequence[str]) -> list[TableRow]:
        """Returns rows by name, in the table's order; all rows if no name is given.

        Raises:
          UserError: there is no such row.
        """
        known = [row.name for row in self.rows]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"--only {unknown[0]}: the rows are {', '.join(known)}.")
        return [row for row in self.rows if row.name in names or not names]

    def run_of(self, row: TableRow, overrides: Sequence[str] = ()) -> Config:
        """Returns the config of a row's run; ``overrides`` come last.

        Raises:
          UserError: see ``load_config``; the message gives the row's name.
        """
        path = self._place / str(row.config or self.config)
        changes = [*self.set, *row.set, *overrides]
        changes += [f"name={row.name}", f"runs_dir={json.dumps(str(self.folder))}"]
        if self.table != 3:
            changes.append(f"evaluate.benchmarks.models={json.dumps([row.model])}")
        try:
            return load_config(path, changes)
        except UserError as error:
            raise UserError(f"row {row.name}: {error}") from error


def load_table(path: str | Path, *, runs: str | None = None) -> TableFile:
    """Reads a table's file and checks it; its rows' configs are read by ``run_of``.

    Args:
      path: the YAML file.
      runs: folder of the runs, in place of the file's.

    Raises:
      UserError: the file cannot be read, or a key is unknown, repeated or of a wrong type; one
        message names all problems.
    """
    data, problems = _read_yaml(path, "table")
    if runs is not None and isinstance(data, dict):
        data["runs"] = runs
    try:
        table = TableFile.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _explain(error.errors(), unresolved_preset=False, root=TableFile)
    else:
        if not problems:
            table._place = Path(path).parent
            return table
    raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
