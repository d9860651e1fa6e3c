"""From a conversation to tokens, and the position of the answer in them.

A row is rendered twice: its prompt, as generation meets it, and the whole conversation. The answer
is found by characters, never by token ids:

- a template with ``{% generation %}`` marks it;
- otherwise it is what follows the prompt's text, with which the conversation's text must begin;
- a plain text is tokenised as a whole, and the prompt is its first tokens or sentences.

Texts are tokenised without adding anything, so a BOS is never doubled. The prompt has the tokens
that it has alone, because a sampled answer follows these, and the answer is tokenised apart: one
token could span the prompt's end and the answer's beginning. A tokenizer that puts a space before
every text needs the prompt in front of the answer; if a token spans the boundary there, another
text takes the prompt's place.

One token ends an answer (``Renderer.end_token_ids``): masks, sampling and evaluation ask here. It
is the control token that the template writes behind an answer, or else the tokenizer's EOS. It is
added if the template writes none. Text that a template writes after it is cut off, because no model
generates it. If only the answer's text counts (``with_end=False``), everything after that text is
cut off before tokenisation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from proxykd_jax.artifacts import digest_value
from proxykd_jax.config import CorpusConfig, SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.chat_template import BUILT_IN, ChatTemplate, split_marks, template_text
from proxykd_jax.texts.dialogues import Dialogues, is_written
from proxykd_jax.texts.habits import Habits, Thinking
from proxykd_jax.texts.records import TextRow
from proxykd_jax.texts.special_text import (
    ANSWER_END,
    SpecialText,
    first_control_token,
    has_reserved,
)
from proxykd_jax.texts.template_sandbox import TemplateTooCostly
from proxykd_jax.texts.text_prompts import sentences_end
from proxykd_jax.texts.tokenizer import Tokenizer

RESERVED_CHARACTERS = "holds reserved characters (private use, U+108000 to U+10F001)"
TEXT_IS_ALL_PROMPT = "the text is no longer than its prompt"
NOT_AS_IT_STANDS = "the template does not write the {role}'s text as it stands"
NOTHING_MARKED = "its answer is empty: the template's {% generation %} marks nothing"
NOT_THE_ANSWER_MARKED = "the template's {% generation %} marks other text than the answer"
NOTHING_LEFT = "the template leaves nothing of the answer; every token of a mask would be 0"
NOT_THE_BEGINNING = (
    "the answer cannot be found, because the rendered prompt is not the beginning of the rendered "
    "conversation"
)
NO_BOUNDARY = "the answer's tokens cannot be told from the prompt's"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_TOKENS = np.zeros(0, np.int32)
# Texts before a continuation, for tokenizers that put a space before a text of its own.
_ANCHORS = ("\n", "a", ".", "0", ")")
# A template's own message can quote a row; reasons are counted, so they must be few.
_REASON_CHARACTERS = 120


class Encoded(NamedTuple):
    """A row as tokens, or the reason why there are none.

    Attributes:
      tokens: int32[T].
      prompt_length: P; ``tokens[P:]`` is the answer, with its end token unless ``with_end=False``
        (empty for a prompt alone).
      drop: why the row is dropped; None if it is not.
      earlier: int32[n, 2], begin and end of each stretch of the prompt's tokens that is in the loss
        too; None for none.
      notes: what a reader should know about the row.
    """

    tokens: np.ndarray
    prompt_length: int
    drop: str | None = None
    earlier: np.ndarray | None = None
    notes: tuple[str, ...] = ()


class _Rendered(NamedTuple):
    """One row after rendering: texts to be tokenised.

    Attributes:
      row: the row.
      whole: the conversation's text up to its answer's end, or the text itself.
      prompt: the text before the answer; None for a plain text and for a prompt alone.
      renamed: control tokens have their private names.
      drop: why the row is dropped.
      spans: where earlier turns that are in the loss begin and end in the prompt's text.
      notes: what a reader should know.
    """

    row: TextRow
    whole: str
    prompt: str | None
    renamed: bool
    drop: str | None = None
    spans: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


class Renderer:
    """Turns rows of text into tokens with one tokenizer and one template.

    Args:
      tokenizer: the tokenizer.
      template: ``auto`` (the tokenizer's own), ``plain``, ``alpaca``, ``chatml``, ``llama2``, or a
        Jinja file.
      end_tokens: ids or texts of tokens that end an answer; the first is appended if the template
        writes none. By default it is the control token that the template writes behind an answer.
        If that is the tokenizer's EOS, or there is none, all ids of the folder's list
        ``eos_token_id`` end an answer, the EOS first.
      has_turns: False if all rows are plain texts. Then the template decides nothing.
      thinking: what happens to thoughts, as in the config.

    Attributes:
      end_token_ids: ids of the end tokens.
      template_text: the template; None without one (plain texts need none).
      template_digest: digest of the template.
      template_variables: texts of special tokens that the template is given.

    Raises:
      UserError: no such template or token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = "auto",
        end_tokens: Sequence[int | str] | None = None,
        *,
        has_turns: bool = True,
        thinking: Thinking = "keep",
    ) -> None:
        self.tokenizer = tokenizer
        self.template_name = template
        text = template_text(template, tokenizer.chat_template)
        if template == "chatml":
            self._require_tokens("<|im_start|>", "<|im_end|>")
        # Built-in templates start with a BOS only if the tokenizer adds one by itself. A
        # tokenizer's own template, or one from a file, decides for itself.
        variables = dict(tokenizer.special_texts)
        variables.setdefault("eos_token", "")
        variables.setdefault("bos_token", "")
        if text is not None and template in BUILT_IN:
            variables["bos_token"] = variables["bos_token"] if tokenizer.adds_bos else ""
        self.template_variables: dict[str, str] = variables
        self._template = None if text is None else ChatTemplate(text, variables)
        self._marks = text is not None and _GENERATION.search(text) is not None
        self.template_text = text
        self.template_digest = None if text is None else digest_value(text)
        self.end_token_ids = self._end_ids(end_tokens, has_turns)
        self._special = SpecialText(tokenizer.backend, self.end_token_ids)
        self._special_ends = [token for token in self.end_token_ids if token in self._special.ids]
        first = tokenizer.backend.encode("a", add_special_tokens=False).tokens
        self._begins_with_space = first != ["a"]
        self._dialogues = None if self._template is None else self._make_dialogues(thinking)

    @classmethod
    def of(cls, tokenizer: Tokenizer, corpus: CorpusConfig) -> Renderer:
        """The renderer of a corpus.

        Raises:
          UserError: no such template or token.
        """
        declared = all(
            source.format == "text" or source.prompt_tokens or source.prompt_sentences
            for source in (*corpus.sources, *corpus.test, *corpus.fresh_prompts)
        )
        return cls(
            tokenizer,
            corpus.template,
            corpus.end_tokens,
            has_turns=not declared,
            thinking=corpus.thinking,
        )

    def _make_dialogues(self, thinking: Thinking) -> Dialogues:
        assert self._template is not None
        names = (self.tokenizer.backend.id_to_token(token) for token in self.end_token_ids)
        return Dialogues(
            self._template,
            Habits(self._template),
            thinking,
            self._special.hide,
            self._special.reveal,
            tuple(self._special.reveal(name) for name in names),
            self._marks,
        )

    def encode(self, row: TextRow, source: SourceConfig | None = None) -> tuple[np.ndarray, int]:
        """Tokens and prompt length of one row. A row without an answer is all prompt.

        Raises:
          UserError: the row cannot be rendered, or its answer is empty or cannot be found.
        """
        (encoded,) = self.encode_all([row], source)
        return encoded.tokens, encoded.prompt_length

    def encode_all(
        self,
        rows: Sequence[TextRow],
        source: SourceConfig | None = None,
        *,
        prompts_only: bool = False,
        with_end: bool = True,
    ) -> list[Encoded]:
        """``encode_batch`` where no row may be dropped.

        Raises:
          UserError: a row would be dropped; the message names it.
        """
        found = self.encode_batch(rows, source, prompts_only=prompts_only, with_end=with_end)
        for row, encoded in zip(rows, found, strict=True):
            if encoded.drop:
                raise UserError(f"{row.origin}: {encoded.drop}.")
        return found

    def encode_batch(
        self,
        rows: Sequence[TextRow],
        source: SourceConfig | None = None,
        *,
        prompts_only: bool = False,
        with_end: bool = True,
    ) -> list[Encoded]:
        """Tokens of many rows of one source, tokenised on all cores.

        Args:
          rows: the rows.
          source: gives the length of a plain text's prompt (default: one sentence).
          prompts_only: keep only the prompt, also of a plain text.
          with_end: False leaves a conversation's answer open: no end token, and no other text that
            the template writes after it.

        Raises:
          UserError: a row is a conversation and there is no template.
        """
        rendered = [self._render(row, with_end) for row in rows]
        tokens, offsets = self._tokenize(rendered, source)
        prompts, earlier = self._tokenize_prompts(rendered)
        found = [
            self._finish(
                item, tokens[i], offsets.get(i), prompts.get(i), source, prompts_only, with_end
            )
            for i, item in enumerate(rendered)
        ]
        for i, item in enumerate(rendered):
            if (item.notes or i in earlier) and found[i].drop is None:
                found[i] = found[i]._replace(earlier=earlier.get(i), notes=item.notes)
        return found

    def text(self, row: TextRow) -> str:
        """The text that ``encode_batch`` tokenises if ``with_end`` is False, for other tools.

        Raises:
          UserError: the row cannot be rendered.
        """
        rendered = self._render(row, with_end=False)
        if rendered.drop:
            raise UserError(f"{row.origin}: {rendered.drop}.")
        return self._special.plain(rendered.whole) if rendered.renamed else rendered.whole

    def describe(self, row: TextRow, source: SourceConfig | None = None) -> str:
        """Shows a reader what is prompt, what is answer, and what was added."""
        (found,) = self.encode_all([row], source)
        tokens, prompt_length = found.tokens, found.prompt_length
        show = self.tokenizer.decode
        lines = [f"{row.origin}: {len(tokens)} tokens, of which {prompt_length} are the prompt"]
        begin = 0
        for first, last in () if found.earlier is None else found.earlier.tolist():
            lines.append(f"prompt (not in the loss): {show(tokens[begin:first])!r}")
            lines.append(f"  turn (in the loss):     {show(tokens[first:last])!r}")
            begin = last
        lines += [
            f"prompt (not in the loss): {show(tokens[begin:prompt_length])!r}",
            f"answer (in the loss):     {show(tokens[prompt_length:])!r}",
            "ends with: "
            + (repr(show(tokens[-1:])) if row.has_answer else "nothing, it is a prompt alone"),
        ]
        lines += [f"note: {note}" for note in dict.fromkeys(found.notes)]
        plain = row.text is None and all(message.extras is None for message in row.messages)
        if self._template is not None and plain and row.tools is None:
            named = [{"role": m.role, "content": f"({m.role})"} for m in row.messages]
            skeleton = self._template.render(named, add_generation_prompt=not row.has_answer)
            lines.append(f"the template around it:   {split_marks(skeleton)[0]!r}")
        if self._dialogues is not None and row.text is None:
            habits, thinking = self._dialogues.habits, self._dialogues.thinking
            thinks = any(message.thought is not None for message in row.messages)
            if thinks or habits.has_thoughts:
                lines.append(f"thoughts: {habits.about_thoughts(thinking)}")
        return "\n".join(lines)

    # --- rendering --------------------------------------------------------------------------------

    def _render(self, row: TextRow, with_end: bool = True) -> _Rendered:
        if _needs_more(row):
            return self._render_dialogue(row)
        contents = [row.text] if row.text is not None else [m.content for m in row.messages]
        if any(has_reserved(content) for content in contents):
            return _Rendered(row, "", None, False, RESERVED_CHARACTERS)
        quotes = any(self._special.occurs_in(content) for content in contents)
        if row.text is not None:
            return _Rendered(row, row.text, None, quotes)
        if self._template is None:
            raise self._no_template(row)
        hide = self._special.hide if quotes else str
        messages = [{"role": m.role, "content": hide(m.content)} for m in row.messages]
        try:
            whole, prompt = self._render_parts(self._template, messages, quotes, with_end)
        except TemplateTooCostly:
            raise
        except UserError as problem:
            return _Rendered(row, "", None, False, _reason(str(problem)))
        return _Rendered(row, whole, prompt, quotes)

    def _no_template(self, row: TextRow) -> UserError:
        return UserError(
            f"{row.origin} is a conversation, and the tokenizer {self.tokenizer.path} has no chat "
            "template. Set corpus.template to plain, alpaca, chatml, llama2 or a Jinja file."
        )

    def _render_dialogue(self, row: TextRow) -> _Rendered:
        """Renders a row with tools or thoughts, or in which several turns are in the loss."""
        if self._dialogues is None:
            raise self._no_template(row)
        texts = [row.tools or ""]
        for message in row.messages:
            extras = message.extras
            texts.append(message.content)
            if extras is not None:
                texts += [extras.thought or "", extras.calls or ""]
        if any(has_reserved(text) for text in texts):
            return _Rendered(row, "", None, False, RESERVED_CHARACTERS)
        try:
            found = self._dialogues.render(row)
        except TemplateTooCostly:
            raise
        except UserError as problem:
            return _Rendered(row, "", None, False, _reason(str(problem)))
        return _Rendered(row, found.whole, found.prompt, True, spans=found.spans, notes=found.notes)

    def _render_parts(
        self, template: ChatTemplate, messages: list[dict[str, str]], quotes: bool, with_end: bool
    ) -> tuple[str, str | None]:
        """The text up to the answer's end, and the text before the answer (None if there is none).

        Raises:
          UserError: the template fails, or it changes what is said; the message has no place.
        """
        reveal = self._special.reveal if quotes else str
        answer = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        asked = messages if answer is None else messages[:-1]
        prompt: str | None = None
        if answer is None or not self._marks:
            rendered = template.render(asked, add_generation_prompt=True)
            prompt = split_marks(reveal(rendered))[0]
            _check_said(rendered, [m for m in asked if m["role"] != "assistant"])
            if answer is None:
                return prompt, None
        if not with_end:
            messages = [*asked, {"role": "assistant", "content": answer + ANSWER_END}]
        text = template.render(messages, add_generation_prompt=False)
        if self._marks:
            _check_said(text, [m for m in asked if m["role"] != "assistant"])
        if with_end:
            _check_said(text, messages[-1:])
        else:
            text, mark, _ = text.rpartition(ANSWER_END)
            if not mark:
                raise UserError(NOT_AS_IT_STANDS.format(role="assistant"))
        whole, span = split_marks(reveal(text))
        if prompt is None:
            if span is None or span[0] == span[1]:
                raise UserError(NOTHING_MARKED)
            said = [{**message, "content": reveal(message["content"])} for message in asked]
            try:
                _check_said(whole[: span[0]], [m for m in said if m["role"] != "assistant"])
                _check_said(whole[slice(*span)], [{"role": "assistant", "content": reveal(answer)}])
            except UserError:
                raise UserError(NOT_THE_ANSWER_MARKED) from None
            return self._marked(whole, span, quotes), whole[: span[0]]
        if not whole.startswith(prompt):
            raise UserError(_not_the_beginning(prompt, whole, reveal(answer)))
        return whole, prompt

    def _marked(self, whole: str, span: tuple[int, int], quotes: bool) -> str:
        """The text up to the mark's end, or up to an end token just behind it."""
        for token in self.end_token_ids:
            name = self.tokenizer.backend.id_to_token(token)
            name = self._special.reveal(name) if quotes else name
            if whole.startswith(name, span[1]):
                return whole[: span[1] + len(name)]
        return whole[: span[1]]

    # --- tokens -----------------------------------------------------------------------------------

    def _tokenize(
        self, rendered: Sequence[_Rendered], source: SourceConfig | None
    ) -> tuple[list[np.ndarray], dict[int, np.ndarray]]:
        """int32[T] of every row, or of its answer alone, and int64[T, 2] offsets where needed."""
        by_sentence = source is None or source.prompt_tokens is None
        tokens = [_NO_TOKENS] * len(rendered)
        offsets: dict[int, np.ndarray] = {}
        groups: dict[tuple[bool, bool], list[int]] = {}
        for i, item in enumerate(rendered):
            needs = item.row.text is not None and by_sentence
            groups.setdefault((item.renamed, needs), []).append(i)
        for (renamed, needs), members in groups.items():
            texts = [rendered[i].whole[self._cut_at(rendered[i]) :] for i in members]
            for i, encoding in zip(members, self._cut(texts, renamed, needs), strict=True):
                tokens[i] = np.array(encoding.ids, np.int32)
                if needs:
                    offsets[i] = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return tokens, offsets

    def _tokenize_prompts(
        self, rendered: Sequence[_Rendered]
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """int32[T] of every prompt, and int32[n, 2] where it holds turns that are in the loss."""
        prompts: dict[int, np.ndarray] = {}
        earlier: dict[int, np.ndarray] = {}
        groups: dict[tuple[bool, bool], list[int]] = {}
        for i, item in enumerate(rendered):
            if item.prompt is not None:
                groups.setdefault((item.renamed, bool(item.spans)), []).append(i)
        for (renamed, needs), members in groups.items():
            texts = [rendered[i].prompt or "" for i in members]
            for i, encoding in zip(members, self._cut(texts, renamed, needs), strict=True):
                prompts[i] = np.array(encoding.ids, np.int32)
                if needs:
                    earlier[i] = _token_spans(encoding.offsets, rendered[i].spans)
        return prompts, earlier

    def _cut(self, texts: list[str], renamed: bool, with_offsets: bool) -> list:
        if not texts:
            return []
        # The tokenizer's threads end with the call. This setting avoids its warning when a process
        # forks afterwards.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        backend = self._special.backend if renamed else self.tokenizer.backend
        encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
        return encode(texts, add_special_tokens=False)

    def _finish(
        self,
        item: _Rendered,
        tokens: np.ndarray,
        offsets: np.ndarray | None,
        prompt: np.ndarray | None,
        source: SourceConfig | None,
        prompts_only: bool,
        with_end: bool,
    ) -> Encoded:
        row = item.row
        if item.drop:
            return Encoded(_NO_TOKENS, 0, item.drop)
        if row.text is not None:
            return self._finish_text(row, tokens, offsets, source, prompts_only)
        if prompt is None:
            return Encoded(tokens, len(tokens))
        start = len(prompt)
        if not self._begins_with_space:
            tokens = np.concatenate([prompt, tokens])
        elif start >= len(tokens) or not np.array_equal(tokens[:start], prompt):
            answer = self._behind_an_anchor(item)
            if answer is None:
                return Encoded(_NO_TOKENS, 0, NO_BOUNDARY)
            tokens = np.concatenate([prompt, answer])
        if with_end:
            tokens = self._end_answer(tokens, start)
        if all(token in self.end_token_ids for token in tokens[start:].tolist()):
            return Encoded(_NO_TOKENS, 0, NOTHING_LEFT)
        return Encoded(tokens, start)

    def _cut_at(self, item: _Rendered) -> int:
        """Where the text begins that is tokenised in one piece: at the answer, if that is apart."""
        return 0 if self._begins_with_space or item.prompt is None else len(item.prompt)

    def _behind_an_anchor(self, item: _Rendered) -> np.ndarray | None:
        """int32[T]: the answer's tokens behind another text; None if every boundary is spanned."""
        answer = item.whole[len(item.prompt or "") :]
        for anchor in _ANCHORS:
            (encoding,) = self._cut([anchor + answer], item.renamed, True)
            begins = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            before = int(np.sum(begins[:, 1] <= len(anchor)))
            if before and np.all(begins[before:, 0] >= len(anchor)):
                return np.array(encoding.ids[before:], np.int32)
        return None

    def _finish_text(
        self,
        row: TextRow,
        tokens: np.ndarray,
        offsets: np.ndarray | None,
        source: SourceConfig | None,
        prompts_only: bool,
    ) -> Encoded:
        text = row.text or ""
        if offsets is None:
            start = source.prompt_tokens if source and source.prompt_tokens else 0
        else:
            end = sentences_end(text, source)
            # A token that extends past the end of the sentence belongs to the prompt.
            start = len(tokens) if end is None else int(np.sum(offsets[:, 0] < end))
        if start >= len(tokens) and not prompts_only:
            return Encoded(_NO_TOKENS, 0, TEXT_IS_ALL_PROMPT)
        if self.tokenizer.adds_bos:
            tokens = np.concatenate([np.array([self.tokenizer.bos_id], np.int32), tokens])
            start += 1
        if prompts_only:
            return Encoded(tokens[:start], min(start, len(tokens)))
        return Encoded(self._end_answer(tokens, start), start)

    def _end_answer(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Cuts after the answer's end token, or appends one."""
        ends = np.flatnonzero(np.isin(tokens[start:], self._special_ends))
        if len(ends):
            return tokens[: start + int(ends[0]) + 1]
        # An end token that is ordinary text ends the answer only if nothing follows.
        if len(tokens) > start and tokens[-1] in self.end_token_ids:
            return tokens
        return np.append(tokens, np.int32(self.end_token_ids[0]))

    # --- end tokens -------------------------------------------------------------------------------

    def _end_ids(self, end_tokens: Sequence[int | str] | None, has_turns: bool) -> tuple[int, ...]:
        if end_tokens:
            return tuple(dict.fromkeys(self.tokenizer.token_id(token) for token in end_tokens))
        written = self._written_end() if has_turns else None
        if written is not None and written != self.tokenizer.eos_id:
            return (written,)
        if not self.tokenizer.eos_ids:
            raise UserError(
                f"The tokenizer {self.tokenizer.path} names no EOS token; give the tokens that "
                "end an answer in corpus.end_tokens."
            )
        return self.tokenizer.eos_ids

    def _written_end(self) -> int | None:
        """The control token that the template writes behind an answer, or None."""
        if self._template is None:
            return None
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": f"b{ANSWER_END}"},
        ]
        try:
            text = self._template.render(messages, add_generation_prompt=False)
        except UserError:  # then its rows say why
            return None
        _, written, after = split_marks(text)[0].rpartition(ANSWER_END)
        return first_control_token(self.tokenizer.backend, after) if written else None

    def _require_tokens(self, *texts: str) -> None:
        missing = [text for text in texts if text not in self.tokenizer.vocabulary]
        if missing:
            raise UserError(
                f"corpus.template: chatml needs the token {missing[0]}, which the tokenizer "
                f"{self.tokenizer.path} does not have. Use plain, alpaca or llama2."
            )


def _needs_more(row: TextRow) -> bool:
    """Whether a row has tools or thoughts, or several turns in the loss."""
    if row.tools is not None or any(message.extras is not None for message in row.messages):
        return True
    return row.every_turn and sum(message.role == "assistant" for message in row.messages) > 1


def _token_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Any:
    """int32[n, 2]: the tokens that lie within stretches of a text; a token that spans a bound does
    not."""
    bounds = np.array(offsets, np.int64).reshape(-1, 2)
    found = []
    for begin, end in spans:
        inside = np.flatnonzero((bounds[:, 0] >= begin) & (bounds[:, 1] <= end))
        if len(inside):
            found.append((inside[0], inside[-1] + 1))
    return np.array(found, np.int32).reshape(-1, 2)


def _check_said(rendered: str, messages: Sequence[dict[str, str]]) -> None:
    """Checks that a template writes what is said; it may trim it and change its white space.

    Raises:
      UserError: it does not.
    """
    for message in messages:
        if not is_written(message["content"], rendered):
            raise UserError(NOT_AS_IT_STANDS.format(role=message["role"]))


def _not_the_beginning(prompt: str, whole: str, answer: str) -> str:
    """Why the answer is not behind its prompt."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    shared = next((n for n, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
    extra = prompt[shared:]
    if len(extra) < _REASON_CHARACTERS and whole.startswith(answer.strip(), shared):
        return (
            f"the template's generation prompt ends with {extra!r}, which it does not write before "
            "the answer of a whole conversation"
        )
    return NOT_THE_BEGINNING


def _reason(problem: str) -> str:
    line = problem.splitlines()[0] if problem.strip() else "the chat template fails"
    return line if len(line) <= _REASON_CHARACTERS * 2 else f"{line[: _REASON_CHARACTERS * 2]}..."
