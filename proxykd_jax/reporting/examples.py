"""Prompts with the teacher's and the proxy's answers, as the run stored them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import SPLITS, TokenCorpus, TokenSplit, open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.generation.samples import DROP_REASONS, KEPT, SampledRow, SampleStore
from proxykd_jax.reporting.blocks import Answers, Block, Fold, Section, Text, shown
from proxykd_jax.reporting.curves import phase_name
from proxykd_jax.reporting.run_folder import UNREADABLE, RunFolder, told
from proxykd_jax.texts.tokenizer import Tokenizer, load_tokenizer

# Number of answers shown of each store, and of letters of each text.
_SHOWN, _LETTERS = 4, 1500
# The store whose answers are the untrained student's (SODA).
STUDENTS = "base_student"


def texts(run: RunFolder) -> Section:
    """A few answers of each store in ``samples/``."""
    title = "Answers while training"
    if not run.is_complete("corpus"):
        return Section(title, [Text("There is no corpus to take prompts from.", missing=True)])
    corpus = open_corpus(run.folder / "corpus")
    tokenizer = _tokenizer(run, corpus)
    if tokenizer is None:
        text = f"The tokenizer, {corpus.tokenizer_path}, is not on this machine: no text is shown."
        return Section(title, [Text(text, missing=True)])
    folders = sorted(p for p in (run.folder / "samples").glob("*") if p.is_dir())
    blocks: list[Block] = []
    for folder in folders:
        try:
            found = _of_store(folder, corpus, tokenizer)
        except UNREADABLE as error:
            found = [Text(f"samples/{folder.name}: {told(error)}", missing=True)]
        if found:
            blocks.append(Fold(_store_name(folder.name), found))
    if not blocks:
        rows = _teacher_rows(corpus, tokenizer)
        note = Text("The run stored no answers of its own; these are the teacher's.", missing=True)
        return Section(title, [note, *rows])
    intro = (
        "Each round asks the proxy other prompts: the first round asks the warmed-up proxy, a "
        "later one the proxy after the rounds before it. Special tokens are shown as they are."
    )
    return Section(title, [Text(intro), *blocks])


def _tokenizer(run: RunFolder, corpus: TokenCorpus) -> Tokenizer | None:
    """The corpus's tokenizer, or the copy exported with the student. Nothing is downloaded."""
    for place in (Path(corpus.tokenizer_path), run.folder / "export" / "student"):
        if place.is_dir():
            try:
                return load_tokenizer(place)
            except UserError:
                continue
    return None


def _store_name(name: str) -> str:
    if name.startswith("round_"):
        return f"Round {phase_name(name)[1:]}: the proxy's answers before the round's training"
    if name == STUDENTS:
        return "The untrained student's answers"
    if name == "fresh":
        return "Fresh prompts: the aligned proxy's answers"
    return f"samples/{name}"


def _of_store(folder: Path, corpus: TokenCorpus, tokenizer: Tokenizer) -> list[Block]:
    store = SampleStore(folder)
    count = len(store)
    if not count:
        return []
    # Evenly spread over the store, whose order has no meaning.
    places = sorted({i * count // _SHOWN for i in range(min(_SHOWN, count))})
    sampled = store.read(places)
    prompts = _prompts(corpus, sampled[0])
    if prompts is None:
        return [Text("These answers are to prompts of another corpus.", missing=True)]
    chosen, rejected = store.references()
    rows = prompts.read([answer.row for answer in sampled])
    who = "student" if folder.name == STUDENTS else "proxy"
    return [
        _answers(row, answer, tokenizer, who, (float(chosen[at]), float(rejected[at])))
        for at, row, answer in zip(places, rows, sampled, strict=True)
    ]


def _prompts(corpus: TokenCorpus, sampled: SampledRow) -> TokenSplit | None:
    """The split that contains an answer's prompt."""
    for name in SPLITS:
        split = corpus.split(name)
        if sampled.row < len(split) and split.row_ids[sampled.row] == sampled.row_id:
            return split
    return None


def _answers(
    row: TokenRow,
    sampled: SampledRow,
    tokenizer: Tokenizer,
    who: str,
    reference: tuple[float, float],
) -> Answers:
    remarks = [f"{len(sampled.tokens)} tokens"]
    if not sampled.finished:
        remarks.append("not finished")
    if sampled.drop != KEPT:
        remarks.append(f"left out: {DROP_REASONS[sampled.drop].replace('_', ' ')}")
    likely = ["", ""]
    if any(reference):
        likely = [f", log-likelihood before the round {shown(value, 1)}" for value in reference]
    said = [("prompt", _text(row.prompt, tokenizer), f"{row.prompt_length} tokens")]
    answer = row.tokens[row.prompt_length :]
    if len(answer):
        remark = f"{len(answer)} tokens{likely[0]}"
        said.append(("teacher", _text(answer, tokenizer), remark))
    said.append((who, _text(sampled.tokens, tokenizer), ", ".join(remarks) + likely[1]))
    return Answers(f"Row {sampled.row_id[:12]}", said)


def _teacher_rows(corpus: TokenCorpus, tokenizer: Tokenizer) -> list[Block]:
    split = next((corpus.split(n) for n in ("distill", "align") if len(corpus.split(n))), None)
    rows = [] if split is None else split.read(range(min(_SHOWN, len(split))))
    return [
        Answers(
            f"Row {row.row_id[:12]}",
            [
                ("prompt", _text(row.prompt, tokenizer), f"{row.prompt_length} tokens"),
                ("teacher", _text(row.tokens[row.prompt_length :], tokenizer),
                 f"{len(row.tokens) - row.prompt_length} tokens"),
            ],
        )
        for row in rows
    ]  # fmt: skip


def _text(tokens: Any, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode(tokens)
    if len(text) <= _LETTERS:
        return text
    return f"{text[:_LETTERS]} … ({len(text) - _LETTERS:,} more letters)"
