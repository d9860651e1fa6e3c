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
from benchmarks.paper_tables.seeds import (
    AnalyticTeacher,
    Seed,
    Teacher,
    make_seeds,
    pretrained,
)
from benchmarks.paper_tables.training import Run, stacked_rows
from benchmarks.paper_tables.vectorise import over_seeds

# Pre-training seeds are 2 * seed + salt; those beyond 1 must meet no other seed's.
NEURAL_SALT, SMALL_SALT, QWEN_SALT = 100_000, 200_000, 300_000
CURVES = (m.BLACK_BOX, "fkl_unaligned", m.PROXY_KD)

Log = Callable[[str], Any]


class Study:
    """What all presets of a regime share; each part is made when it is first asked for.

    Args:
      setting: regime, sizes and models; the preset is the students' alone.
      seeds: of everything.
      log: told what is being done.
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
        """Fills the caches with all that the other models, sizes and preset leave as it is.

        Pre-training and evaluation know the test prompts alone, which are the first of the pool.
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
            # Remade with the teacher that there is.
            self.__dict__["_world"] = self._world_of(lambda worlds: like.teacher)
        self.__dict__.update({name: getattr(like, name) for name in shared})

    def say(self, text: str) -> None:
        """A line of progress."""
        self._log(f"[{time.perf_counter() - self._started:5.0f} s] {self.setting.regime}: {text}")

    @functools.cached_property
    def _world(self) -> tuple[list[Seed], Teacher]:
        return self._world_of(self._new_teacher)

    def _world_of(
        self, teacher_of: Callable[[list[w.Worlds]], Teacher]
    ) -> tuple[list[Seed], Teacher]:
        made: list[Teacher] = []

        def kept(worlds: list[w.Worlds]) -> Teacher:
            made.append(teacher_of(worlds))
            return made[0]

        return make_seeds(self.setting, self.seeds, kept), made[0]

    def _new_teacher(self, worlds: list[w.Worlds]) -> Teacher:
        setting, seeds = self.setting, self.seeds
        teachers = [world.teacher for world in worlds]
        if setting.regime != s.NEURAL:
            return AnalyticTeacher(teachers, seeds)
        self.say("pre-training the teacher")
        params_S = pretrain.pretrain_seeds(
            s.NEURAL_TEACHER,
            teachers,
            seeds=[2 * seed + NEURAL_SALT for seed in seeds],
            num_steps=setting.pretrain_steps(s.NEURAL_STEPS),
            learning_rate=s.NEURAL_RATE,
            excluded=[np.zeros(0, np.int64)] * len(seeds),
            over_seeds=over_seeds,
        )
        return models.NeuralTeacher(params_S, seeds)

    @property
    def data(self) -> list[Seed]:
        """Corpus, splits and test rows."""
        return self._world[0]

    @property
    def teacher(self) -> Teacher:
        """For the evaluator and the ceiling."""
        return self._world[1]

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """On the test rows."""
        return Evaluator(self.data, self.seeds)

    @functools.cached_property
    def validation(self) -> Any:
        """Held-out rows of all seeds."""
        return stacked_rows([seed.splits["validation"].batch for seed in self.data])

    def pretrained(self, model: Any, salt: int, steps: int, rate: float) -> Any:
        """A model of public text."""
        self.say(f"pre-training {model.num_params:,} parameters")
        options: dict[str, Any] = {"salt": salt, "steps": steps, "rate": rate}
        return pretrained(self.setting, self.data, self.seeds, model, **options)

    @functools.cached_property
    def student_S(self) -> Any:
        """All students' beginning."""
        steps = w.REGIMES[self.setting.world_regime].student_steps
        salt = 1 if self.setting.student_model == pretrain.STUDENT else QWEN_SALT + 1
        return self.pretrained(self.setting.student_model, salt, steps, pretrain.STUDENT_RATE)

    @functools.cached_property
    def raw_S(self) -> Any:
        """The proxy as pre-trained."""
        model = self.setting.proxy_model
        salt = {pretrain.PROXY: 0, s.SMALL_PROXY: SMALL_SALT}.get(model, QWEN_SALT)
        return self.pretrained(model, salt, pretrain.PROXY_STEPS, pretrain.PROXY_RATE)

    @functools.cached_property
    def proxies(self) -> px.Proxies:
        """The proxy in its states."""
        raw_S = self.raw_S
        self.say("aligning the proxy")
        return px.align(self.setting, self.data, self.seeds, raw_S)

    @functools.cached_property
    def material(self) -> Material:
        """Answers and soft labels of the best proxies."""
        return Material(self.setting, self.data, self.seeds, self.proxies.best, self.teacher)

    def proxy_records(self, name: str = "proxy", states: Sequence[str] = px.STATES) -> list[Record]:
        """Table 4, Figs. 4 and 5 for these states of the proxy; the seconds of Table 3."""
        setting, records = self.setting, []
        # A sweep's belong to the preset whose section shows them.
        preset = setting.preset if name.startswith(SWEEP) else EITHER_PRESET
        record = Recorder(setting.regime, preset, self.seeds)
        for state in states:
            for checkpoint, params in ((BEST, self.proxies.best), (LAST, self.proxies.last)):
                values = self.evaluator.measure(setting.proxy_model, params[state], masses=True)
                records += record(f"{name}/{state}", checkpoint, values)
            kl = np.mean(
                [r.value for r in records if r.method == f"{name}/{state}" and r.metric == "kl"]
            )
            self.say(f"{name}/{state}: KL {kl:.3f}")
        for part, rounds in self.proxies.seconds.items():
            settled = rounds[1:] or rounds
            seconds = float(np.mean(settled)) / len(self.seeds)
            records += record(
                f"{name}/{part}", LAST, {"seconds_a_round": [seconds] * len(self.seeds)}
            )
        return records

    def start_records(self) -> list[Record]:
        """The pre-trained student and the teacher."""
        record = Recorder(self.setting.regime, EITHER_PRESET, self.seeds)
        values = self.evaluator.measure(self.setting.student_model, self.student_S)
        records = [r for c in (BEST, LAST) for r in record("student", c, values)]
        teacher = {**self.evaluator.teacher(), ACCURACY: self.teacher_accuracy()}
        return records + [r for c in (BEST, LAST) for r in record("teacher", c, teacher)]

    def teacher_accuracy(self) -> np.ndarray:
        """Greedy accuracy of the teacher itself."""
        if isinstance(self.teacher, models.NeuralTeacher):
            params_S = self.teacher.params_S
            correct = models.greedy_correct(s.NEURAL_TEACHER, params_S, self.data, self.seeds)
        else:
            correct = []
            for seed in self.data:
                prompts = seed.test.prompts_NP
                greedy = w.final_values(list(w.greedy_answers(seed.worlds.teacher, prompts)))
                correct.append(greedy == w.true_results(seed.worlds.truth_FA, prompts))
        return np.array([each.mean() for each in correct])

    def student_records(
        self, names: Iterable[str], *, prefix: str = "", curves: Iterable[str] = ()
    ) -> list[Record]:
        """Trains and measures the named students.

        Args:
          names: of ``methods.METHODS``.
          prefix: of the method in the records.
          curves: of these the accuracy along the way too (Figs. 6 and 7).
        """
        setting, records = self.setting, []
        methods = m.make_methods(setting)
        for name in names:
            # A multiple of the steps between validations: the compiled stretch stays the same.
            serves_both = name in m.OF_NO_PRESET and not prefix.startswith(SWEEP)
            preset = EITHER_PRESET if serves_both else setting.preset
            record = Recorder(setting.regime, preset, self.seeds)
            every = 2 * setting.config.distill.stop.every if name in curves else None
            started = time.perf_counter()
            run = m.train(
                self.material, methods[name], self.student_S, self.validation, snapshot_every=every
            )
            values = self._measured(run)
            for checkpoint, found in values.items():
                records += record(prefix + name, checkpoint, found)
            seconds = run.seconds_a_step * setting.student_steps / len(self.seeds)
            records += record(prefix + name, LAST, {"seconds": [seconds] * len(self.seeds)})
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

    def with_changes(self, **changes: Any) -> Study:
        """The same data with another proxy, student, preset or other sizes of the training."""
        setting = dataclasses.replace(self.setting, **changes)
        return Study(setting, self.seeds, self._log, like=self)
