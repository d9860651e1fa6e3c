"""Mentor-KD (arXiv 2410.09037): a mentor adds rationales of its own, and its distribution.

1. The mentor is the proxy after training by NLL on the teacher's texts (``align`` without
   preferences).
2. It answers every prompt ``num_rationales`` times, at temperature 0.7.
3. ``filter: answer_match`` keeps the teacher's and the mentor's texts whose final answer is the
   gold one (``texts/golds.py``). It also drops rows without a gold. All are counted.
4. The mentor scores the texts that are kept.
5. The student minimises (1 - lam) NLL + lam KL(mentor || student) at temperature T on these texts.

Texts are kept as written, while the authors append the gold answer after "-->". The authors train
the mentor on correct texts alone, while here it learns from all of D_w and D_p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from proxykd_jax.config import Config
from proxykd_jax.config.methods import MentorKd
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.corpus import TokenCorpus, TokenSplit
from proxykd_jax.errors import UserError
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.texts.golds import Golds, is_correct, prompt_key, read_golds
from proxykd_jax.texts.tokenizer import Tokenizer, load_tokenizer
from proxykd_jax.training.batches import Selection
from proxykd_jax.training.distillation import label_phase, teacher_rows
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun

CORRECT, WRONG, NO_GOLD = "correct", "wrong", "no_gold"
_AT_ONCE = 512


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns the teacher's and the mentor's texts, except those with a wrong answer."""
    config, corpus, method = scoring.config, scoring.corpus, _method(scoring.config)
    golds = _golds(config, corpus)
    for split in teacher_rows(config, corpus):
        prompts = corpus.split(split)
        asked = _prompts_to_ask(prompts, golds)
        for draw in range(method.num_rationales):
            scoring.answer(
                _name(split, draw),
                prompts,
                draw=draw,
                temperature=method.sample_temperature,
                rows=asked,
            )
    kept, counts = _kept(corpus, _texts(config, corpus), golds)
    if golds is not None:
        listed = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
        scoring.console.say(f"texts by final answer: {listed}")
    return kept


def phases(run: StageRun) -> list[Phase]:
    """Returns the phase of NLL and KL on the scored texts; all examples have equal weights."""
    config, corpus, method = run.config, run.corpus, _method(run.config)
    if run.scorer is not None:  # a sketch does not know which texts are correct
        texts = _texts(config, corpus, drawn=False)
        return [label_phase(run, texts, nll_splits=tuple(texts), rescale=method.rescale)]
    kept, counts = _kept(corpus, _texts(config, corpus), _golds(config, corpus))
    phase = label_phase(run, kept, nll_splits=tuple(kept), rescale=method.rescale)
    figures = {f"texts/{name}": count for name, count in counts.items()}
    return [phase.with_(before=lambda state: {**phase.before(state), **figures})]


def _method(config: Config) -> MentorKd:
    assert isinstance(config.method, MentorKd)
    return config.method


def _name(split: str, draw: int) -> str:
    return f"{split}_rationales_{draw + 1:02d}"


def _golds(config: Config, corpus: TokenCorpus) -> Golds | None:
    """Returns the gold answers, or None if nothing is filtered."""
    if _method(config).filter == "none":
        return None
    golds = read_golds(config, load_tokenizer(corpus.tokenizer_path))
    if not golds:
        raise UserError(
            "method.filter is answer_match, but no row of corpus.sources has a gold answer: give "
            "benchmark training sets (gsm8k, arc, csqa, mmlu, agieval, bbh) or rows with the key "
            "gold, or set method.filter: none, which keeps every text."
        )
    return golds


def _prompts_to_ask(prompts: TokenSplit, golds: Golds | None) -> list[int]:
    """Returns one row for each prompt whose answers can be checked: its first row."""
    first: dict[bytes, int] = {}
    for start in range(0, len(prompts), _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, len(prompts)))
        for number, row in zip(rows, prompts.read(rows), strict=True):
            key = prompt_key(row.prompt)
            if golds is None or key in golds:
                first.setdefault(key, number)
    return list(first.values())


def _texts(config: Config, corpus: TokenCorpus, *, drawn: bool = True) -> dict[str, Rows]:
    """Returns all texts of teacher and mentor; before the mentor's are drawn, their prompts."""
    texts = dict(teacher_rows(config, corpus))
    for split in list(texts):
        for draw in range(_method(config).num_rationales):
            name, prompts = _name(split, draw), corpus.split(split)
            store = SampleStore(config.folder / "samples" / name)
            texts[name] = AnsweredSplit(prompts, store) if drawn else prompts
    return texts


def _kept(
    corpus: TokenCorpus, texts: Mapping[str, Rows], golds: Golds | None
) -> tuple[dict[str, Rows], dict[str, int]]:
    """Returns the texts to learn from, by split, and the counts ``<split>/<verdict>``.

    Raises:
      UserError: no text is left.
    """
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    kept: dict[str, Rows] = {}
    counts: Counter[str] = Counter()
    for name, rows in texts.items():
        if golds is None:
            kept[name], counts[f"{name}/unfiltered"] = rows, len(rows)
            continue
        verdicts = _verdicts(rows, golds, tokenizer, corpus.end_token_ids)
        counts.update(f"{name}/{verdict}" for verdict in verdicts)
        places = np.flatnonzero(np.array(verdicts, object) == CORRECT).astype(np.int32)
        kept[name] = Selection(rows, places)
    kept = {name: rows for name, rows in kept.items() if len(rows)}
    if not kept:
        raise UserError(
            "method.filter is answer_match, and no text of teacher or mentor has the gold answer "
            f"({dict(counts)}), so there is nothing to learn from. Check the golds of the "
            "sources, or set method.filter: none."
        )
    return kept, dict(counts)


def _verdicts(
    rows: Rows, golds: Golds, tokenizer: Tokenizer, end_token_ids: Sequence[int]
) -> list[str]:
    """Returns a verdict for each row; a truncated text has no final answer, so it is wrong."""
    found = []
    for start in range(0, len(rows), _AT_ONCE):
        for row in rows.read(range(start, min(start + _AT_ONCE, len(rows)))):
            known = golds.get(prompt_key(row.prompt), [])
            text = tokenizer.decode(row.answer[:-1], skip_special=True)
            finished = int(row.answer[-1]) in end_token_ids
            right = finished and any(is_correct(text, gold) for gold in known)
            found.append(CORRECT if right else WRONG if known else NO_GOLD)
    return found
