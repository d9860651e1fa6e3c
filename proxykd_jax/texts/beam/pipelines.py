"""The pipelines. Only this module uses Apache Beam; it is imported on demand.

Elements are numbers of pieces, columns and blocks of token rows. All functions are named functions
of neighbouring modules, so that every worker can import them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from proxykd_jax.config import BeamConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.beam import decide, scan, write

INSTALL = "pip install 'proxykd_jax[beam]'"
# Beam's default local runner first tries Prism, a Go program that it downloads.
_LOCAL_RUNNER = "FnApiRunner"


class Pipelines:
    """The steps as pipelines on one runner; each call returns when its pipeline is done.

    Args:
      settings: runner and its options.
      folder: the job's folder.

    Raises:
      UserError: Beam is not installed, has no such runner, or rejects the options.
    """

    def __init__(self, settings: BeamConfig, folder: str) -> None:
        self._settings, self._folder = settings, folder
        try:
            import apache_beam
        except ImportError as error:
            raise UserError(
                f"corpus.beam needs Apache Beam, which is not installed: {INSTALL} (in an "
                "environment of its own, see docs/large_corpora.md), or remove the key to make "
                "the corpus on this machine alone."
            ) from error
        self._beam = apache_beam
        self._pipeline()

    def scan(self, numbers: Sequence[int]) -> None:
        """Reads pieces."""
        self._each("scan", scan.scan, numbers)

    def judge(self, numbers: Sequence[int], buckets: int) -> None:
        """Finds repeated rows and stores the verdicts."""
        beam = self._beam
        with self._pipeline() as pipeline:
            judged = pipeline | "pieces to judge" >> beam.Create([(n, None) for n in numbers])
            repeated = (
                self._spread(pipeline, "digests", numbers)
                | beam.FlatMap(self._step(decide.blocks_to_compare, buckets))
                | "compare" >> beam.GroupByKey()
                | "repeated" >> beam.FlatMap(decide.repeated_rows)
            )
            _ = (
                (judged, repeated)
                | beam.Flatten()
                | "by piece" >> beam.GroupByKey()
                | "judge" >> beam.Map(self._step(decide.judge))
            )

    def look_at_lengths(self, numbers: Sequence[int]) -> None:
        """Finds the smallest hashes of rows that fit."""
        self._each("lengths", decide.look_at_lengths, numbers)

    def assign(self, numbers: Sequence[int], fraction: float, threshold: int | None) -> None:
        """Gives every row its split."""
        self._each("splits", decide.assign, numbers, fraction, threshold)

    def write(self, numbers: Sequence[int]) -> None:
        """Tokenises pieces and writes the shards."""
        beam = self._beam
        with self._pipeline() as pipeline:
            _ = (
                self._spread(pipeline, "texts", numbers)
                | "to tokens" >> beam.FlatMap(self._step(write.encode_piece))
                | "by shard" >> beam.GroupByKey()
                | "write" >> beam.Map(self._step(write.write_shard))
            )

    def _each(self, name: str, function: Any, numbers: Sequence[int], *arguments: Any) -> None:
        with self._pipeline() as pipeline:
            spread = self._spread(pipeline, f"pieces of {name}", numbers)
            _ = spread | name >> self._beam.Map(self._step(function, *arguments))

    def _spread(self, pipeline: Any, name: str, numbers: Sequence[int]) -> Any:
        """The pieces, distributed so that neighbours can go to different workers."""
        beam = self._beam
        created = pipeline | name >> beam.Create(list(numbers))
        return created | f"spread {name}" >> beam.Reshuffle()

    def _step(self, function: Any, *arguments: Any) -> Any:
        return functools.partial(function, self._folder, *arguments)

    def _pipeline(self) -> Any:
        from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

        settings = self._settings
        local = settings.runner in ("DirectRunner", _LOCAL_RUNNER)
        runner = _LOCAL_RUNNER if local else settings.runner
        try:
            options = PipelineOptions(list(settings.options))
            options.get_all_options()  # parse them now, not midway through the run
            mode = options.view_as(DirectOptions).direct_running_mode
            if local and mode == "multi_threading":
                raise UserError(
                    "corpus.beam.options: several threads of Beam's local runner lose rows under "
                    "load. Give --direct_running_mode=multi_processing, or neither it nor "
                    "--direct_num_workers."
                )
            return self._beam.Pipeline(runner=runner, options=options)
        except SystemExit as error:  # its parser has printed the reason
            raise UserError(
                f"corpus.beam.options: Beam refuses {' '.join(settings.options)} (see above)."
            ) from error
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(
                f"corpus.beam: the runner {settings.runner} cannot be used: {error}. "
                f"DirectRunner needs {INSTALL} alone; other runners may need more of Beam's "
                "extras (docs/large_corpora.md)."
            ) from error
