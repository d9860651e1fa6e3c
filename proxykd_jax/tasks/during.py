"""Benchmarks that a student answers during training: curves as in the paper's Figs. 6 and 7."""

from __future__ import annotations

from proxykd_jax.config import Config
from proxykd_jax.data.order import permutation
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import check_rows
from proxykd_jax.peers import say, stop_if_wanted
from proxykd_jax.tasks.answering import ChatModel, generating, renderer_of
from proxykd_jax.tasks.coverage import coverage, described_coverage
from proxykd_jax.tasks.extraction import extract, is_right
from proxykd_jax.tasks.items import Item, files_of, read_items
from proxykd_jax.training.loop import Periodic
from proxykd_jax.training.model import Model


def accuracy_while_training(config: Config) -> Periodic | None:
    """``benchmark/<task>``, the share of right answers, at intervals; None if none are configured.

    The questions are the same each time: a fixed number per task, drawn by the run's seed. With
    several tasks ``benchmark/mean`` is their mean.

    Args:
      config: ``evaluate.benchmarks.during`` gives the questions and the interval. The student is
        moved to ``mesh.evaluate`` to answer; without one, to where it answers during training.

    Raises:
      UserError: files are missing or do not fit, or rows do not divide over the mesh.
    """
    benchmarks = config.evaluate.benchmarks
    if benchmarks is None or benchmarks.during is None:
        return None
    during, meshes = benchmarks.during, config.mesh
    mesh = make_mesh(meshes.evaluate or meshes.of(meshes.drawing("distill")))
    check_rows(benchmarks.batch_size, mesh, "evaluate.benchmarks.batch_size")
    files = files_of(benchmarks, during.tasks or (), "evaluate.benchmarks.during.tasks")
    asked = {}
    for task, path in files.items():
        questions = read_items(task, path)
        for line in described_coverage(task, coverage(questions)):
            say(line)
        asked[task] = drawn(questions.items, during.items, config.seed)
    renderer = renderer_of(config)

    def figures(model: Model) -> dict[str, float]:
        chat_model = ChatModel(model, renderer, mesh)
        shares = {}
        for task, items in asked.items():
            stop_if_wanted()
            answer = generating(
                chat_model,
                items,
                seed=config.seed,
                max_new_tokens=during.max_new_tokens,
                batch_size=benchmarks.batch_size,
            )
            lines = answer(range(len(items)))
            right = [
                is_right(item, extract(item, line["output"]))
                for item, line in zip(items, lines, strict=True)
            ]
            shares[f"benchmark/{task}"] = sum(right) / len(right)
        if len(shares) > 1:
            shares["benchmark/mean"] = sum(shares.values()) / len(shares)
        return shares

    return Periodic(during.every, figures)


def drawn(items: list[Item], count: int, seed: int) -> list[Item]:
    """At most ``count`` items, in their order; a smaller draw is part of a larger one."""
    places = permutation(len(items), seed=seed, epoch=0)[:count]
    return [items[place] for place in sorted(places.tolist())]
