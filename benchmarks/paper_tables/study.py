"""One regime from worlds to records: pre-training, alignment, students, measurements."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.miniature import pretrain
from benchmarks.miniature import world as w
from benchmarks.paper_tables import methods as m
from benchmarks.paper_tables import models
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables import settings as s
from benchmarks.paper_tables.metrics import (
    ACCURACY,
    BEST,
    EITHER_PRESET,
    KL,
    LAST,
    SWEEP,
    Evaluator,
    Record,
    Recorder,
)
from benchmarks.paper_tables.offline import Material
from benchmarks.paper_tables.seeds import AnalyticTeacher, Seed, Teacher, make_seeds
from benchmarks.paper_tables.training import Run
from benchmarks.paper_tables.vectorise import filled, over_seeds
from proxykd_jax.models.config import ModelConfig

# Pre-training takes the seeds 2 * seed + salt. A salt above 1 must meet no other seed's.
NEURAL_SALT, SMALL_SALT, QWEN_SALT = 100_000, 200_000, 300_000
CURVES = (m.BLACK_BOX, "fkl_unaligned", m.PROXY_KD)

Log = Callable[[str], Any]


class Study:
    """Everything that the presets of a regime share; each part is made when it is first asked for.

    Args:
      setting: regime, sizes and models. Only the students depend on the preset.
      seeds: the seeds of everything.
      log: takes lines of progress.
      like: a study of the same regime whose data are taken over.
    """

    def __init__(
        self, setting: s.Setting, seeds: Sequence[int], log: Log, like: Study | None = None
    ) -> None:
        self.setting, self.seeds, self._log = setting, list(seeds), log
        self._started = time.perf_counter()
        if like is not None:
            self._take_over(like)

    def _take_over(self, like: Study) -> None:
        """Fills the caches with all that the other models, sizes and preset do not change.

        Pre-training and evaluation use only the test prompts, which are the first of the pool.
        """
        mine, theirs = self.setting, like.setting
        shared = ["evaluator"]
        if theirs.student_model == mine.student_model:
            shared.append("student_S")
        if theirs.proxy_model == mine.proxy_model:
            shared.append("raw_S")
        if mine.rows == theirs.rows:
            shared += ["_world", "validation"]
            if "raw_S" in shared and theirs.config.align == mine.config.align:
                shared.append("proxies")
        else:
            # The data are made anew with the same teacher.
            self.__dict__["_world"] = self._world_of(lambda worlds: like.teacher)
        self.__dict__.update({name: getattr(like, name) for name in shared})

    def with_changes(self, **changes: Any) -> Study:
        """A study of the same data with another proxy, student, preset or other sizes."""
        setting = dataclasses.replace(self.setting, **changes)
        return Study(setting, self.seeds, self._log, like=self)

    def say(self, text: str) -> None:
        """Logs a line of progress."""
        self._log(f"[{time.perf_counter() - self._started:5.0f} s] {self.setting.regime}: {text}")

    # --- data and pre-trained models --------------------------------------------------------------

    @functools.cached_property
    def _world(self) -> tuple[list[Seed], Teacher]:
        return self._world_of(self._new_teacher)

    def _world_of(
        self, teacher_of: Callable[[list[w.Worlds]], Teacher]
    ) -> tuple[list[Seed], Teacher]:
        worlds = [w.make_worlds(seed, self.setting.world_regime) for seed in self.seeds]
        teacher = teacher_of(worlds)
        return make_seeds(self.setting, self.seeds, worlds, teacher), teacher

    def _new_teacher(self, worlds: list[w.Worlds]) -> Teacher:
        teachers = [world.teacher for world in worlds]
        if self.setting.regime != s.NEURAL:
            return AnalyticTeacher(teachers, self.seeds)
        nothing = [np.zeros(0, np.int64)] * len(teachers)
        size = (s.NEURAL_STEPS, s.NEURAL_RATE)
        params_S = self._pretrained(s.NEURAL_TEACHER, teachers, nothing, NEURAL_SALT, *size)
        return models.NeuralTeacher(params_S, self.seeds)

    def _pretrained(
        self,
        model: ModelConfig,
        texts: Sequence[w.World],
        excluded: Sequence[np.ndarray],
        salt: int,
        steps: int,
        rate: float,
    ) -> Any:
        """Pre-trains a model of every seed; the salts 0 and 1 make the miniature's proxy and
        student."""
        self.say(f"pre-training {model.num_params:,} parameters")
        return pretrain.pretrain_seeds(
            model,
            texts,
            seeds=[2 * seed + salt for seed in self.seeds],
            num_steps=self.setting.pretrain_steps(steps),
            learning_rate=rate,
            excluded=excluded,
            over_seeds=over_seeds,
        )

    def _of_public_text(self, model: ModelConfig, salt: int, steps: int, rate: float) -> Any:
        texts = [seed.worlds.public for seed in self.data]
        excluded = [w.encode_prompts(seed.test.prompts_NP) for seed in self.data]
        return self._pretrained(model, texts, excluded, salt, steps, rate)

    @property
    def data(self) -> list[Seed]:
        """The corpus, splits and test rows of each seed."""
        return self._world[0]

    @property
    def teacher(self) -> Teacher:
        """The teacher, for the evaluator and ``teacher_logits``."""
        return self._world[1]

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator on the test rows."""
        return Evaluator(self.data, self.seeds)

    @functools.cached_property
    def validation(self) -> Any:
        """The held-out rows of all seeds."""
        return filled([seed.splits["validation"].batch for seed in self.data])

    @functools.cached_property
    def student_S(self) -> Any:
        """The student as pre-trained, from which all students start."""
        model, steps = self.setting.student_model, w.REGIMES[self.setting.world_regime]
        salt = 1 if model == pretrain.STUDENT else QWEN_SALT + 1
        return self._of_public_text(model, salt, steps.student_steps, pretrain.STUDENT_RATE)

    @functools.cached_property
    def raw_S(self) -> Any:
        """The proxy as pre-trained."""
        model = self.setting.proxy_model
        salt = {pretrain.PROXY: 0, s.SMALL_PROXY: SMALL_SALT}.get(model, QWEN_SALT)
        return self._of_public_text(model, salt, pretrain.PROXY_STEPS, pretrain.PROXY_RATE)

    @functools.cached_property
    def proxies(self) -> px.Proxies:
        """The proxy in its states."""
        raw_S = self.raw_S
        self.say("aligning the proxy")
        return px.align(self.setting, self.data, self.seeds, raw_S)

    @functools.cached_property
    def material(self) -> Material:
        """The answers and soft labels of the best proxies."""
        return Material(self.setting, self.data, self.seeds, self.proxies.best, self.teacher)

    # --- records ----------------------------------------------------------------------------------

    def proxy_records(self, name: str = "proxy", states: Sequence[str] = px.STATES) -> list[Record]:
        """Measures states of the proxy for Table 4, Figs. 4 and 5, and the seconds of Table 3."""
        setting, records = self.setting, []
        # A sweep's records belong to the preset whose section shows them.
        preset = setting.preset if name.startswith(SWEEP) else EITHER_PRESET
        record = Recorder(setting.regime, preset, self.seeds)
        for state in states:
            distances = []
            for checkpoint, params in ((BEST, self.proxies.best), (LAST, self.proxies.last)):
                values = self.evaluator.measure(setting.proxy_model, params[state], masses=True)
                records += record(f"{name}/{state}", checkpoint, values)
                distances.append(values[KL])
            self.say(f"{name}/{state}: KL {np.mean(distances):.3f}")
        for part, rounds in self.proxies.seconds.items():
            seconds = float(np.mean(rounds[1:] or rounds)) / len(self.seeds)
            records += record.same(f"{name}/{part}", LAST, "seconds_a_round", seconds)
        return records

    def start_records(self) -> list[Record]:
        """Measures the pre-trained student and the teacher."""
        record = Recorder(self.setting.regime, EITHER_PRESET, self.seeds)
        student = self.evaluator.measure(self.setting.student_model, self.student_S)
        teacher = {**self.evaluator.teacher(), ACCURACY: self.teacher_accuracy()}
        return [
            each
            for name, values in (("student", student), ("teacher", teacher))
            for checkpoint in (BEST, LAST)
            for each in record(name, checkpoint, values)
        ]

    def teacher_accuracy(self) -> np.ndarray:
        """The greedy accuracy of the teacher itself."""
        if isinstance(self.teacher, models.NeuralTeacher):
            params_S = self.teacher.params_S
            correct = models.greedy_correct(s.NEURAL_TEACHER, params_S, self.data, self.seeds)
        else:
            correct = [w.greedy_correct(seed.worlds, seed.test.prompts_NP) for seed in self.data]
        return np.array([each.mean() for each in correct])

    def student_records(
        self, names: Iterable[str], *, prefix: str = "", curves: Iterable[str] = ()
    ) -> list[Record]:
        """Trains and measures the named students.

        Args:
          names: keys of ``methods.METHODS``.
          prefix: stands before the method in the records.
          curves: methods whose accuracy is measured along the way, for Figs. 6 and 7.
        """
        setting, records = self.setting, []
        methods = m.make_methods(setting)
        for name in names:
            serves_both = name in m.OF_NO_PRESET and not prefix.startswith(SWEEP)
            preset = EITHER_PRESET if serves_both else setting.preset
            record = Recorder(setting.regime, preset, self.seeds)
            # This is a multiple of the steps between validations, so that no program is added.
            every = 2 * setting.config.distill.stop.every if name in curves else None
            started = time.perf_counter()
            run = m.train(
                self.material, methods[name], self.student_S, self.validation, snapshot_every=every
            )
            values = self._measured(run)
            for checkpoint, found in values.items():
                records += record(prefix + name, checkpoint, found)
            seconds = run.seconds_a_step * setting.student_steps / len(self.seeds)
            records += record.same(prefix + name, LAST, "seconds", seconds)
            best, last = values[BEST], values[LAST]
            self.say(
                f"{setting.preset} {prefix}{name}: accuracy {best[ACCURACY].mean():.3f} / "
                f"{last[ACCURACY].mean():.3f}, KL {best[KL].mean():.3f} / {last[KL].mean():.3f} "
                f"(best / last), {time.perf_counter() - started:.0f} s"
            )
        return records

    def _measured(self, run: Run) -> dict[str, dict[str, np.ndarray]]:
        model = self.setting.student_model
        values = {
            BEST: self.evaluator.measure(model, run.best),
            LAST: self.evaluator.measure(model, run.last),
        }
        for step, params in run.snapshots.items():
            values[f"step_{step}"] = self.evaluator.measure(model, params, distance=False)
        return values
