"""Scoring with the aligned proxy: the parts that ``score.main`` runs in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from proxykd_jax.artifacts import complete_stage, digest_value, open_stage, stage_identity
from proxykd_jax.config import Config
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.corpus import TokenCorpus, TokenSplit
from proxykd_jax.data.soft_labels import SoftLabelStore, SoftLabelWriter, weights_of
from proxykd_jax.errors import UserError
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.label_rows import Positions, RowScorer, score_split, top_k_labels
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import check_rows, put_rows
from proxykd_jax.training.console import Console
from proxykd_jax.training.distillation import FRESH, teacher_rows
from proxykd_jax.training.draw_answers import Answerer
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.model import Model
from proxykd_jax.training.restore import aligned_proxy_identity, load_aligned_proxy
from proxykd_jax.training.times import timed

# Store of the scorer's answers to the prompts of D_s.
SCORER_TEXT = "scorer"
# The paper's Fig. 4 counts positions whose top-k probability exceeds this.
_LARGE_MASS = 0.95


class Scoring:
    """One run of the stage ``score``.

    Args:
      config: config of the run.
      corpus: corpus from ``prepare``.

    Attributes:
      folder: folder of the store of soft labels.
      config, corpus: as given.
      console: what a person sees.

    Raises:
      UserError: the mesh cannot split a batch, or ``top_k`` exceeds the vocabulary.
    """

    def __init__(self, config: Config, corpus: TokenCorpus) -> None:
        self._mesh = make_mesh(config.mesh.of("score"))
        self._sample_mesh = make_mesh(config.mesh.of("sample"))
        check_rows(config.score.batch_size, self._mesh, "score.batch_size")
        check_rows(config.align.sampling.batch_size, self._sample_mesh, "align.sampling.batch_size")
        if config.score.top_k > corpus.vocab_size:
            raise UserError(
                f"score.top_k: {config.score.top_k} log-probs a position, but the vocabulary has "
                f"{corpus.vocab_size} tokens. Choose at most as many."
            )
        self.folder = config.folder / "soft_labels"
        self.config, self.corpus = config, corpus
        self.console = Console("score")
        self._answered: dict[str, SampleStore] = {}
        self._proxy = aligned_proxy_identity(config)

    def teacher_rows(self) -> dict[str, Rows]:
        """Returns the teacher's answers that the student will see, by split."""
        return teacher_rows(self.config, self.corpus)

    def answer_fresh_prompts(self) -> dict[str, Rows]:
        """Lets the proxy answer prompts that the teacher has not answered, at temperature 1."""
        prompts = self.corpus.split(FRESH)
        answered = self.answer(FRESH, prompts, draw=0) if len(prompts) else ()
        return {FRESH: answered} if answered else {}

    def answer_distill_prompts(self) -> dict[str, Rows]:
        """Lets the scorer answer each prompt of D_s once, at temperature 1.

        Raises:
          UserError: it answered none.
        """
        answered = self.answer(SCORER_TEXT, self.corpus.split("distill"), draw=0)
        if not len(answered):
            raise UserError(
                f"The scorer answered none of the prompts of {self.corpus.folder} (split distill), "
                "so there is no text of it to learn from."
            )
        return {SCORER_TEXT: answered}

    def answer(
        self,
        name: str,
        prompts: TokenSplit,
        *,
        draw: int,
        temperature: float = 1.0,
        rows: Sequence[int] | None = None,
    ) -> AnsweredSplit:
        """Lets the proxy answer each prompt once, in ``samples/<name>``; continues a partial store.

        Empty answers are dropped and counted, and so are a server's answers that our tokens do not
        spell. Truncated ones are kept, without an end token.

        Args:
          name: name of the store, and of the split that is scored.
          prompts: a split; its own answers are ignored.
          draw: number of the draw; another number gives the same prompt another answer. Rounds of
            alignment count from 1, on other rows.
          temperature: temperature of sampling.
          rows: rows of the split whose prompts are answered (default: all).
        """
        sampling = self.config.align.sampling
        store = SampleStore(self.config.folder / "samples" / name)
        settings = {
            "round": draw,
            "seed": self.config.seed,
            "temperature": temperature,
            "top_p": 1.0,
            "max_new_tokens": sampling.max_new_tokens,
            "rows_per_part": sampling.rows_per_part,
            "server": sampling.decisive["server"],
            **({} if rows is None else {"rows": digest_value(list(map(int, rows)))}),
        }
        if not store.begin(settings, self.made_from):
            with timed(self.config.folder, "score"):
                answerer = Answerer(
                    self.config, self.corpus, self.model.config, self._weights, self._sample_mesh
                )
                answerer.fill(
                    store,
                    prompts,
                    range(len(prompts)) if rows is None else rows,
                    round_index=draw,
                    temperature=temperature,
                    against_teacher=False,
                    report=self.console.parts(f"answered prompts ({name}):"),
                )
                store.complete()
        self._answered[name] = store
        return AnsweredSplit(prompts, store)

    def begin(self, splits: dict[str, Rows]) -> bool:
        """Opens or creates the store; returns whether it is complete.

        Raises:
          UserError: it was made with other settings or by another proxy.
        """
        score = self.config.score
        settings = {
            "top_k": score.top_k,
            "temperature": score.temperature,
            "store_dtype": score.store_dtype,
            "vocab_size": self.corpus.vocab_size,
            "rows_per_part": score.rows_per_part,
            "splits": list(splits),
        }
        inputs = {
            "corpus": self.corpus.identity,
            "proxy": self._proxy,
            "tokenizer": self.corpus.tokenizer_digest,
            "template": self.corpus.manifest["inputs"]["template"],
        }
        for name, store in self._answered.items():
            inputs[name] = stage_identity(store.folder)
        complete = open_stage(self.folder, "score", settings, inputs)
        if not complete:
            self.console.begin(
                sum(-(-len(rows) // score.rows_per_part) for rows in splits.values())
            )
        return complete

    def score(self, name: str, rows: Rows) -> None:
        """Computes the parts of a split that are missing."""
        score = self.config.score
        label = functools.partial(
            top_k_labels,
            config=self.model.config,
            top_k=score.top_k,
            temperature=score.temperature,
            vocab_size=self.corpus.vocab_size,
        )
        score_split(
            rows,
            SoftLabelWriter(
                self.folder,
                name,
                vocab_size=self.corpus.vocab_size,
                top_k=score.top_k,
                store_dtype=score.store_dtype,
            ),
            self.scorer(label),
            end_token_ids=self.corpus.end_token_ids,
            rows_per_part=score.rows_per_part,
            report=self.console.parts(f"scored {name}:", counts=True),
        )

    def finish(self, splits: dict[str, Rows], log: MetricsLog) -> None:
        """Computes the figures, logs them and marks the store complete."""
        store = SoftLabelStore.unfinished(self.folder)
        figures = {name: split_figures(store, name) for name in splits}
        for name, answers in self._answered.items():
            counts = {f"samples/{k}": v for k, v in answers.counts().items()}
            figures.setdefault(name, {}).update(counts)
        line = {f"{name}/{k}": v for name, found in figures.items() for k, v in found.items()}
        # Log before marking the store complete. resume() drops the line of a run killed in between.
        log.resume("score", 0)
        log.write(stage="score", step=0, values=line)
        for name in figures.keys() & {"distill"}:
            kind = self.config.distill.weights.loglik
            found = figures[name]
            self.console.say(
                f"mu {found[f'{kind}/loglik_mean']:.4g}, gamma {found[f'{kind}/loglik_std']:.4g} "
                f"({kind}); correlation of the weights with length "
                f"{found[f'{kind}/weight_length_correlation']:.2f}; top-{store.top_k} mass above "
                f"{_LARGE_MASS} at {found['large_mass_share']:.0%} of positions"
            )
        self.console.close()
        counts = {name: found.get("rows", 0) for name, found in figures.items()}
        complete_stage(self.folder, counts=counts, figures=figures)

    @property
    def made_from(self) -> dict[str, Any]:
        """What identifies the proxy and the corpus."""
        return {"corpus": self.corpus.identity, "proxy": self._proxy}

    def scorer(self, label: Callable[[Any, Positions], Any]) -> RowScorer:
        """Returns what runs rows through the proxy and applies ``label(params, positions)``."""
        return RowScorer(
            *self._weights,
            self.model.config,
            functools.partial(label, self._weights[0]),
            self.config.score.batch_size,
            self.corpus.max_length,
            lambda batch: put_rows(batch, self._mesh),
        )

    @functools.cached_property
    def model(self) -> Model:
        """The aligned proxy, loaded only when something must be computed."""
        return load_aligned_proxy(self.config, self._mesh)

    @functools.cached_property
    def _weights(self) -> tuple[Any, Any]:
        """(params, adapter), bound once, because binding casts all weights with trainable: full."""
        return self.model.params, self.model.adapter


def split_figures(store: SoftLabelStore, name: str) -> dict[str, float]:
    """Returns what is reported about a split, in nats, for both log-likelihoods of eq. 9."""
    lengths, finished = store.lengths(name), store.finished(name)
    large = sum(
        int((store.top_k_mass(name, part) > _LARGE_MASS).sum())
        for part in range(store.num_parts(name))
    )
    figures: dict[str, float] = {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "finished": int(finished.sum()),
        "large_mass_share": large / max(int(lengths.sum()), 1),
    }
    for kind in ("sum", "token_mean"):
        found = weights_of(store.seq_logliks(name), lengths, finished, loglik=kind)
        figures[f"{kind}/loglik_mean"] = found.loglik_mean
        figures[f"{kind}/loglik_std"] = found.loglik_std
        figures[f"{kind}/weight_length_correlation"] = found.length_correlation
    return figures
