"""From a conversation to tokens, and the position of the answer in them.

A row is rendered once and tokenised without adding anything, so a BOS is never doubled. The answer
is found by position, never by token ids:

- a template with ``{% generation %}`` marks it;
- otherwise the prompt, rendered with ``add_generation_prompt``, must match the beginning of the
  whole conversation token for token, and the answer is the rest;
- a plain text is tokenised as a whole, and the prompt is its first tokens or sentences.

The answer includes its end token, which is added if the template writes none. Text that a template
writes after the end token is cut off, because no model generates it. If only the answer's text
counts (``with_end=False``), everything after that text is cut off before tokenisation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from proxykd_jax.artifacts import digest_value
from proxykd_jax.config import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.chat_template import ChatTemplate, split_marks, template_text
from proxykd_jax.texts.records import TextRow
from proxykd_jax.texts.special_text import ANSWER_END, SpecialText, has_reserved
from proxykd_jax.texts.text_prompts import sentences_end
from proxykd_jax.texts.tokenizer import Tokenizer

RESERVED_CHARACTERS = "holds reserved characters (private use, U+108000 to U+10F001)"
TEXT_IS_ALL_PROMPT = "the text is no longer than its prompt"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_TOKENS = np.zeros(0, np.int32)


class Encoded(NamedTuple):
    """A row as tokens, or the reason why there are none.

    Attributes:
      tokens: int32[T].
      prompt_length: P; ``tokens[P:]`` is the answer, with its end token unless ``with_end=False``
        (empty for a prompt alone).
      drop: why the row is dropped; None if it is not.
    """

    tokens: np.ndarray
    prompt_length: int
    drop: str | None = None


class _Rendered(NamedTuple):
    """One row after rendering: texts to be tokenised."""

    row: TextRow
    whole: str
    prompt: str | None  # None if span or the text itself determines the answer
    span: tuple[int, int] | None
    renamed: bool  # control tokens have their private names
    drop: str | None = None


class Renderer:
    """Turns rows of text into tokens with one tokenizer and one template.

    Args:
      tokenizer: the tokenizer.
      template: ``auto`` (the tokenizer's own), ``plain``, ``alpaca``, ``chatml``, ``llama2``, or a
        Jinja file.
      end_tokens: ids or texts of tokens that end an answer; the first is appended if the template
        writes none. Default: the tokenizer's EOS (``chatml``: ``<|im_end|>``).

    Attributes:
      end_token_ids: ids of the end tokens.
      template_text: the template; None without one (plain texts need none).
      template_digest: digest of the template.

    Raises:
      UserError: no such template or token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = "auto",
        end_tokens: Sequence[int | str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_name = template
        self._special = SpecialText(tokenizer.backend)
        text = template_text(template, tokenizer.chat_template)
        if template == "chatml":
            self._require_tokens("<|im_start|>", "<|im_end|>")
            end_tokens = end_tokens or ("<|im_end|>",)
        self.end_token_ids = self._end_ids(end_tokens)
        self._special_ends = [token for token in self.end_token_ids if token in self._special.ids]
        # Built-in templates start with a BOS only if the tokenizer adds one by itself. A
        # tokenizer's own template, or one from a file, decides for itself.
        variables = dict(tokenizer.special_texts)
        variables.setdefault("eos_token", "")
        variables.setdefault("bos_token", "")
        if text is not None and template in ("plain", "alpaca", "chatml", "llama2"):
            variables["bos_token"] = variables["bos_token"] if tokenizer.adds_bos else ""
        self._template = None if text is None else ChatTemplate(text, variables)
        self._marks = text is not None and _GENERATION.search(text) is not None
        self.template_text = text
        self.template_digest = None if text is None else digest_value(text)

    def encode(self, row: TextRow, source: SourceConfig | None = None) -> tuple[np.ndarray, int]:
        """Tokens and prompt length of one row. A row without an answer is all prompt.

        Raises:
          UserError: the row cannot be rendered, or its answer is empty or cannot be found.
        """
        (encoded,) = self.encode_batch([row], source)
        if encoded.drop:
            raise UserError(f"{row.origin}: {encoded.drop}.")
        return encoded.tokens, encoded.prompt_length

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
          UserError: see ``encode``; the message names the row.
        """
        rendered = [self._render(row, with_end) for row in rows]
        tokens, offsets = self._tokenize(rendered, source)
        prompts = self._tokenize_prompts(rendered)
        return [
            self._finish(
                item, tokens[i], offsets.get(i), prompts.get(i), source, prompts_only, with_end
            )
            for i, item in enumerate(rendered)
        ]

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
        tokens, prompt_length = self.encode(row, source)
        show = self.tokenizer.decode
        lines = [
            f"{row.origin}: {len(tokens)} tokens, of which {prompt_length} are the prompt",
            f"prompt (not in the loss): {show(tokens[:prompt_length])!r}",
            f"answer (in the loss):     {show(tokens[prompt_length:])!r}",
            "ends with: "
            + (repr(show(tokens[-1:])) if row.has_answer else "nothing, it is a prompt alone"),
        ]
        if self._template is not None and row.text is None:
            named = [{"role": m.role, "content": f"({m.role})"} for m in row.messages]
            skeleton = self._template.render(named, add_generation_prompt=not row.has_answer)
            lines.append(f"the template around it:   {split_marks(skeleton)[0]!r}")
        return "\n".join(lines)

    # --- rendering --------------------------------------------------------------------------------

    def _render(self, row: TextRow, with_end: bool = True) -> _Rendered:
        contents = [row.text] if row.text is not None else [m.content for m in row.messages]
        if any(has_reserved(content) for content in contents):
            return _Rendered(row, "", None, None, False, RESERVED_CHARACTERS)
        quotes = any(self._special.occurs_in(content) for content in contents)
        if row.text is not None:
            return _Rendered(row, row.text, None, None, quotes)
        if self._template is None:
            raise UserError(
                f"{row.origin} is a conversation, and the tokenizer {self.tokenizer.path} has no "
                "chat template. Set corpus.template to plain, alpaca, chatml, llama2 or a Jinja "
                "file."
            )
        hide = self._special.hide if quotes else str
        reveal = self._special.reveal if quotes else str
        messages = [{"role": m.role, "content": hide(m.content)} for m in row.messages]
        try:
            if not row.has_answer:
                text = self._template.render(messages, add_generation_prompt=True)
                return _Rendered(row, split_marks(reveal(text))[0], None, None, quotes)
            if not with_end:
                messages[-1]["content"] += ANSWER_END
            text = self._template.render(messages, add_generation_prompt=False)
            if not with_end:
                text, mark, _ = text.rpartition(ANSWER_END)
                if not mark:
                    raise UserError("the template does not write the answer as it stands")
            whole, span = split_marks(reveal(text))
            if self._marks:
                if span is None or span[0] == span[1]:
                    raise UserError(
                        "its answer is empty: the template's {% generation %} marks nothing"
                    )
                return _Rendered(row, whole, None, span, quotes)
            text = self._template.render(messages[:-1], add_generation_prompt=True)
            return _Rendered(row, whole, split_marks(reveal(text))[0], None, quotes)
        except UserError as error:
            raise UserError(f"{row.origin}: {error}.") from error

    # --- tokens -----------------------------------------------------------------------------------

    def _tokenize(
        self, rendered: Sequence[_Rendered], source: SourceConfig | None
    ) -> tuple[list[np.ndarray], dict[int, np.ndarray]]:
        """int32[T] of every row, and int64[T, 2] character offsets where needed."""
        by_sentence = source is None or source.prompt_tokens is None
        tokens = [_NO_TOKENS] * len(rendered)
        offsets: dict[int, np.ndarray] = {}
        groups: dict[tuple[bool, bool], list[int]] = {}
        for i, item in enumerate(rendered):
            needs = item.span is not None or (item.row.text is not None and by_sentence)
            groups.setdefault((item.renamed, needs), []).append(i)
        for (renamed, needs), members in groups.items():
            texts = [rendered[i].whole for i in members]
            for i, encoding in zip(members, self._cut(texts, renamed, needs), strict=True):
                tokens[i] = np.array(encoding.ids, np.int32)
                if needs:
                    offsets[i] = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return tokens, offsets

    def _tokenize_prompts(self, rendered: Sequence[_Rendered]) -> dict[int, np.ndarray]:
        prompts = {}
        for renamed in (False, True):
            members = [
                i
                for i, item in enumerate(rendered)
                if item.prompt is not None and item.renamed == renamed
            ]
            texts = [rendered[i].prompt or "" for i in members]
            for i, encoding in zip(members, self._cut(texts, renamed, False), strict=True):
                prompts[i] = np.array(encoding.ids, np.int32)
        return prompts

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
        if not row.has_answer:
            return Encoded(tokens, len(tokens))
        if item.span is not None and offsets is not None:
            tokens, start = self._cut_by_span(tokens, offsets, item.span)
        elif prompt is not None:
            start = self._check_prefix(row, tokens, prompt)
        if with_end:
            tokens = self._end_answer(tokens, start)
        if all(token in self.end_token_ids for token in tokens[start:].tolist()):
            raise UserError(
                f"{row.origin}: the template leaves nothing of the answer; every token of a mask "
                "would be 0."
            )
        return Encoded(tokens, start)

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

    def _cut_by_span(
        self, tokens: np.ndarray, offsets: np.ndarray, span: tuple[int, int]
    ) -> tuple[np.ndarray, int]:
        inside = np.flatnonzero((offsets[:, 1] > span[0]) & (offsets[:, 0] < span[1]))
        start, stop = int(inside[0]), int(inside[-1]) + 1
        # A template may close the mark just before the end token.
        if tokens[stop - 1] not in self.end_token_ids and (
            stop < len(tokens) and tokens[stop] in self.end_token_ids
        ):
            stop += 1
        return tokens[:stop], start

    def _check_prefix(self, row: TextRow, tokens: np.ndarray, prompt: np.ndarray) -> int:
        shared = min(len(tokens), len(prompt))
        differ = np.flatnonzero(tokens[:shared] != prompt[:shared])
        if len(differ) or len(prompt) >= len(tokens):
            at = int(differ[0]) if len(differ) else shared
            show = self.tokenizer.decode
            raise UserError(
                f"{row.origin}: the answer cannot be found, because the rendered prompt is not "
                f"the beginning of the rendered conversation. They differ from token {at} on: "
                f"the prompt has {show(prompt[at : at + 8])!r} there, the conversation "
                f"{show(tokens[at : at + 8])!r}. Use a template that marks the answer with "
                "{% generation %}, or another corpus.template."
            )
        return len(prompt)

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

    def _end_ids(self, end_tokens: Sequence[int | str] | None) -> tuple[int, ...]:
        if end_tokens:
            return tuple(dict.fromkeys(self.tokenizer.token_id(token) for token in end_tokens))
        if self.tokenizer.eos_id is None:
            raise UserError(
                f"The tokenizer {self.tokenizer.path} names no EOS token; give the tokens that "
                "end an answer in corpus.end_tokens."
            )
        return (self.tokenizer.eos_id,)

    def _require_tokens(self, *texts: str) -> None:
        missing = [text for text in texts if text not in self.tokenizer.vocabulary]
        if missing:
            raise UserError(
                f"corpus.template: chatml needs the token {missing[0]}, which the tokenizer "
                f"{self.tokenizer.path} does not have. Use plain, alpaca or llama2."
            )
