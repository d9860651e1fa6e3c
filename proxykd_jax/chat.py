"""Talks to a model: an exported student, a proxy's adapter, or any folder that the models fit.

    proxykd chat export/student
    proxykd chat --model export/proxy_adapter --once "What is a proxy?"

The prompt is written by the folder's own chat template, and the answer ends at its own end tokens.
A model without a template continues the text. The answer is drawn by the sampler that draws the
rounds' answers, so the same seed and the same words give the same conversation.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.cli import file_parser, run_alone
from proxykd_jax.errors import UserError

if TYPE_CHECKING:
    from proxykd_jax.models.config import ModelConfig
    from proxykd_jax.texts.template import Renderer

SUMMARY = "Talk to an exported model, or to any other, in the terminal."
# An answer needs room for at least a few tokens.
_FEWEST_TOKENS = 8
_ADAPTER = "adapter_config.json"


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
      weights: (params, None); an adapter is merged.
      config: the model's shapes.
      renderer: its tokenizer and template.
      system: a system message, or "".
      temperature: of sampling; 0 is greedy.
      top_p: as in ``DrawSettings``.
      max_tokens: most tokens of an answer.
      seed: of the draws; each turn has other draws.
      turns: (question, answer) of the turns so far.
      dropped: number of earliest turns that are not shown to the model, because they do not fit.
    """

    weights: tuple[Any, None]
    config: ModelConfig
    renderer: Renderer
    system: str = ""
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    turns: list[tuple[str, str]] = field(default_factory=list)
    dropped: int = 0

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece, and then remembers the turn.

        Raises:
          UserError: the question alone is longer than the model's context, or the template refuses
            the messages.
        """
        from proxykd_jax.generation.decode import DrawSettings
        from proxykd_jax.generation.sampler import Prompt, stream

        tokenizer = self.renderer.tokenizer
        tokens = self._prompt_tokens(question)
        room = self.config.max_positions - len(tokens)
        answers = stream(
            self.weights,
            Prompt(tokens, "chat", min(self.max_tokens, room)),
            config=self.config,
            settings=DrawSettings(
                self.temperature, self.top_p, tokenizer.vocab_size, self.renderer.end_token_ids
            ),
            seed=self.seed,
            round_index=len(self.turns),
        )
        shown = ""
        for answer in answers:
            ids = answer.tokens[:-1] if answer.finished else answer.tokens
            text = self._text_of(tokens, ids)
            # A token may hold a part of a character, which the next one completes.
            whole = text.rstrip("\ufffd")
            if whole.startswith(shown):
                yield whole[len(shown) :]
                shown = whole
        if text.startswith(shown):
            yield text[len(shown) :]
        self.turns.append((question, text))

    def _text_of(self, prompt: Any, ids: Any) -> str:
        """The text of an answer; a continuation keeps the space that it begins with."""
        decode = self.renderer.tokenizer.decode
        if self.renderer.template_text is not None:
            return decode(ids, skip_special=True)
        before = decode(prompt, skip_special=True)
        return decode([*prompt, *ids], skip_special=True)[len(before) :]

    def _prompt_tokens(self, question: str) -> Any:
        """The tokens before the answer, without the earliest turns if all do not fit."""
        while True:
            tokens = self._all_tokens(question)
            if len(tokens) + _FEWEST_TOKENS <= self.config.max_positions:
                return tokens
            if self.dropped == len(self.turns):
                raise UserError(
                    f"The prompt has {len(tokens)} tokens, and the model has "
                    f"{self.config.max_positions} positions for it and the answer; shorten it."
                )
            self.dropped += 1

    def _all_tokens(self, question: str) -> Any:
        import numpy as np

        from proxykd_jax.texts.records import Message, TextRow

        turns = self.turns[self.dropped :]
        if self.renderer.template_text is None:
            tokenizer = self.renderer.tokenizer
            text = "".join(f"{asked}{answer}\n" for asked, answer in turns) + question
            text = f"{self.system}\n{text}" if self.system else text
            begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
            return np.array([*begin, *tokenizer.encode(text)], np.int32)
        messages = [Message("system", self.system)] if self.system else []
        for asked, answer in turns:
            messages += [Message("user", asked), Message("assistant", answer)]
        messages.append(Message("user", question))
        row = TextRow(tuple(messages), None, "chat")
        return self.renderer.encode_all([row], prompts_only=True)[0].tokens


def main(model: str | Path, **options: Any) -> Chat:
    """Loads a model to talk to.

    Args:
      model: a Hugging Face folder (or hub name), or the folder of a PEFT adapter, whose
        ``adapter_config.json`` names the base model.
      **options: ``system``, ``temperature``, ``top_p``, ``max_tokens`` and ``seed`` of ``Chat``.

    Returns:
      The conversation, still empty: ``"".join(chat.ask("..."))`` is an answer.

    Raises:
      UserError: there is no model or no tokenizer, or they do not fit.
    """
    folder = Path(model).expanduser()
    adapter = folder if (folder / _ADAPTER).is_file() else None
    if adapter is None and folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no model: there is neither config.json nor {_ADAPTER}. The models of "
            "a run are in <run>/export."
        )
    base = str(folder) if adapter is None else _base_of(adapter)
    import jax

    from proxykd_jax.config import AxesConfig
    from proxykd_jax.models.folder import local_folder
    from proxykd_jax.models.hf_config import read_config
    from proxykd_jax.models.hf_weights import load_model
    from proxykd_jax.models.lora import merge
    from proxykd_jax.models.peft import load_adapter
    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.parallel.sharding import sharding_of
    from proxykd_jax.texts.template import Renderer
    from proxykd_jax.texts.tokenizer import check_embedding_rows, load_tokenizer

    at = local_folder(base)
    own = adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else at
    tokenizer = load_tokenizer(own)
    config = read_config(at)
    check_embedding_rows(tokenizer, config.vocab_size, base)
    # One row is drawn, so the devices share its heads; as many devices as these can be shared by.
    shards = math.gcd(jax.device_count(), config.num_kv_heads)
    mesh = make_mesh(AxesConfig(data=1, tensor=shards), jax.devices()[:shards])
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config, params = load_model(
        at,
        dtype=dtype,
        config=config,
        sharding=lambda path: sharding_of("/".join(path), mesh),
    )
    if adapter is not None:
        lora, tree = load_adapter(adapter, config)
        params = merge(params, tree, config.replace(lora=lora), dtype=dtype)
    has_template = tokenizer.chat_template is not None
    return Chat((params, None), config, Renderer(tokenizer, has_turns=has_template), **options)


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / _ADAPTER).read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter / _ADAPTER} names no base model (base_model_name_or_path).")
    return base


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    parser = file_parser("chat", SUMMARY, ("--model",), "folder of the model, or of an adapter")
    add = parser.add_argument
    add("--once", metavar="PROMPT", help="print the answer to this prompt, and end")
    add("--system", default="", metavar="TEXT", help="system message")
    add("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (default 0.7)")
    add("--top-p", type=float, default=1.0, metavar="P", help="as in nucleus sampling (default 1)")
    add("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default 512)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the draws (default 0)")
    given = parser.parse_args(argv)
    if given.temperature < 0 or not 0 < given.top_p <= 1 or given.max_tokens < 1 or given.seed < 0:
        parser.error(
            "--temperature and --seed are at least 0, --max-tokens at least 1, --top-p in (0, 1]"
        )

    def work() -> int:
        options = {
            "system": given.system,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "max_tokens": given.max_tokens,
            "seed": given.seed,
        }
        chat = main(given.config, **options)
        if given.once is not None:
            _print(chat.ask(given.once))
        else:
            _talk(chat)
        return 0

    return run_alone(work)


def _talk(chat: Chat) -> None:
    """Asks for lines and answers them, until Ctrl-C or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (the arrow keys work in input)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        how = (
            ""
            if chat.renderer.template_text
            else "; it has no chat template and continues the text"
        )
        print(f"Ctrl-D ends the conversation{how}.", file=sys.stderr)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            question = input("> " if at_terminal else "")
            if not question.strip():
                continue
            before = chat.dropped
            try:
                _print(chat.ask(question))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            if chat.dropped > before:
                print(f"(the first {chat.dropped} turns no longer fit)", file=sys.stderr)
    if at_terminal:
        print(file=sys.stderr)


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    sys.exit(command())
