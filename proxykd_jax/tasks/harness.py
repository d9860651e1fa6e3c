"""The benchmarks asked, read and scored a second time, by EleutherAI's harness (lm-eval).

With ``evaluate.benchmarks.harness`` each local model answers the same questions of the same files
through the harness. Both share the reading of files, the prompts, and the model with its tokenizer
and template (``harness_model.py``). The harness has its own requests, answer extraction (by the
regular expressions below), comparison with the gold, choice by log-likelihood, and accuracies. Two
programs that agree on these are unlikely to have the same error.

    python -m proxykd_jax.tasks.harness run --model proxykd_jax \\
        --model_args config=run.yaml,model=student --tasks my_task --include_path tasks

is the harness's own command line with this project's models, for any other task of lm-eval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from proxykd_jax.artifacts import digest_value, write_bytes
from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.peers import on_first
from proxykd_jax.tasks.accuracies import BY_LENGTH, accuracy
from proxykd_jax.tasks.harness_model import Answer, Respondent, harness_model, missing_harness
from proxykd_jax.tasks.items import Item
from proxykd_jax.tasks.outputs import AnswerStore, Line, lines_to_bytes
from proxykd_jax.tasks.prompts import prompt_hash, prompt_of, question_alone

# Increase it when requests to the harness change: responses of two versions are not comparable.
HARNESS_VERSION = 1

_LETTER = r"[Tt]he answer is:? *\(?([A-Z0-9])\b"
# How the harness finds an answer: the last match. These are the forms that the prompts request, as
# in the harness's published tasks. None of this project's extraction is used.
PATTERNS: Mapping[str, str] = {
    "agieval": r"[Tt]he answer is:? *(?:\$?\\boxed\{(.*)\}|\(?([A-Z]+)\)?(?:\.|$))",
    "arc": _LETTER,
    "bbh": r"(?:#### *|[Tt]he answer is:? *)(?:\(([A-Z])\)|(.*?))\.? *(?:\n|$)",
    "csqa": _LETTER,
    "gsm8k": r"#### *\$?(-?[0-9.,]*[0-9])",
    "mmlu": _LETTER,
}
# Ignored in comparisons: thousands separators, and spaces within formulas and lists.
_IGNORED: Mapping[str, list[str]] = {"agieval": [r"\s"], "bbh": [",", r"\s"], "gsm8k": [","]}
_FILTER = "last"
# A metric of the harness -> our score to compare it with.
GENERATED_METRICS = {"exact_match": "score"}
COMPARED_METRICS = {"acc": "score", "acc_norm": BY_LENGTH, "acc_bytes": BY_LENGTH}
# Tolerance for sums of float32 log-probs from batches of other lengths.
_SAME_NATS = 1e-3
_SHOWN = 20


def require_harness() -> None:
    """Raises UserError if lm-eval is not installed."""
    missing = missing_harness()
    if missing:
        raise UserError(f"evaluate.benchmarks.harness: {missing}")


def task_config(
    name: str, items: Sequence[Item], *, compared: bool, max_new_tokens: int
) -> dict[str, Any]:
    """A zero-shot task of the harness, with its documents in memory.

    Args:
      name: name of the task.
      items: items of one benchmark; with ``compared`` each has exactly one right choice.
      compared: compare log-likelihoods of choices instead of generating answers.
      max_new_tokens: length budget of an answer.
    """
    if compared:
        documents = [
            {
                "prompt": question_alone(item),
                "choices": [text for _, text in item.choices],
                "gold": [label for label, _ in item.choices].index(item.gold),
            }
            for item in items
        ]
        return {
            **_common(name, documents),
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "metric_list": [_metric(metric) for metric in COMPARED_METRICS],
        }
    task = items[0].task
    # group_select -1: the last match.
    found = {"function": "regex", "regex_pattern": PATTERNS[task], "group_select": -1}
    matched = {"ignore_case": True, "regexes_to_ignore": _IGNORED.get(task, [])}
    return {
        **_common(name, [{"prompt": prompt_of(item), "gold": item.gold} for item in items]),
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
        "filter_list": [{"name": _FILTER, "filter": [found, {"function": "take_first"}]}],
        "metric_list": [{**_metric("exact_match"), **matched}],
    }


def _common(name: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    def in_memory(**metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(documents)}

    return {
        "task": name,
        "custom_dataset": in_memory,
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "doc_to_target": "gold",
    }


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def check(
    store: AnswerStore,
    items: Sequence[Item],
    ours: Sequence[Line],
    respondent: Respondent,
    *,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Lets the harness ask, read and score one task; existing responses are reused.

    Responses are stored in ``<task>_harness/`` beside our answers, samples in
    ``<task>_harness.jsonl``.

    Args:
      store: our answers; its folder has the task's name.
      items: the questions.
      ours: our scored samples, in the same order; with log-likelihoods if they have them.
      respondent: answers the requests.
      max_new_tokens: as for ours.

    Returns:
      For each metric of the harness its accuracy, ours, and where the two differ.

    Raises:
      UserError: responses on disk belong to another model or other settings.
    """
    compared = "logliks" in ours[0]
    name = store.folder.name
    folder = store.folder.with_name(f"{name}_harness")

    def keep(requests: Sequence[Any], answer: Answer) -> list[Any]:
        groups = [list(of) for _, of in itertools.groupby(requests, lambda each: each.doc_id)]

        def answered(places: Sequence[int]) -> list[Line]:
            asked = [request.args for place in places for request in groups[place]]
            responses = iter(answer(asked))
            return [
                {"id": items[place].id, "responses": [next(responses) for _ in groups[place]]}
                for place in places
            ]

        settings = {
            **store.settings,
            "harness_version": HARNESS_VERSION,
            "requests": digest_value([[list(r.args) for r in group] for group in groups]),
        }
        label = f"{store.label} (harness)"
        kept = dataclasses.replace(store, folder=folder, settings=settings, label=label)
        kept.collect(len(groups), lambda: answered)
        return [response for line in on_first(kept.read) for response in line["responses"]]

    config = task_config(name, items, compared=compared, max_new_tokens=max_new_tokens)
    found = run_task(harness_model()(respondent, keep), config)
    samples = [
        _compared(item, ours_of, sample) if compared else _generated(item, ours_of, sample)
        for item, ours_of, sample in zip(items, ours, found["samples"][name], strict=True)
    ]
    on_first(lambda: write_bytes(folder.with_name(f"{folder.name}.jsonl"), lines_to_bytes(samples)))
    return _summary(found["results"][name], samples, ours, compared)


def run_task(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's results for one task, with ``samples``.

    Args:
      model: an object of ``harness_model()``.
      config: from ``task_config``.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    with _quiet():
        tasks = {"tasks": {config["task"]: ConfigurableTask(config=dict(config))}}
        return dict(evaluate(model, tasks, apply_chat_template=True, fewshot_as_multiturn=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the harness's remarks on its command-line options."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _generated(item: Item, ours: Line, sample: Mapping[str, Any]) -> Line:
    output = sample["resps"][0][0]
    return {
        "id": item.id,
        "prompt_hash": prompt_hash(sample["doc"]["prompt"]),
        "output": output,
        "extracted": sample["filtered_resps"][0],
        "exact_match": int(sample["exact_match"]),
        "our_score": ours["score"],
        "same_output": output == ours["output"],
    }


def _compared(item: Item, ours: Line, sample: Mapping[str, Any]) -> Line:
    logliks = [loglik for ((loglik, _),) in sample["resps"]]
    same = ours["logliks"] is not None and all(
        abs(one - other) < _SAME_NATS for one, other in zip(logliks, ours["logliks"], strict=True)
    )
    return {
        "id": item.id,
        "prompt_hash": prompt_hash(sample["doc"]["prompt"]),
        "logliks": logliks,
        **{metric: int(sample[metric]) for metric in COMPARED_METRICS},
        "our_score": ours["score"],
        f"our_{BY_LENGTH}": ours[BY_LENGTH],
        "same_output": same,
    }


def _summary(
    results: Mapping[str, Any], samples: Sequence[Line], ours: Sequence[Line], compared: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "n": len(samples),
        "same_outputs": sum(sample["same_output"] for sample in samples),
        "other_outputs": _ids(sample for sample in samples if not sample["same_output"]),
        "metrics": {},
    }
    for metric, key in (COMPARED_METRICS if compared else GENERATED_METRICS).items():
        filtered = "none" if compared else _FILTER
        error = results[f"{metric}_stderr,{filtered}"]
        here = accuracy(ours, key)
        other = [sample for sample in samples if sample[metric] != sample[f"our_{key}"]]
        found["metrics"][metric] = {
            "accuracy": float(results[f"{metric},{filtered}"]),
            "se": None if error == "N/A" else float(error),
            "ours": {"accuracy": here["accuracy"], "se": here["se"]},
            "same_scores": len(samples) - len(other),
            "other_scores": _ids(other),
        }
    return found


def _ids(samples: Any) -> list[str]:
    return [sample["id"] for sample in itertools.islice(samples, _SHOWN)]


def described_checks(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The checks of each model and task, as lines of text."""
    lines = []
    for name, tasks in models.items():
        for task, found in tasks.items():
            for metric, of in found["metrics"].items():
                lines.append(
                    f"evaluate: {name:<16} {task:<14} harness {metric}: {_share(of)}, here "
                    f"{_share(of['ours'])}; of {found['n']} the same: {of['same_scores']} scores, "
                    f"{found['same_outputs']} outputs"
                )
    return lines


def _share(found: Mapping[str, Any]) -> str:
    error = "" if found["se"] is None else f" +- {100 * found['se']:.2f}"
    return f"{100 * found['accuracy']:.2f}{error}"


def main() -> int:
    """The harness's own command line, extended by ``--model proxykd_jax``.

    Returns:
      The exit code: 0, or 2 after a user error, which is reported in one sentence.
    """
    # The share of GPU memory that plans assume; XLA's default is 75 %.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    # A process with JAX's threads must not fork. The harness would fork for bootstrapped errors,
    # and its table writer would for columns.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    missing = missing_harness()
    try:
        if missing:
            raise UserError(missing)
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model

        register_model("proxykd_jax")(harness_model())
        command: Callable[[], None] = cli_evaluate
        command()
    except (UserError, Stopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        multiprocessing.set_start_method(before, force=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
