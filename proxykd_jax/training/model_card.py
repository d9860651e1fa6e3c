"""The README.md of an exported folder: a model card that Hugging Face's hub reads.

It says only what the run knows: its config, the counts of its corpus, and what was measured of this
very state. What is unknown, such as a licence that nobody gave, is left out. It is no input of any
stage, so a new one changes no fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import read_json, read_record, stage_identity, write_bytes
from proxykd_jax.config import Config, ModelSection, SourceConfig
from proxykd_jax.texts.selection import source_label

CARD_FILE = "README.md"
FOLDERS = ("student", "student_adapter", "proxy", "proxy_adapter")
# The name that evaluate gives to the exported state of a model.
_MEASURED = {"student": "student", "proxy": "proxy_aligned"}
_BEFORE = {"student": "student_before", "proxy": "proxy_raw"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Ranks that vLLM takes for --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Half the width of a 95 % interval, in standard errors.
_HALF_WIDTH = 1.96


def write_cards(config: Config, roles: Collection[str] = ("proxy", "student")) -> None:
    """Writes the card of each exported folder of these models, where it differs from the one there.

    Settings of a stage that has not been checked against the config would be those of another run,
    so a stage writes the cards of its own model alone.
    """
    for name in FOLDERS:
        if name.removesuffix("_adapter") not in roles:
            continue
        folder = config.folder / "export" / name
        if not folder.is_dir():
            continue
        text, path = model_card(config, name), folder / CARD_FILE
        if not path.is_file() or path.read_text("utf-8") != text:
            write_bytes(path, text.encode())


def model_card(config: Config, name: str) -> str:
    """The card of ``export/<name>``, one of ``FOLDERS``, as Markdown with YAML front matter."""
    import yaml

    role, adapter = name.removesuffix("_adapter"), name.endswith("_adapter")
    head = yaml.safe_dump(_front_matter(config, role, adapter=adapter), sort_keys=False)
    sections = {
        "What it is": _about(config, role, adapter=adapter),
        "How to run it": _commands(config, name, role, adapter=adapter),
        "Data": _data(config),
        "Training": _settings(config, role),
        "Measurements": _figures(config, role, adapter=adapter),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{head}---\n\n# {config.name}: {name}\n\n{body}\n"


def _front_matter(config: Config, role: str, *, adapter: bool) -> dict[str, Any]:
    base = _origin(getattr(config, role))
    head: dict[str, Any] = {"license": config.export.license}
    if _is_hub_name(base):
        relation = "adapter" if adapter else "finetune"
        head |= {"base_model": base, "base_model_relation": relation}
    names = [source.dataset for source in config.corpus.sources if _is_hub_name(source.dataset)]
    head |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "proxykd_jax", *(["lora"] if adapter else [])],
        "datasets": list(dict.fromkeys(names)),
    }
    return {key: value for key, value in head.items() if value}


def _origin(model: ModelSection) -> str:
    return str(model.path if model.init is None else model.init.path)


def _is_hub_name(name: str | None) -> bool:
    return bool(name and _HUB_NAME.fullmatch(name) and not Path(name).exists())


def _about(config: Config, role: str, *, adapter: bool) -> str:
    model: ModelSection = getattr(config, role)
    kind = "A LoRA adapter for" if adapter else "A whole model, trained from"
    cut = f", cut to its first {model.init.first_layers} layers" if model.init else ""
    does = (
        f"It was trained by the method `{config.method.name}` to answer as a black-box model does, "
        "from texts of that model's answers."
        if role == "student"
        else "It is the proxy: a white-box model aligned with a black-box model's answers, whose "
        "token distributions a student learns from."
    )
    lines = [f"{kind} {_shown(_origin(model))}{cut}. {does} Made with proxykd_jax."]
    others = "student", "proxy"
    for each in others if config.needs != "nothing" else ("student",):
        section: ModelSection = getattr(config, each)
        licence = f", licence {section.license}" if section.license else ""
        lines.append(f"- base of the {each}: {_shown(_origin(section))}{licence}")
    return "\n".join([lines[0], "", *lines[1:]])


def _shown(name: str) -> str:
    """A hub name, or the last part of a path: other folders of the machine are of no use."""
    return f"`{name}`" if _is_hub_name(name) else f"`{Path(name).name}`, a local folder"


def _commands(config: Config, name: str, role: str, *, adapter: bool) -> str:
    model: ModelSection = getattr(config, role)
    base = _origin(model)
    local = Path(base).name
    base = base if _is_hub_name(base) else local
    load = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if adapter:
        tokenizer = config.tokenizer or config.proxy.path or base
        tokenizer = tokenizer if _is_hub_name(tokenizer) else Path(tokenizer).name
        rank = next((each for each in _VLLM_RANKS if each >= model.lora.rank), model.lora.rank)
        load[0] = f"from peft import PeftModel\n{load[0]}"
        load += [
            f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")',
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(model, "{name}")',
        ]
        vllm = (
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={name}"
        )
        llama = (
            f"python convert_hf_to_gguf.py {local} --outfile base.gguf\n"
            f"python convert_lora_to_gguf.py {name} --base {local} --outfile {name}.gguf\n"
            f"llama-cli -m base.gguf --lora {name}.gguf"
        )
    else:
        load += [
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        ]
        vllm = f"vllm serve {name}"
        llama = (
            f"python convert_hf_to_gguf.py {name} --outfile {name}.gguf\nllama-cli -m {name}.gguf"
        )
    folder = config.folder / "export" / name
    if config.corpus.template != "plain" if adapter else _has_template(folder):
        ask = [
            'messages = [{"role": "user", "content": "..."}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        ask = ['inputs = tokenizer("...", return_tensors="pt")']
    code = "\n".join(
        [
            *load,
            *ask,
            "output = model.generate(**inputs, max_new_tokens=256)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
        ]
    )
    places = f"`{name}` is this folder"
    if adapter:
        copy = "the base model" if base == local else f"a local copy of {base}"
        places += f", `{local}` {copy}"
        if config.corpus.template != "auto":
            places += (
                f". The run asked with the template {_plain_name(config.corpus.template)}, which "
                "the base's own tokenizer may not have"
            )
    return (
        f"{places}.\n\n```python\n{code}\n```\n\n```\n{vllm}\n```\n\n"
        f"With llama.cpp, from its checkout:\n\n```\n{llama}\n```"
    )


def _plain_name(template: str) -> str:
    return f"`{Path(template).name}`"


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def _data(config: Config) -> str:
    path = config.folder / "corpus" / "manifest.json"
    if not path.is_file():
        return ""
    counts = read_json(path)["counts"]
    groups = {"sources": config.corpus.sources, "fresh_prompts": config.corpus.fresh_prompts}
    licensed = any(source.license for sources in groups.values() for source in sources)
    columns = ["source", "rows read", "kept", "dropped", *(["licence"] if licensed else [])]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for group, sources in groups.items():
        for index, source in enumerate(sources):
            found = counts["sources"].get(source_label(group, index, source))
            if found is not None:
                lines.append(_source_row(group, source, found, licensed=licensed))
    splits = ", ".join(
        f"{name} {split['rows']:,}" for name, split in counts["splits"].items() if split["rows"]
    )
    return "\n".join([*lines, "", f"Rows of each split: {splits}."])


def _source_row(
    group: str, source: SourceConfig, found: Mapping[str, Any], *, licensed: bool
) -> str:
    named = source.path or source.dataset or source.tfds or ""
    shown = named if _is_hub_name(source.dataset) else Path(named).name
    shown += " (prompts only)" if group == "fresh_prompts" else ""
    dropped = "; ".join(f"{why}: {drop['count']:,}" for why, drop in found["drops"].items())
    cells = [shown, f"{found['read']:,}", f"{found['kept']:,}", dropped or "-"]
    cells += [source.license or ""] if licensed else []
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _settings(config: Config, role: str) -> str:
    model: ModelSection = getattr(config, role)
    section = config.distill if role == "student" else config.align
    rows: dict[str, Any] = {"preset": config.preset, "seed": config.seed}
    if role == "student":
        rows |= {"method": config.method.name, "epochs": config.distill.epochs}
        if config.method.name == "proxy_kd":
            rows |= {
                "alpha (weight of the KL)": config.distill.alpha,
                "weight of the NLL": config.distill.nll_weight,
            }
    else:
        rows |= {"alignment": config.align.alignment}
        if config.align.alignment.startswith("nll"):
            rows |= {"rounds": config.align.num_rounds}
        if config.align.uses_pairs:
            rows |= {"preference loss": config.align.preference.loss}
    rows |= {
        "trained": model.trainable
        if model.trainable == "full"
        else f"LoRA, rank {model.lora.rank}, alpha {model.lora.alpha:g}",
        "batch size": section.batch_size,
        "learning rate": section.optimizer.learning_rate,
        "longest row, in tokens": config.corpus.max_length,
        "state": config.export.state,
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _figures(config: Config, role: str, *, adapter: bool) -> str:
    lines = [*_measured(config, role)]
    record = config.folder / "export" / f"{role}.json"
    nll = read_record(record).get("validation_nll", {}) if record.is_file() else {}
    if nll and not adapter:
        lines += [
            "",
            f"The files of this folder, read back in {config.export.dtype}: validation NLL "
            f"{nll['exported']:.4f}; as trained {nll['trained']:.4f}.",
        ]
    return "\n".join(lines).strip()


def _measured(config: Config, role: str) -> Iterator[str]:
    """The table of ``eval/summary.json``, if it was measured of the state that is exported."""
    folder, name = config.folder / "eval", _MEASURED[role]
    path = folder / "summary.json"
    if not path.is_file():
        return
    summary = read_json(path)
    measured = summary.get("stages", {}).get(name), summary.get("state")
    if measured != (stage_identity(config.folder / role), config.export.state):
        return
    yield "On held-out rows, against the black-box model's own tokens (nats, 95 % intervals):"
    yield ""
    yield "| rows | n | NLL per token | top-1 agreement | NLL less that of the base |"
    yield "|---|---|---|---|---|"
    pair = summary["differences"].get(f"{name} - {_BEFORE[role]}", {})
    for split, found in summary["models"][name].items():
        cells = (
            split,
            f"{found['n']:,}",
            _interval(found["nll"]),
            _interval(found["agreement"]),
            _interval(pair[split]["nll"]) if split in pair else "",
        )
        yield f"| {' | '.join(cells)} |"


def _interval(found: Mapping[str, float | None]) -> str:
    mean, error = found["token_mean"], found["token_se"]
    if mean is None:
        return ""
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {_HALF_WIDTH * error:.4f}"
