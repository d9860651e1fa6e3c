"""Every key of a run, with its type, range and meaning.

One YAML file describes a whole run. A key without a default here takes its value from the preset
(``presets.py``); ``preset`` itself has no default. The descriptions are the text of ``--help``.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from proxykd_jax.config.method_section import Needs
from proxykd_jax.config.methods import Method, ProxyKd
from proxykd_jax.config.section import (
    NamedPathText,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    Share,
)

Reduction = Literal["example_mean", "token_mean", "sum"]
Dtype = Literal["bfloat16", "float32"]
LinearName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEAR: tuple[LinearName, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


# Keys of a row that ``columns`` of a source can give, and the format that some of them decide.
COLUMN_KEYS = (
    *("prompt", "response", "messages", "text", "system", "context", "history", "tools"),
    *("reasoning", "finish_reason", "model", "gold", "id"),
)
_FORMAT_OF_COLUMN = {
    "prompt": "prompt_response",
    "response": "prompt_response",
    "context": "prompt_response",
    "messages": "messages",
    "text": "text",
}
_FORMATS_OF_COLUMNS: dict[str | None, tuple[str, ...]] = {
    "prompt_response": ("auto", "prompt_response"),
    "messages": ("auto", "messages"),
    "text": ("auto", "text"),
    None: ("auto", "messages", "prompt_response", "alpaca", "sharegpt"),
}


class SourceConfig(Section):
    """Where rows of the corpus come from."""

    path: PathText | None = Field(
        None,
        description="file, folder or glob of files (.json, .jsonl, .ndjson, .csv, .tsv, each also "
        "with .gz or .zst; .parquet); files of a folder that say test or validation are not "
        "trained on",
    )
    dataset: PathText | None = Field(
        None, description="name or local folder of a Hugging Face dataset, instead of path"
    )
    tfds: PathText | None = Field(
        None, description="name or prepared folder of a TFDS builder, instead of path"
    )
    split: str = Field("train", description="split of a dataset or TFDS source")
    subset: str | None = Field(
        None, description="configuration of a Hugging Face dataset that has several"
    )
    format: Literal[
        "auto",
        "messages",
        "prompt_response",
        "alpaca",
        "sharegpt",
        "text",
        "openorca",
        "nectar",
        "batch",
        "gsm8k",
        "arc",
        "csqa",
        "mmlu",
        "agieval",
        "bbh",
        "mt_bench",
    ] = Field("auto", description="schema of the rows; auto recognises it from the first row")
    columns: dict[str, str] = Field(
        {},
        description="the file's own column for a key that is read, such as {prompt: question, "
        f"response: answer}}; keys: {', '.join(COLUMN_KEYS)}",
    )
    answers: PathText | None = Field(
        None,
        description="file of teacher answers ({id or prompt, response}, or a batch's output) for "
        "prompts: a benchmark's training set, the input of a batch, or prompts without responses",
    )
    teacher: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="keep rows of this model alone, where a column says the model (its name "
        "begins with this); Nectar and OpenOrca, which is checked by its file name: default gpt-4",
    )
    turns: Literal["last", "each", "all"] = Field(
        "each",
        description="conversations with several answers: train on the last one, make one row of "
        "each, or one row with all of them in the loss",
    )
    prompt_tokens: PositiveInt | None = Field(
        None, description="text format: number of first tokens that form the prompt"
    )
    prompt_sentences: PositiveInt | None = Field(
        None,
        description="text format: number of first sentences that form the prompt (1 if neither "
        "this nor prompt_tokens is given)",
    )
    limit: PositiveInt | None = Field(None, description="most rows to read")
    license: str | None = Field(
        None, description="licence of the rows, for the model card of what is exported"
    )

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if sum(x is not None for x in (self.path, self.dataset, self.tfds)) != 1:
            raise ValueError("give exactly one of path, dataset and tfds")
        if self.prompt_tokens and self.prompt_sentences:
            raise ValueError("give prompt_tokens or prompt_sentences, not both")
        return self

    @model_validator(mode="after")
    def _columns_fit(self) -> SourceConfig:
        for key, column in self.columns.items():
            if key not in COLUMN_KEYS:
                close = difflib.get_close_matches(key, COLUMN_KEYS, n=1)
                hint = f"did you mean '{close[0]}'?" if close else ", ".join(COLUMN_KEYS)
                raise ValueError(f"columns: {key} is none of the keys that can be given; {hint}")
            if not column:
                raise ValueError(f"columns: {key} needs the name of a column")
        wanted = {_FORMAT_OF_COLUMN[key] for key in self.columns if key in _FORMAT_OF_COLUMN}
        if len(wanted) > 1:
            listed = ", ".join(key for key in self.columns if key in _FORMAT_OF_COLUMN)
            raise ValueError(f"columns: {listed} belong to different formats; give one of them")
        mapped = next(iter(wanted), None)
        if mapped == "text" and (more := self.columns.keys() - {"text", "id", "model"}):
            raise ValueError(f"columns: a plain text has no {', '.join(sorted(more))}")
        if self.columns and self.format not in _FORMATS_OF_COLUMNS[mapped]:
            raise ValueError(
                f"columns cannot be mapped to the keys of format: {self.format}; "
                + (f"give format: {mapped}, or leave it out" if mapped else "leave one of them out")
            )
        return self

    @property
    def row_format(self) -> str:
        """``format``, or the one whose keys ``columns`` gives."""
        given = next((k for k in self.columns if k in _FORMAT_OF_COLUMN), None)
        return self.format if given is None else _FORMAT_OF_COLUMN[given]


class SharesConfig(Section):
    """How the corpus is split, by a hash of the first user message (paper, 3.1: 10/45/45)."""

    warmup: Share = Field(0.10, description="share of D_w, the proxy's warm-up")
    align: Share = Field(0.45, description="share of D_p, the proxy's alignment")
    distill: Share = Field(0.45, description="share of D_s, the student's distillation")

    @model_validator(mode="after")
    def _sum_to_one(self) -> SharesConfig:
        if abs(self.warmup + self.align + self.distill - 1) > 1e-6:
            raise ValueError("warmup, align and distill must add up to 1")
        return self


class BeamConfig(Section):
    """Apache Beam makes the corpus, on many machines (docs/large_corpora.md)."""

    runner: str = Field(
        "DirectRunner",
        description="what runs the pipelines: DirectRunner (this machine), DataflowRunner, "
        "FlinkRunner, SparkRunner or another runner of Beam",
    )
    options: tuple[str, ...] = Field(
        (), description="the runner's options, as on Beam's own command line"
    )


class CorpusConfig(Section):
    """The teacher's answers: where they are, how they are tokenised and split."""

    sources: tuple[SourceConfig, ...] = Field(
        min_length=1, description="the teacher's answers; many sources are mixed"
    )
    fresh_prompts: tuple[SourceConfig, ...] = Field(
        (),
        description="prompts without a teacher's answer; the aligned proxy answers and scores them "
        "(beyond the paper)",
    )
    test: tuple[SourceConfig, ...] = Field(
        (), description="rows of a separate test set; their prompts occur in no other split"
    )
    benchmarks: tuple[PathText, ...] = Field(
        (), description="files whose questions must not occur in the corpus"
    )
    contamination: Literal["refuse", "drop"] = Field(
        "refuse", description="on a benchmark question in the corpus: stop, or drop the row"
    )
    template: PathText = Field(
        "auto",
        description="auto (the tokenizer's own chat template), plain, alpaca, chatml, llama2, or "
        "a Jinja file",
    )
    end_tokens: tuple[int | str, ...] | None = Field(
        None,
        min_length=1,
        description="ids or texts of tokens that end an answer; the first is appended if the "
        "template writes none (default: the control token that the template writes behind an "
        "answer, else the tokenizer's EOS)",
    )
    thinking: Literal["keep", "drop", "context"] = Field(
        "keep",
        description="thoughts before an answer (reasoning keys, <think>): keep them in the loss, "
        "drop them, or give them as context that is not in the loss",
    )
    max_length: PositiveInt = Field(
        1024, description="longer rows (prompt and answer, in tokens) are dropped and counted"
    )
    deduplicate: bool = Field(True, description="drop repeated (prompt, answer) pairs")
    shares: SharesConfig = Field(SharesConfig(), description="shares of the three splits")
    validation_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        description="share set aside for validation"
    )
    validation_rows: NonNegativeInt = Field(
        description="least number of validation rows, if the corpus has ten times as many"
    )
    validation_max_rows: PositiveInt = Field(
        2048, description="most validation rows to use in a validation"
    )
    max_rows: PositiveInt | None = Field(
        None,
        description="most rows to keep of those that fit max_length, chosen by hash",
    )
    shard_rows: PositiveInt = Field(50_000, description="rows per file of the tokenised corpus")
    beam: BeamConfig | None = Field(
        None,
        description="make the corpus with Apache Beam, with the same bytes; for corpora that are "
        "too large for one machine",
    )


class LoraSettings(Section):
    """Low-rank adapters (paper, 4.2; its rank is not given)."""

    rank: PositiveInt = Field(16, description="rank of the update")
    alpha: PositiveFloat = Field(32.0, description="the update is scaled by alpha / rank")
    targets: tuple[LinearName, ...] = Field(
        ALL_LINEAR, min_length=1, description="linear layers that get an adapter"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout before the adapter, in training only"
    )


class InitConfig(Section):
    """A model made of the first layers of a larger one."""

    path: PathText = Field(description="folder of the larger model")
    first_layers: PositiveInt = Field(description="number of first layers to keep")


class ModelSection(Section):
    """A model: the proxy or the student."""

    path: PathText | None = Field(
        None, description="Hugging Face folder (or hub name) of the model"
    )
    init: InitConfig | None = Field(
        None, description="cut the model out of a larger one, instead of path"
    )
    config: PathText | None = Field(
        None,
        description="folder of the model's config.json, for shapes in a dry run if the model "
        "itself is absent",
    )
    adapter: PathText | None = Field(None, description="PEFT LoRA folder to start from")
    license: str | None = Field(None, description="licence of this model, for the model card")
    trainable: Literal["lora", "full"] = Field("lora", description="train an adapter or everything")
    lora: LoraSettings = Field(LoraSettings(), description="the adapter, with trainable: lora")
    dtype: Dtype = Field(
        "bfloat16", description="precision of frozen weights and of the computation"
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="quantisation of the frozen linear layers (trainable: lora): none, or 8 or 4 "
        "bits per weight; done while loading",
    )
    remat: Literal["none", "dots", "outputs", "full"] = Field(
        "none",
        description="what is stored for the backward pass besides each layer's input; less saves "
        "memory and costs time: none = results of all matrix products, dots = outputs of linear "
        "layers, outputs = outputs of attention and MLP, full = nothing",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of path and init")
        return self

    @model_validator(mode="after")
    def _frozen(self) -> ModelSection:
        if self.quantize != "none" and self.trainable == "full":
            raise ValueError(
                f"quantize: {self.quantize} is only for frozen weights: "
                "give trainable: lora, or quantize: none"
            )
        return self


class OptimizerConfig(Section):
    """Adam (paper, 4.2)."""

    learning_rate: PositiveFloat = Field(description="peak learning rate")
    b1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="decay of the first moment")
    b2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    clip_norm: PositiveFloat | None = Field(description="largest gradient norm; null: no clipping")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning-rate schedule after warm-up"
    )
    warmup_steps: NonNegativeInt = Field(0, description="steps of linear warm-up")


class StopConfig(Section):
    """Stopping on validation NLL."""

    enabled: bool = Field(description="stop training when validation NLL no longer improves")
    every: PositiveInt = Field(50, description="steps between validations")
    patience: PositiveInt = Field(3, description="validations without improvement before stopping")
    min_delta: NonNegativeFloat = Field(
        0.0, description="smallest decrease that counts as an improvement, nats per token"
    )


class ConnectionSection(Section):
    """Timeout, retries and key for requests to a server."""

    timeout_s: PositiveFloat = Field(600.0, description="seconds to wait for one reply")
    retries: NonNegativeInt = Field(
        5, description="retries of a request after a timeout or a temporary failure"
    )
    api_key_env: str | None = Field(
        None, description="environment variable that holds the server's API key"
    )


class SamplingServer(ConnectionSection):
    """An OpenAI-compatible server that draws y-hat instead of the built-in sampler."""

    url: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$")] = Field(
        description="its address without /v1, such as http://127.0.0.1:8000"
    )
    api: Literal["vllm", "sglang", "transformers"] = Field(
        description="kind of server; it decides what is loaded and by which calls"
    )
    serves: Literal["adapter", "merged"] = Field(
        "adapter",
        description="what each round loads: the adapter (vllm, sglang), or the whole model with "
        "the adapter merged into it (sglang, transformers)",
    )
    model: PathText | None = Field(
        None,
        description="name or path of the base model on the server (default: proxy.path)",
    )
    prompt_as: Literal["ids", "text"] = Field(
        "ids",
        description="how prompts are sent: as token ids, or as text if it encodes to the same ids "
        "(transformers takes only text)",
    )
    concurrency: PositiveInt = Field(64, description="requests in flight at once")

    @model_validator(mode="after")
    def _able(self) -> SamplingServer:
        if self.api == "transformers" and (self.serves, self.prompt_as) != ("merged", "text"):
            raise ValueError("transformers loads no adapter: give serves: merged, prompt_as: text")
        if self.api == "vllm" and self.serves == "merged":
            raise ValueError("vllm cannot change its model while it runs: give serves: adapter")
        return self


class CollectConfig(ConnectionSection):
    """Answers of a teacher behind an API (docs/collecting.md)."""

    prompts: tuple[SourceConfig, ...] = Field(
        min_length=1, description="prompts, in any format of a corpus; answers there are not read"
    )
    folder: PathText = Field(
        description="where answers.jsonl is kept, for corpus.sources, with all that was sent"
    )
    url: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$")] = Field(
        description="address of an OpenAI-compatible API, such as https://api.openai.com/v1; "
        "/v1 is added to a bare host"
    )
    model: str = Field(min_length=1, description="name of the teacher there")
    parameters: dict[str, Any] = Field(
        {},
        description="more keys of a request, such as temperature, top_p, max_tokens or "
        "max_completion_tokens; with a seed, sample i has seed + i",
    )
    samples: PositiveInt = Field(1, description="answers to each prompt, one request each")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="ask for log-probs with so many alternatives, and keep them"
    )
    concurrency: PositiveInt = Field(16, description="requests in flight at once")
    requests_per_minute: PositiveFloat | None = Field(None, description="most requests a minute")
    tokens_per_minute: PositiveFloat | None = Field(
        None, description="most tokens of prompts and answers a minute, estimated before a request"
    )
    prices: PathText | None = Field(
        None, description="file of prices, for --estimate and --max-cost"
    )
    in_doubt: Literal["resend", "hold"] = Field(
        "resend",
        description="requests that were under way at a kill and may have been paid: send them "
        "again with the same Idempotency-Key, or leave them",
    )
    refusals: tuple[str, ...] | None = Field(
        None,
        description="regular expressions; an answer of at most 300 characters that one matches as "
        "a whole is kept apart as refused (default: answers such as: I'm sorry, but I can't help)",
    )

    @model_validator(mode="after")
    def _ours_alone(self) -> CollectConfig:
        ours = {"model", "messages", "n", "stream", "logprobs", "top_logprobs"}
        if taken := sorted(ours & self.parameters.keys()):
            raise ValueError(
                f"parameters: {', '.join(taken)} cannot be set there; use the keys model, samples "
                "and top_logprobs of collect (replies are never streamed)"
            )
        seed = self.parameters.get("seed", 0)
        if type(seed) is not int:
            raise ValueError("parameters: seed is an integer")
        for pattern in self.refusals or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"refusals: {pattern!r} is no pattern ({error})") from error
        return self


# Address and load of the server: keys that do not affect what is drawn.
_OF_THE_SERVER_ALONE = {"url", "concurrency", "timeout_s", "retries", "api_key_env"}
NOT_DECISIVE = {"sampling": {"server": _OF_THE_SERVER_ALONE}}


class SamplingConfig(Section):
    """How y-hat is drawn from the proxy."""

    temperature: NonNegativeFloat = Field(1.0, description="0 is greedy")
    top_p: Probability = Field(1.0, description="nucleus sampling; 1 keeps all tokens")
    max_new_tokens: PositiveInt | None = Field(
        None, description="length budget of an answer (default: what max_length leaves)"
    )
    batch_size: PositiveInt = Field(32, description="prompts decoded together")
    rows_per_part: PositiveInt = Field(
        256, description="rows written together; a restarted run loses at most one part"
    )
    server: SamplingServer | None = Field(
        None, description="a server that draws the answers instead of the built-in sampler"
    )

    @property
    def decisive(self) -> dict[str, Any]:
        """The keys that determine what is drawn, as JSON."""
        return self.model_dump(mode="json", exclude=NOT_DECISIVE["sampling"])


class PreferenceConfig(Section):
    """The preference loss (paper, eq. 4, and the alternatives it names)."""

    loss: Literal["dpo", "simpo", "orpo", "ipo", "none"] = Field(
        "dpo", description="DPO (the paper's), SimPO, ORPO, IPO, or none"
    )
    beta: PositiveFloat = Field(description="strength of the preference loss")
    margin: NonNegativeFloat = Field(0.0, description="SimPO: target margin (its gamma)")
    length_normalize: bool = Field(
        False, description="DPO and IPO: use token means instead of sums, as SimPO and ORPO do"
    )
    share_prompt: Literal["auto", True, False] = Field(
        "auto",
        description="put both answers of a pair into one row and compute their prompt once; "
        "auto: if that is less work",
    )

    @model_validator(mode="after")
    def _used(self) -> PreferenceConfig:
        if self.margin and self.loss != "simpo":
            raise ValueError(f"margin is SimPO's; {self.loss} would ignore {self.margin}")
        if self.length_normalize and self.loss not in ("dpo", "ipo"):
            raise ValueError(f"length_normalize is for dpo and ipo; {self.loss} would ignore it")
        return self


class TrainingSection(Section):
    """Keys of both training stages: batches, optimizer, and how often things happen."""

    batch_size: PositiveInt = Field(32, description="rows (or pairs) per step, over all devices")
    microbatch_size: PositiveInt | None = Field(
        None, description="rows computed at once; the gradients of a step are accumulated"
    )
    batching: Literal["pad", "bucket", "pack"] = Field(
        "bucket",
        description="pad each batch, group by length, or pack rows together (pairs are grouped)",
    )
    reduction: Reduction = Field("example_mean", description="how token losses become one number")
    optimizer: OptimizerConfig = Field(description="the optimizer")
    stop: StopConfig = Field(description="stopping on validation NLL")
    checkpoint_every: PositiveInt = Field(100, description="steps between checkpoints in a phase")
    diagnose_every: PositiveInt = Field(50, description="steps between gradient-norm reports")
    log_every: PositiveInt = Field(1, description="steps between lines of metrics.jsonl")

    @property
    def microbatches(self) -> int:
        """Number of parts in which a batch is computed."""
        return self.batch_size // (self.microbatch_size or self.batch_size)

    @model_validator(mode="after")
    def _divisible(self) -> TrainingSection:
        if self.batch_size % (self.microbatch_size or 1):
            raise ValueError(
                f"microbatch_size {self.microbatch_size} must divide batch_size {self.batch_size}"
            )
        return self


class AlignConfig(TrainingSection):
    """Alignment of the proxy with the teacher (paper, 3.3)."""

    alignment: Literal["none", "warmup", "nll", "nll_preference"] = Field(
        "nll_preference",
        description="not at all, by the warm-up alone, or also by rounds of NLL (and preference)",
    )
    num_rounds: PositiveInt = Field(description="rounds; each has its own slice of D_p (paper: 16)")
    epochs_per_round: PositiveInt = Field(description="passes over the slice of a round")
    warmup_epochs: PositiveInt = Field(description="passes over D_w before the rounds")
    warmup_max_steps: PositiveInt | None = Field(None, description="most warm-up steps")
    round_max_steps: PositiveInt | None = Field(None, description="most steps per round")
    stop_rounds: bool = Field(
        description="stop after the first round without a new best validation NLL"
    )
    nll_weight: NonNegativeFloat = Field(1.0, description="weight of the NLL (paper, eq. 6)")
    preference_weight: NonNegativeFloat = Field(
        1.0, description="weight of the preference loss (paper, eq. 6)"
    )
    preference: PreferenceConfig = Field(description="the preference loss")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how y-hat is drawn")

    @property
    def uses_pairs(self) -> bool:
        """Whether rounds draw y-hat and prefer y to it."""
        return self.alignment == "nll_preference" and self.preference.loss != "none"


class ScoreConfig(Section):
    """Soft labels of the aligned proxy (paper, A.1: top 10, stored offline)."""

    top_k: PositiveInt = Field(10, description="log-probs stored per position")
    temperature: PositiveFloat = Field(1.0, description="softmax temperature of the soft labels")
    store_dtype: Literal["float16", "float32"] = Field(
        "float16", description="precision of stored log-probs"
    )
    batch_size: PositiveInt = Field(32, description="rows scored together")
    rows_per_part: PositiveInt = Field(
        512, description="rows written together; a restarted run loses at most two parts"
    )


class WeightConfig(Section):
    """Sample weights (paper, eq. 9)."""

    enabled: bool = Field(True, description="weight each example's KL; off: the weight is 1")
    loglik: Literal["sum", "token_mean"] = Field(
        description="log-likelihood in eq. 9: summed (as printed) or per token"
    )
    normalize: bool = Field(description="scale the weights to mean 1")


class DistillConfig(TrainingSection):
    """Distillation of the student (paper, 3.4)."""

    alpha: NonNegativeFloat = Field(description="weight of the KL (paper, eq. 11: 100)")
    nll_weight: NonNegativeFloat = Field(1.0, description="weight of the NLL")
    tail: Literal["bucket", "renormalize", "renormalize_proxy", "zero"] = Field(
        description="how the probability outside the top k is treated"
    )
    weights: WeightConfig = Field(description="sample weights")
    data: Literal["distill", "all"] = Field(
        description="teacher rows the student sees: D_s, or all of D_w, D_p and D_s"
    )
    epochs: PositiveInt = Field(description="passes over the data, if nothing stops earlier")
    max_steps: PositiveInt | None = Field(None, description="most steps")


class EndpointConfig(ConnectionSection):
    """An OpenAI-compatible server that ``evaluate`` names as a model."""

    concurrency: PositiveInt = Field(16, description="requests in flight at once")


class DuringConfig(Section):
    """Benchmarks that the student answers during training (the paper's Figs. 6 and 7)."""

    every: PositiveInt = Field(
        description="optimizer steps between two evaluations; there is also one before the first "
        "step and one after the last"
    )
    tasks: tuple[str, ...] | None = Field(
        None, description="which of the named benchmarks (default: all)"
    )
    items: PositiveInt = Field(
        100, description="most questions per benchmark, drawn once by the seed"
    )
    max_new_tokens: PositiveInt = Field(256, description="length budget of an answer")


class BenchmarksConfig(Section):
    """Benchmarks, the models that answer them, and how."""

    agieval: PathText | None = Field(
        None,
        description="files of AGIEval: file, folder or glob; or a hub dataset as hub:NAME#SPLIT or "
        "hub:NAME#SUBSET/SPLIT, with * for all subsets; likewise for the others",
    )
    arc: PathText | None = Field(None, description="files of ARC-Challenge")
    bbh: PathText | None = Field(None, description="files of BIG-Bench Hard, one per sub-task")
    csqa: PathText | None = Field(None, description="files of CommonsenseQA")
    gsm8k: PathText | None = Field(None, description="files of GSM8K")
    mmlu: PathText | None = Field(None, description="files of MMLU, one per subject")
    models: tuple[NamedPathText, ...] = Field(
        ("student",),
        description="who answers: student, proxy, either with :best, :last or :exported, "
        "student:before, proxy:raw, proxy:warmup, proxy:round_N, a model's folder, "
        "http://host:port#model, or a .jsonl of collected outputs; NAME=WHAT names one",
    )
    mode: Literal["generate", "loglikelihood", "both"] = Field(
        "generate",
        description="generate answers and extract them, or compare choices by the log-likelihood "
        "of their texts, or both",
    )
    harness: bool = Field(
        False,
        description="let local models also answer the same questions through EleutherAI's harness, "
        "with its own extraction and scoring (extra lm-eval)",
    )
    limit: PositiveInt | None = Field(None, description="most items per sub-task")
    max_new_tokens: PositiveInt = Field(1024, description="length budget of an answer")
    batch_size: PositiveInt = Field(32, description="items answered together")
    items_per_part: PositiveInt = Field(
        64, description="items written together; a restarted run loses at most one part"
    )
    endpoint: EndpointConfig = Field(EndpointConfig(), description="requests to a server")
    during: DuringConfig | None = Field(
        None, description="benchmarks that the student answers during distill"
    )

    @model_validator(mode="after")
    def _some_task(self) -> BenchmarksConfig:
        if not self.paths:
            raise ValueError("name the files of at least one benchmark")
        if not self.models:
            raise ValueError("models must name at least one model")
        return self

    @property
    def paths(self) -> dict[str, str]:
        """The configured benchmarks and where their files are."""
        named = {
            "agieval": self.agieval,
            "arc": self.arc,
            "bbh": self.bbh,
            "csqa": self.csqa,
            "gsm8k": self.gsm8k,
            "mmlu": self.mmlu,
        }
        return {task: path for task, path in named.items() if path is not None}


class EvaluateConfig(Section):
    """What is measured on held-out rows and on benchmarks."""

    batch_size: PositiveInt = Field(32, description="rows computed together")
    max_rows: PositiveInt | None = Field(None, description="most rows to measure")
    rounds: bool = Field(
        True, description="measure the proxy after each round, not only raw, warmed up and aligned"
    )
    answers: Annotated[int, Field(ge=0, le=200)] = Field(
        20,
        description="held-out prompts that proxy and student answer greedily, for the report; 0: "
        "none",
    )
    teacher_logps: PathText | None = Field(
        None,
        description="folder of the teacher's true distribution on the test rows, if the teacher is "
        "a known process; then exact KL is measured",
    )
    benchmarks: BenchmarksConfig | None = Field(None, description="benchmarks to answer")


class ExportConfig(Section):
    """The models that a run leaves behind."""

    dtype: Dtype = Field("bfloat16", description="precision of exported weights")
    state: Literal["best", "last"] = Field(
        description="use the state with the best validation NLL or the last one, of the proxy for "
        "soft labels and of the student for export"
    )
    proxy: Literal["adapter", "merged", "none"] = Field(
        "adapter",
        description="what to export of the proxy; with trainable: full, adapter means the model",
    )
    max_shard_gb: PositiveFloat = Field(5.0, description="largest safetensors file")
    license: str | None = Field(
        None,
        description="licence of the exported models, as the hub writes it (apache-2.0), for the "
        "model card",
    )


# Kinds of work for which devices can be arranged.
Work = Literal["align", "sample", "score", "distill", "evaluate"]


class AxesConfig(Section):
    """An arrangement of the devices; the product of its axes must be their number."""

    data: PositiveInt | Literal["rest"] = Field(
        "rest", description="number of data-parallel copies; rest: all devices that remain"
    )
    fsdp: PositiveInt = Field(1, description="number of shards of weights and rows")
    tensor: PositiveInt = Field(1, description="number of shards of heads and hidden units")


class MeshConfig(AxesConfig):
    """How the devices are arranged, for all work or for one kind."""

    sample: AxesConfig | None = Field(
        None,
        description="another arrangement for drawing answers: fsdp gathers the weights for "
        "every token, tensor does not",
    )
    score: AxesConfig | None = Field(None, description="another arrangement for score")
    distill: AxesConfig | None = Field(None, description="another arrangement for distill")
    evaluate: AxesConfig | None = Field(
        None,
        description="another arrangement for evaluate, which also draws answers; {} (data only) is "
        "fastest for a model that fits a device",
    )

    def of(self, work: Work) -> AxesConfig:
        """Returns the arrangement for a kind of work."""
        return getattr(self, work, None) or self

    def drawing(self, work: Work) -> Work:
        """Returns the kind of work whose arrangement draws answers in the middle of ``work``.

        It is ``sample``, unless ``work`` has an arrangement of its own and ``sample`` has none.
        """
        own = getattr(self, work, None)
        return work if own is not None and self.sample is None else "sample"


class LoggingConfig(Section):
    """Where metrics go in addition to metrics.jsonl; a failing tracker never stops a run."""

    tensorboard: bool = Field(False, description="write TensorBoard events (extra: tensorboard)")
    wandb_project: str | None = Field(
        None, description="project for Weights & Biases (extra: wandb)"
    )
    price_per_hour: PositiveFloat | None = Field(
        None,
        description="price of all machines of the run for one hour, in any currency; the report "
        "then shows what the run cost",
    )


class Config(Section):
    """A whole run."""

    preset: Literal["paper", "recommended"] = Field(
        description="paper: the most literal reading; recommended: what measures best. No default"
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = Field(
        description="name of the run"
    )
    runs_dir: PathText = Field("runs", description="the run's folder is runs_dir/name")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="seed of all random draws")
    method: Method = Field(
        ProxyKd(),
        description="how the student is trained; a name alone stands for the method with its "
        "defaults (docs/methods.md)",
    )
    tokenizer: PathText | None = Field(
        None, description="folder of the tokenizer (default: the proxy's folder)"
    )
    corpus: CorpusConfig = Field(description="the teacher's answers")
    collect: CollectConfig | None = Field(
        None, description="collection of a teacher's answers, before the run"
    )
    proxy: ModelSection = Field(description="the white-box proxy")
    student: ModelSection = Field(description="the student")
    align: AlignConfig = Field(description="alignment of the proxy")
    score: ScoreConfig = Field(ScoreConfig(), description="soft labels")
    distill: DistillConfig = Field(description="distillation of the student")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="held-out measures")
    export: ExportConfig = Field(description="exported models")
    mesh: MeshConfig = Field(MeshConfig(), description="arrangement of devices")
    logging: LoggingConfig = Field(LoggingConfig(), description="trackers")
    verify: Literal["full", "sampled", "off"] = Field(
        "full",
        description="how a finished stage is compared with the digests of its files before it is "
        "used: every file once per process, small files and one in ten of those above 64 MiB, or "
        "names and sizes alone",
    )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.name

    @property
    def needs(self) -> Needs:
        """What the student needs besides the teacher's texts; it must be made before training."""
        return self.method.needed(self.distill.alpha)

    @model_validator(mode="after")
    def _names(self) -> Config:
        if self.name in {".", ".."}:
            raise ValueError("name must not be '.' or '..'")
        return self

    @model_validator(mode="after")
    def _suits_the_method(self) -> Config:
        self.method.check(self)
        return self

    @model_validator(mode="after")
    def _fresh_prompts_are_used(self) -> Config:
        if self.corpus.fresh_prompts and not self.method.uses_fresh_prompts:
            raise ValueError(
                f"corpus.fresh_prompts: method {self.method.name} does not use these prompts; "
                "remove them, or choose proxy_kd or on_policy, which learn from them"
            )
        return self

    @model_validator(mode="after")
    def _scorer_is_aligned(self) -> Config:
        wants = getattr(self.method, "scorer", None) == "aligned"
        if wants and self.align.alignment == "none":
            raise ValueError(
                "method.scorer is aligned, but align.alignment is none: choose how far the proxy "
                "is aligned, or scorer: unaligned"
            )
        return self

    @model_validator(mode="after")
    def _served(self) -> Config:
        server = self.align.sampling.server
        if server is not None and server.serves == "adapter":
            if self.proxy.trainable == "full":
                raise ValueError(
                    "proxy.trainable: full has no adapter to serve; set serves: merged"
                )
            if self.proxy.init is not None:
                raise ValueError(
                    "a server has no base model for an adapter of proxy.init; set serves: merged"
                )
        return self
