"""The parts of the ``plan`` command: compile a run's programs, print a table, search what fits."""

from proxykd_jax.planning.fit import fit
from proxykd_jax.planning.look import Request, StagePlan, plan
from proxykd_jax.planning.render import render, render_rows

__all__ = ["Request", "StagePlan", "fit", "plan", "render", "render_rows"]
