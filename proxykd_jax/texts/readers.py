"""Reads a source of the config as an iterator of rows, in constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.answers import Answers, load_answers
from proxykd_jax.texts.benchmark_files import (
    BENCHMARK_KEYS,
    SoughtText,
    benchmark_conversations,
    benchmark_examples,
    benchmark_format,
    benchmark_item,
    benchmark_unread,
    item_id,
    mt_bench_turns,
    sought_texts,
)
from proxykd_jax.texts.columnar_files import read_dataset, read_tfds
from proxykd_jax.texts.columns import check_columns, with_columns
from proxykd_jax.texts.conversations import Conversation, RawTurns, checked_text, expand_turns
from proxykd_jax.texts.files import list_files, read_file, source_files
from proxykd_jax.texts.formats import (
    FORMATS,
    check_row,
    check_teacher,
    conversations_of,
    is_prompt,
    unread,
)
from proxykd_jax.texts.layouts import describe_keys, unknown_layout
from proxykd_jax.texts.records import Drops, Notes, RowProblem, TextRow, UnreadableRow
from proxykd_jax.texts.teachers import ModelCount

Record = Mapping[str, Any]
# How end tokens are written in the tokenizers of the families that answers are collected from.
_END_MARKS = (
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|EOT|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<|assistant_end|>",
    "<|eos|>",
)
_END_CHARACTERS = 40


def source_pieces(source: SourceConfig, *, held_out: bool) -> list[SourceConfig]:
    """Splits a source into its files, each as a source that can be read separately.

    Read in order, they give the source's rows. A source stays whole if it is not a list of files,
    or if it has a ``limit``, whose end is known only by reading in order. ``held_out`` as in
    ``source_files``.

    Raises:
      UserError: its path matches nothing.
    """
    if source.path is None or source.limit is not None:
        return [source]
    files = source_files(source.path, held_out=held_out).files
    return [source.model_copy(update={"path": str(file)}) for file in files]


def no_usable_row(source: SourceConfig, drops: Drops) -> UserError:
    """The error for a source without usable rows; ``drops`` counts the dropped rows."""
    return UserError(
        f"{source.path or source.dataset or source.tfds} gives no row that can be used. "
        f"Left out: {drops if drops.total else 'nothing, it is empty'}."
    )


def read_source(
    source: SourceConfig,
    *,
    prompts_only: bool,
    drops: Drops,
    notes: Notes | None = None,
    source_index: int = 0,
    held_out: bool = False,
    is_piece: bool = False,
) -> Iterator[TextRow]:
    """Reads a source lazily, in the order of its files and their rows.

    Args:
      source: files, a Hugging Face dataset or a TFDS builder. ``source.limit`` counts the rows
        that are yielded.
      prompts_only: yield prompts, which end with the user; answers are not needed, and existing
        ones are dropped. Otherwise every row ends with the teacher's answer. Plain texts are the
        same in both cases.
      drops: counts dropped rows. A damaged row does not stop the reading; a damaged file does.
      notes: counts keys that hold text and are not read, and answers that end with the text of an
        end token.
      source_index: copied into the rows.
      held_out: the rows are a test set, which decides on the files (``files.source_files``).
      is_piece: the source comes from ``source_pieces`` and may give no row.

    Raises:
      UserError: the source is missing, damaged or of another format, or gives no row at all.
    """
    answers = load_answers(source.answers, source.teacher) if source.answers is not None else None
    own_drops, own_notes = Drops(), Notes()
    every_turn = source.turns == "all" and not prompts_only
    count = 0
    try:
        for place, records in _parts(source, held_out):
            models = ModelCount(source.teacher)
            try:
                for text, turns, origin in _rows(
                    place, records, source, prompts_only, answers, models, own_drops, own_notes
                ):
                    count += 1
                    yield TextRow(
                        turns.messages,
                        text,
                        origin,
                        source_index,
                        tools=turns.tools,
                        every_turn=every_turn and text is None,
                    )
                    if count == source.limit:
                        return
            finally:
                if (mixed := models.mixed()) is not None:
                    own_notes.add(mixed[0], place, "", mixed[1])
    finally:
        drops.merge(own_drops)
        if notes is not None:
            notes.merge(own_notes)
    if not count and not is_piece:
        raise no_usable_row(source, own_drops)


def read_records(source: SourceConfig) -> Iterator[tuple[str, Record, str]]:
    """(format, record, origin) of every row of a source or item of a benchmark, unchanged.

    Raises:
      UserError: the source is missing, damaged or of another format.
    """
    for _, records in _parts(source, held_out=False):
        name: str | None = None
        for found, origin in records:
            if isinstance(found, UnreadableRow):
                continue
            if name is None:
                check_columns(found, origin, source.columns, prompts_only=True)
            try:
                record = with_columns(found, source.columns, prompts_only=True)
            except RowProblem:
                continue
            name = name or _format_of(record, origin, source)
            if name in BENCHMARK_KEYS:
                for example, place in benchmark_examples(name, record, origin):
                    yield name, example, place
            elif FORMATS[name].fits(record):
                yield name, record, origin


def _parts(
    source: SourceConfig, held_out: bool
) -> Iterator[tuple[str, Iterable[tuple[Record, str]]]]:
    """(name, records) of each file, or of the dataset. Each has one format."""
    if source.path is not None:
        for path in source_files(source.path, held_out=held_out).files:
            yield str(path), read_file(path)
    elif source.dataset is not None:
        yield source.dataset, read_dataset(source.dataset, source.split, source.subset)
    else:
        assert source.tfds is not None  # the config requires one of the three
        yield source.tfds, read_tfds(source.tfds, source.split)


def _rows(
    place: str,
    records: Iterable[tuple[Record, str]],
    source: SourceConfig,
    prompts_only: bool,
    answers: Answers | None,
    models: ModelCount,
    drops: Drops,
    notes: Notes,
) -> Iterator[tuple[str | None, Conversation, str]]:
    name: str | None = None
    for found, origin in records:
        try:
            if isinstance(found, UnreadableRow):
                raise RowProblem(found.reason)
            if name is None:
                check_columns(found, origin, source.columns, prompts_only=prompts_only)
            record = with_columns(found, source.columns, prompts_only=prompts_only)
            if name is None:
                name = _format_of(record, origin, source)
                _check_part(name, record, place, source, prompts_only, answers)
            if name in BENCHMARK_KEYS:
                yield from _benchmark_rows(
                    name, record, origin, source, prompts_only, answers, drops, notes
                )
                continue
            if not FORMATS[name].fits(record):
                raise RowProblem(f"keys or types that do not fit the format {name}")
            if not prompts_only and answers is None:
                another = models.problem(record)
                if another is not None:
                    raise RowProblem(another)
            for key, shown in unread(name, record):
                notes.add(not_read(key), origin, shown)
            if name == "text":
                check_row(record, prompts_only)
                text = checked_text(record["text"], "empty text")
                _note_end(text, origin, notes)
                yield text, Conversation(()), origin
                continue
            conversations: Iterable[RawTurns] = conversations_of(
                name, record, source, prompts_only or answers is not None
            )
            if answers is not None and not prompts_only:
                if name != "batch" and not is_prompt(name, record):
                    raise RowProblem("a row with an answer of its own beside the file of answers")
                (asked,) = conversations
                conversations = _answered(name, record, origin, asked, answers, notes)
        except RowProblem as problem:
            drops.add(str(problem), origin)
            continue
        # A request of a batch is one prompt, whatever turns it has.
        keep = "last" if name == "batch" and prompts_only else source.turns
        yield from _expand(conversations, origin, keep, prompts_only, drops, notes)


def _benchmark_rows(
    name: str,
    record: Record,
    origin: str,
    source: SourceConfig,
    prompts_only: bool,
    answers: Answers | None,
    drops: Drops,
    notes: Notes,
) -> Iterator[tuple[None, Conversation, str]]:
    for example, place in benchmark_examples(name, record, origin):
        for key, shown in benchmark_unread(name, example):
            notes.add(not_read(key), place, shown)
        try:
            conversations = benchmark_conversations(name, example, place, answers, prompts_only)
        except RowProblem as problem:
            drops.add(str(problem), place)
            continue
        _note_unread(conversations, place, notes)
        yield from _expand(conversations, place, source.turns, prompts_only, drops, notes)


def _answered(
    name: str, record: Record, origin: str, asked: RawTurns, answers: Answers, notes: Notes
) -> list[RawTurns]:
    """A prompt with each of its answers, which are found by id, or by what the user says."""
    own = record.get("custom_id" if name == "batch" else "id")
    said = [turn.content for turn in asked if turn.role == "user"]
    text = said[0] if len(said) == 1 and isinstance(said[0], str) else ""
    found = answers.find(item_id(origin) if own is None else str(own), text)
    conversations: list[RawTurns] = [[*asked, answer] for answer in found]
    _note_unread(conversations, origin, notes)
    return conversations


def _note_unread(conversations: Iterable[RawTurns], origin: str, notes: Notes) -> None:
    """Notes keys beside answers that lie in a file of their own."""
    for key, shown in (found for t in conversations for u in t for found in u.unread):
        notes.add(not_read(key), origin, shown)


def _expand(
    conversations: Iterable[RawTurns],
    origin: str,
    keep: Literal["last", "each", "all"],
    prompts_only: bool,
    drops: Drops,
    notes: Notes,
) -> Iterator[tuple[None, Conversation, str]]:
    def left_out(reason: str) -> None:
        drops.add(reason, origin)

    def noted(note: str) -> None:
        notes.add(note, origin, "<tools>")

    for turns in conversations:
        try:
            for found in expand_turns(
                turns,
                keep=keep,
                prompts_only=prompts_only,
                left_out=left_out,
                noted=noted,
            ):
                if not prompts_only:
                    _note_end(found.messages[-1].content, origin, notes)
                yield None, found, origin
        except RowProblem as problem:
            drops.add(str(problem), origin)


def not_read(key: str) -> str:
    """The note about a key that holds text and is not read."""
    return f"the key {key} is not read"


def _note_end(text: str, origin: str, notes: Notes) -> None:
    """Notes a text that ends with an end token's letters, as a careless collection leaves them."""
    tail = text[-_END_CHARACTERS:].rstrip()
    if tail.endswith(_END_MARKS):
        mark = next(mark for mark in _END_MARKS if tail.endswith(mark))
        notes.add(f"ends with the text {mark}, which is learnt as letters", origin, tail)


def _format_of(record: Record, origin: str, source: SourceConfig) -> str:
    """The format of a file, determined from its first row."""
    given = source.row_format
    if given != "auto":
        fits = (
            benchmark_format(record) == given
            if given in BENCHMARK_KEYS
            else FORMATS[given].fits(record)
        )
        if not fits:
            keys = BENCHMARK_KEYS.get(given) or FORMATS[given].keys
            raise UserError(
                f"{origin} does not fit format: {given}. It has the keys "
                f"{describe_keys(record)}; the format needs {keys}."
            )
        return given
    name = next((name for name, entry in FORMATS.items() if entry.fits(record)), None)
    name = name or benchmark_format(record)
    if name is None:
        raise unknown_layout(record, origin)
    return name


def _check_part(
    name: str,
    record: Record,
    place: str,
    source: SourceConfig,
    prompts_only: bool,
    answers: Answers | None,
) -> None:
    """Checks a whole file by its first row, before its rows are read."""
    if name in (*BENCHMARK_KEYS, "batch"):
        if answers is None and not prompts_only:
            raise UserError(
                f"{place} is of the format {name}, which has questions and no teacher's answers. "
                "Name the file of answers ({id or prompt, response}, or a batch's output) under "
                "answers."
            )
    elif answers is not None and not is_prompt(name, record):
        raise UserError(
            f"{place} is of the format {name}, whose rows bring their own answers: answers may "
            f"be given for {', '.join(BENCHMARK_KEYS)}, batch, and for prompts without responses. "
            "Remove the key."
        )
    if name == "openorca" and not prompts_only:
        check_teacher(source, place)


def sought_in_corpus(path: str) -> Iterator[SoughtText]:
    """The questions of a benchmark's files, to search for in a corpus.

    Official forms and their public copies are recognised. In any other file that ``read_source``
    can read, the user's messages are the questions. Items without a question are skipped.

    Args:
      path: file, folder or glob.

    Raises:
      UserError: there are no files, or a file is damaged or of unknown format.
    """
    for file in list_files(path):
        records = read_file(file)
        first = next(records)
        records = chain([first], records)
        name = benchmark_format(first[0])
        if name is not None:
            yield from _sought_items(name, records)
            continue
        source = SourceConfig(path=str(file), turns="last")
        read = _rows(str(file), records, source, True, None, ModelCount(None), Drops(), Notes())
        for text, turns, _ in read:
            asked = [m.content for m in turns.messages if m.role == "user"]
            said = [text] if text is not None else asked
            yield from (SoughtText(found, False) for found in said)


def _sought_items(name: str, records: Iterable[tuple[Record, str]]) -> Iterator[SoughtText]:
    for record, origin in records:
        for example, _ in benchmark_examples(name, record, origin):
            try:
                if name == "mt_bench":
                    yield from (SoughtText(text, False) for text in mt_bench_turns(example))
                else:
                    yield from sought_texts(benchmark_item(name, example))
            except RowProblem:
                continue
