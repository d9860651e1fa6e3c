"""A model of this project behind the interface of EleutherAI's harness (lm-eval).

The harness sends texts. They become tokens as follows:

- A prompt from ``apply_chat_template`` (``ChatText``) gets exactly the tokens that the renderer
  gives the same conversation. A continuation of it gets those of the assistant's answer.
- Any other text is tokenised as it is, including its control tokens. It follows a BOS if the
  tokenizer adds one and the text does not start with it. A context and its continuation are
  tokenised together; trailing spaces of the context count to the continuation.
- Text longer than the model's context is cut from the left.

``lm_eval`` is imported only inside functions, because it belongs to the extra ``lm-eval``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from proxykd_jax.data.collate import TokenRow
from proxykd_jax.errors import UserError
from proxykd_jax.peers import say, stop_if_wanted
from proxykd_jax.tasks.answering import FEWEST_TOKENS, ChatModel
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.template import Renderer

# Default of a request, as in the harness's own models.
_MAX_NEW_TOKENS = 256
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings that the sampler fulfils anyway.
_USUAL = (("num_beams", 1), ("top_k", 0), ("top_k", -1), ("repetition_penalty", 1))
_REQUESTS_AT_ONCE = 256
_NOTHING = np.zeros(0, np.int32)

# (arguments of requests) -> one response each.
Answer = Callable[[Sequence[tuple[Any, ...]]], list[Any]]


class ChatText(str):
    """A prompt as rendered by the template, together with its conversation.

    The text alone shows neither which control tokens come from the template and which are quoted in
    a message, nor what the template writes before an answer.
    """

    row: TextRow

    @staticmethod
    def of(row: TextRow, renderer: Renderer) -> ChatText:
        """The prompt of a conversation that ends with the user."""
        text = ChatText(renderer.text(row))
        text.row = row
        return text


class GenerationOptions(NamedTuple):
    """The wanted answer: the sampler's settings, and texts before which it is cut."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float


def generation_options(kwargs: Mapping[str, Any]) -> GenerationOptions:
    """What the harness's ``generation_kwargs`` ask for. Greedy unless they ask for sampling.

    Raises:
      UserError: they ask for something that the sampler does not support.
    """
    left = dict(kwargs)
    until = left.pop("until", None) or ()
    lengths = [length for key in _LENGTH_KEYS if (length := left.pop(key, None)) is not None]
    sampled, asked = left.pop("do_sample", None), left.pop("temperature", None)
    temperature = 0.0 if sampled is False else float(bool(sampled) if asked is None else asked)
    top_p = left.pop("top_p", None)
    if not temperature:
        left.pop("top_k", None)
    others = {k: v for k, v in left.items() if v not in (None, False) and (k, v) not in _USUAL}
    if others:
        raise UserError(
            "the harness's task sets "
            + ", ".join(f"{key}: {value}" for key, value in others.items())
            + " in generation_kwargs, which the sampler does not do; it takes until, max_gen_toks, "
            "do_sample, temperature and top_p."
        )
    return GenerationOptions(
        (until,) if isinstance(until, str) else tuple(until),
        int(lengths[0]) if lengths else _MAX_NEW_TOKENS,
        temperature,
        1.0 if top_p is None or not temperature else float(top_p),
    )


class Respondent:
    """Answers requests with a model, which is loaded at the first request.

    Args:
      renderer: the model's tokenizer and template.
      load: loads the model.
      batch_size: rows computed together.
      seed: seed of sampling, if a request asks for sampling.
    """

    def __init__(
        self, renderer: Renderer, load: Callable[[], ChatModel], *, batch_size: int, seed: int
    ) -> None:
        self.renderer = renderer
        self._load = load
        self._batch_size = batch_size
        self._seed = seed
        # Number the requests, so that two draws from one prompt differ.
        self._numbers = itertools.count()

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Texts that follow the contexts, each cut before the first of its stop strings.

        A context that leaves too little room is cut from the left until half of the model's context
        is free, or enough for all tokens wanted.

        Args:
          requests: (context, generation_kwargs).

        Raises:
          UserError: a request asks for something that the sampler does not support.
        """
        wanted = [generation_options(kwargs) for _, kwargs in requests]
        contexts = self.encode([context for context, _ in requests])
        chat_model = self._load()
        model = chat_model.model
        responses = [""] * len(requests)
        for temperature, top_p in dict.fromkeys((w.temperature, w.top_p) for w in wanted):
            chosen = [
                place
                for place, options in enumerate(wanted)
                if (options.temperature, options.top_p) == (temperature, top_p)
            ]
            draw = chat_model.drawing(
                seed=self._seed,
                batch_size=self._batch_size,
                temperature=temperature,
                top_p=top_p,
            )
            prompts, budgets = zip(
                *(self._with_room(contexts[n], wanted[n].max_new_tokens, model) for n in chosen),
                strict=True,
            )
            names = [f"request/{next(self._numbers)}" for _ in chosen]
            found = draw(list(prompts), names, list(budgets))
            for place, answer in zip(chosen, found, strict=True):
                responses[place] = _before(chat_model.text_of(answer), wanted[place].until)
        return responses

    def logliks(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of continuations of contexts.

        Args:
          requests: (context, continuation).

        Raises:
          UserError: a continuation alone is longer than the model's context.
        """
        return self._measured([self._continued(context, after) for context, after in requests])

    def rolling_logliks(self, requests: Sequence[tuple[str]]) -> list[float]:
        """Log-likelihoods of whole texts in nats; each token is predicted once.

        A text follows a BOS (or, without one, the EOS) and is split into pieces of the
        model's length. The last piece gets as much context as fits.

        Args:
          requests: (text,).
        """
        from lm_eval.utils import get_rolling_token_windows

        length = self._load().model.config.max_positions
        owners: list[int] = []
        rows: list[tuple[np.ndarray, int]] = []
        for owner, (text,) in enumerate(requests):
            tokens = self.renderer.tokenizer.encode(text).tolist()
            for read, predicted in get_rolling_token_windows(tokens, self._prefix, length, 1):
                owners.append(owner)
                start = len(read) + 1 - len(predicted)
                rows.append((np.array([*read, predicted[-1]], np.int32), start))
        sums = [0.0] * len(requests)
        for owner, (loglik, _) in zip(owners, self._measured(rows), strict=True):
            sums[owner] += loglik
        return sums

    def encode(self, contexts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of contexts, int32[T] each."""
        found = [_NOTHING if isinstance(c, ChatText) else self._plain(c) for c in contexts]
        chats = {n: c.row for n, c in enumerate(contexts) if isinstance(c, ChatText)}
        encoded = self.renderer.encode_all(list(chats.values()))
        for place, each in zip(chats, encoded, strict=True):
            found[place] = each.tokens
        return found

    def conversation(self, messages: Sequence[Mapping[str, str]], *, open_turn: bool) -> str:
        """The text of a conversation.

        Args:
          messages: with ``role`` and ``content``.
          open_turn: True if the assistant's turn follows; the result is a ``ChatText``. Otherwise
            the last message is the beginning of the assistant's answer, and the text ends with it.

        Raises:
          UserError: there is no template, or it rejects the conversation.
        """
        turns = [Message(cast(Any, each["role"]), each["content"]) for each in messages]
        row = TextRow(tuple(turns), None, "a prompt of the harness")
        return ChatText.of(row, self.renderer) if open_turn else self.renderer.text(row)

    @property
    def _prefix(self) -> int:
        """The token before a text that has no context."""
        tokenizer = self.renderer.tokenizer
        known = (tokenizer.bos_id, tokenizer.eos_id, self.renderer.end_token_ids[0])
        return next(token for token in known if token is not None)

    def _plain(self, text: str) -> np.ndarray:
        tokenizer = self.renderer.tokenizer
        tokens = tokenizer.encode(text)
        if tokenizer.adds_bos and not (len(tokens) and tokens[0] == tokenizer.bos_id):
            return np.insert(tokens, 0, self._prefix)
        return tokens

    def _continued(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """int32[T], and the index where the continuation starts."""
        if not continuation:
            return _NOTHING, 0
        if isinstance(context, ChatText):
            messages = (*context.row.messages, Message("assistant", continuation))
            row = TextRow(messages, None, context.row.origin)
            (found,) = self.renderer.encode_all([row], with_end=False)
            return found.tokens, found.prompt_length
        bare, whole = context.rstrip(), context + continuation
        if bare:
            return self._plain(whole), len(self._plain(bare))
        tokens = self.renderer.tokenizer.encode(whole)
        begun = bool(len(tokens)) and tokens[0] == self._prefix
        return (tokens if begun else np.insert(tokens, 0, self._prefix)), 1

    def _with_room(self, prompt: np.ndarray, wanted: int, model: Any) -> tuple[np.ndarray, int]:
        length = model.config.max_positions
        room = length - len(prompt)
        if room >= FEWEST_TOKENS:
            return prompt, min(wanted, room)
        budget = min(wanted, length // 2)
        return prompt[-(length - budget) :], budget

    def _measured(self, rows: Sequence[tuple[np.ndarray, int]]) -> list[tuple[float, bool]]:
        """For rows (int32[T], S) the log-likelihood of ``tokens[S:]``; an empty one has 0."""
        chat_model = self._load()
        model = chat_model.model
        # The last token is predicted but never an input.
        longest = model.config.max_positions + 1
        found = [(0.0, True)] * len(rows)
        asked = {
            place: TokenRow(tokens[-longest:], start - max(0, len(tokens) - longest), "")
            for place, (tokens, start) in enumerate(rows)
            if len(tokens) > start
        }
        for row in asked.values():
            if row.prompt_length < 1:
                raise UserError(
                    f"a continuation is longer than the model's context of {longest - 1} tokens."
                )
        if asked:
            sums = chat_model.measured(list(asked.values()), self._batch_size)
            greedy = sums.agreement == sums.tokens
            for place, nll, is_greedy in zip(asked, sums.nll, greedy, strict=True):
                found[place] = (-float(nll), bool(is_greedy))
        return found


def _before(text: str, stops: Sequence[str]) -> str:
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


def _in_parts(requests: Sequence[Any], answer: Answer) -> list[Any]:
    responses: list[Any] = []
    for first in range(0, len(requests), _REQUESTS_AT_ONCE):
        part = requests[first : first + _REQUESTS_AT_ONCE]
        responses += answer([request.args for request in part])
        say(f"{len(responses)} of {len(requests)} requests answered")
        stop_if_wanted()
    return responses


@functools.cache
def harness_model() -> Any:
    """The class of our models in the harness, a subclass of ``lm_eval``'s ``LM``.

    Its arguments are a ``Respondent`` and ``keep(requests, answer) -> responses``, which may store
    responses. When created by name (``create_from_arg_obj``) it takes ``config``, a run's file, and
    ``model``, an entry as in ``evaluate.benchmarks.models``.
    """
    from lm_eval.api.model import LM
    from lm_eval.utils import simple_parse_args_string

    class ProxyKDModel(LM):
        """A model of a run, from a folder, or exported, on this machine."""

        def __init__(
            self,
            respondent: Respondent,
            keep: Callable[[Sequence[Any], Answer], list[Any]] = _in_parts,
        ) -> None:
            super().__init__()
            self._respondent = respondent
            self._keep = keep

        @classmethod
        def create_from_arg_obj(
            cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
        ) -> Any:
            return cls(_named_respondent(arg_dict, (additional_config or {}).get("batch_size")))

        @classmethod
        def create_from_arg_string(
            cls, arg_string: str, additional_config: dict[str, Any] | None = None
        ) -> Any:
            return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return self._keep(requests, self._respondent.generate)

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return self._keep(requests, self._respondent.logliks)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            return self._keep(requests, self._respondent.rolling_logliks)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return self._respondent.conversation(chat_history, open_turn=add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            tokenizer = self._respondent.renderer.tokenizer
            return f"{tokenizer.path}__{tokenizer.digest}".replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str:
            return self._respondent.renderer.template_text or ""

    return ProxyKDModel


def _named_respondent(arguments: Mapping[str, Any], batch_size: Any) -> Respondent:
    from proxykd_jax.config import load_config
    from proxykd_jax.evaluation.candidates import Candidate, named_candidate
    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.parallel.sharding import check_rows
    from proxykd_jax.tasks.answering import load_chat_model, renderer_of

    if not {"config"} <= set(arguments) <= {"config", "model"}:
        raise UserError(
            "--model_args takes config=run.yaml and model=student (or another entry as in "
            f"evaluate.benchmarks.models); it has {', '.join(arguments) or 'nothing'}."
        )
    config = load_config(str(arguments["config"]))
    _, who = named_candidate(config, str(arguments.get("model", "student")))
    if not isinstance(who, Candidate):
        raise UserError("--model_args: model must be a model on this machine.")
    settings = config.evaluate.benchmarks or config.evaluate
    # The harness's own default is 1.
    rows = batch_size if isinstance(batch_size, int) and batch_size > 1 else settings.batch_size
    mesh = make_mesh(config.mesh.of("evaluate"))
    check_rows(rows, mesh, "the batch size")
    return Respondent(
        renderer_of(config, who.tokenizer),
        functools.cache(lambda: load_chat_model(config, who, mesh)),
        batch_size=rows,
        seed=config.seed,
    )


def missing_harness() -> str | None:
    """How to install the harness; None if it is installed."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        return "install lm-eval first: pip install 'proxykd_jax[lm-eval]'."
    return None
