"""Answers drawn by a server, as the tokens that the built-in sampler would have given.

If the server reports the ids that it drew, they are the answer. If it reports only text, the text
is tokenised again; an answer whose tokens do not decode to the same text is left out.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from proxykd_jax.errors import UserError
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Sample
from proxykd_jax.generation.samples import SampleFunction
from proxykd_jax.generation.server import Completion, ServerClient, StoppedError
from proxykd_jax.random_keys import request_seed
from proxykd_jax.texts.tokenizer import Tokenizer

# Stands for bytes that are not a complete character, for example where the budget ends within one.
_NO_CHARACTER = "\ufffd"


def make_served_draw(
    client: ServerClient,
    name: str,
    tokenizer: Tokenizer,
    settings: DrawSettings,
    *,
    seed: int,
    round_index: int,
) -> SampleFunction:
    """``draw(prompts, row_ids, budgets) -> samples``, by a server that has loaded the weights.

    A request's seed is a function of (seed, round, row id), so a rerun gives the same answers if
    the server honours it.

    Args:
      client: the server.
      name: what ``ServerClient.load`` loaded: the adapter's name or the model's folder.
      tokenizer: the corpus's tokenizer.
      settings: how a token is drawn. The first end token is appended if the server stopped without
        saying at which one.
      seed, round_index: as in ``sampler.sample``.

    Raises (when drawing):
      UserError: the server fails permanently, answers with another model, or counts another number
        of tokens in a prompt.
    """
    ends = settings.end_token_ids

    def ask(prompt: np.ndarray, row_id: str, budget: int) -> Sample:
        sent = _prompt(prompt, client, tokenizer)
        if sent is None:
            return _UNSPELLED
        body = {
            "model": name,
            **sent,
            "max_tokens": budget,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": request_seed(seed, round_index, row_id),
            **_PARTICULARS[client.server.api](client, name, ends, settings.temperature),
        }
        completion = client.complete(body)
        read = completion.prompt_length
        if read is not None and read != len(prompt):
            raise UserError(
                f"align.sampling.server: a prompt of {len(prompt)} tokens was read as {read}; the "
                "server's tokenizer is another one, or it adds tokens of its own."
            )
        return _sample(completion, prompt, budget, client, tokenizer, ends)

    def draw(prompts: list[np.ndarray], row_ids: list[str], budgets: list[int]) -> list[Sample]:
        samples = [Sample(np.zeros(0, np.int32), False, np.zeros(0, np.float32)) for _ in prompts]
        pool, failed = ThreadPoolExecutor(client.server.concurrency), threading.Event()

        def ask_unless_failed(i: int) -> Sample:
            """Sees a failure before the main thread does, so that nothing more is sent."""
            if failed.is_set():
                raise StoppedError
            try:
                return ask(prompts[i], row_ids[i], int(budgets[i]))
            except BaseException:
                failed.set()
                raise

        try:
            asked = {
                pool.submit(ask_unless_failed, i): i for i in range(len(prompts)) if budgets[i] > 0
            }
            abandoned = None
            for answer in as_completed(asked):
                try:
                    samples[asked[answer]] = answer.result()
                except StoppedError as error:
                    abandoned = error  # what the user reads is the failure, which comes too
            if abandoned is not None:
                raise abandoned
        except BaseException:
            client.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return samples

    return draw


# --- requests -------------------------------------------------------------------------------------

# Servers fill in missing settings from the model's generation_config.json, which often sets top_k
# and penalties. Eq. 5 draws from the whole softmax.
_PLAIN = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "return_token_ids": True,
    "skip_special_tokens": False,
}


def _vllm(
    client: ServerClient, name: str, end_token_ids: Sequence[int], temperature: float
) -> dict[str, Any]:
    # ignore_eos: the model's own EOS must end an answer only if it is among our end tokens.
    return {
        **_PLAIN,
        "stop_token_ids": list(end_token_ids),
        "ignore_eos": True,
        "spaces_between_special_tokens": False,
    }


def _sglang(
    client: ServerClient, name: str, end_token_ids: Sequence[int], temperature: float
) -> dict[str, Any]:
    # ignore_eos would also disable stop_token_ids in SGLang.
    particulars = {**_PLAIN, "model": client.base, "stop_token_ids": list(end_token_ids)}
    return {**particulars, "lora_path": name} if client.server.serves == "adapter" else particulars


def _transformers(
    client: ServerClient, name: str, end_token_ids: Sequence[int], temperature: float
) -> dict[str, Any]:
    # Without do_sample it is greedy at any temperature; without top_k it keeps 50 tokens.
    generation = {
        "do_sample": temperature > 0,
        "top_k": 0,
        "eos_token_id": list(end_token_ids),
        "pad_token_id": end_token_ids[0],
    }
    return {"generation_config": json.dumps(generation)}


_PARTICULARS: dict[str, Callable[..., dict[str, Any]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "transformers": _transformers,
}


def _prompt(
    prompt: np.ndarray, client: ServerClient, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    """The keys of a request that hold the prompt; None if no text encodes to its ids."""
    if client.server.prompt_as == "ids":
        return {"prompt": [int(token) for token in prompt]}
    if client.server.api == "vllm":  # the only one that can be told to add no BOS
        text = tokenizer.decode(prompt)
        if np.array_equal(tokenizer.encode(text), prompt):
            return {"prompt": text, "add_special_tokens": False}
    for start in (1, 0) if prompt[0] == tokenizer.bos_id else (0,):
        text = tokenizer.decode(prompt[start:])
        if np.array_equal(tokenizer.backend.encode(text).ids, prompt):
            return {"prompt": text}
    return None


# --- replies --------------------------------------------------------------------------------------

_UNSPELLED = Sample(np.zeros(0, np.int32), False, np.zeros(0, np.float32), spelled=False)


def _sample(
    completion: Completion,
    prompt: np.ndarray,
    budget: int,
    client: ServerClient,
    tokenizer: Tokenizer,
    end_token_ids: Sequence[int],
) -> Sample:
    finished, end = completion.finished, completion.end_token
    if completion.tokens is not None:
        answer = completion.tokens
        # Servers differ in whether the ids include the end token. Some call an answer truncated
        # whose end token took the last token of the budget.
        if answer and (answer[-1] in end_token_ids or (finished and answer[-1] == end)):
            answer, end, finished = answer[:-1], answer[-1], True
        known = all(0 <= token < tokenizer.vocab_size for token in answer)
        tokens = np.array(answer, np.int32) if known else None
    else:
        alone = client.server.api == "transformers"
        tokens = spell(completion.text, prompt, tokenizer, alone=alone)
    if tokens is None:
        return _UNSPELLED
    if finished:
        last = end if end is not None and end in end_token_ids else end_token_ids[0]
        tokens = np.append(tokens, np.int32(last))
    if len(tokens) > budget:
        return _UNSPELLED
    return Sample(tokens, finished, np.full(len(tokens), np.nan, np.float32))


def spell(text: str, prompt: np.ndarray, tokenizer: Tokenizer, *, alone: bool) -> np.ndarray | None:
    """int32[R]: tokens that decode to an answer's text; None if there are none.

    A tokenizer that marks words by a leading space splits a text differently at its beginning than
    in the middle. ``alone`` says that the server decoded the answer's tokens by themselves, which
    loses that space, and not as a continuation of the prompt.
    """
    if _NO_CHARACTER in text:
        return None

    def by_itself() -> np.ndarray | None:
        tokens = tokenizer.encode(text)
        return tokens if tokenizer.decode(tokens) == text else None

    def within() -> np.ndarray | None:
        whole = tokenizer.decode(prompt) + text
        tokens = tokenizer.encode(whole)
        fits = np.array_equal(tokens[: len(prompt)], prompt) and tokenizer.decode(tokens) == whole
        return tokens[len(prompt) :] if fits else None

    for way in (by_itself, within) if alone else (within, by_itself):
        tokens = way()
        if tokens is not None:
            return tokens
    return None
