"""What the trainer checks and prepares before it starts: datasets, the policy, the tokenizer, end tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from fastgrpo.models.adapters import add_reference
from fastgrpo.models.calls import AnyModel
from fastgrpo.models.head import is_peft
from fastgrpo.trainer.config import GRPOConfig, as_dict, name_of_logits_dtype


def only_iterates(dataset: Any) -> bool:
    """Whether a dataset has no length or no rows by index, such as one that is streamed."""
    return not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


def check_dataset(name: str, dataset: Any, needed: Sequence[str] = ("prompt",)) -> None:
    """Raise unless `dataset` is None, or has rows, by index or to iterate over, with the needed columns."""
    if dataset is None:
        return
    if only_iterates(dataset) and (not hasattr(dataset, "__iter__") or hasattr(dataset, "__next__")):
        raise TypeError(
            f"{name}: expected a dataset with rows by index, or one to iterate over again and again, got "
            f"{type(dataset).__name__}"
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None and only_iterates(dataset):
        columns = next(iter(dataset), [])
    elif not columns:
        columns = list(dataset[0]) if len(dataset) else []
    for column in needed:
        if column not in columns:
            raise ValueError(f"{name}: expected a column {column!r}, got the columns {', '.join(columns) or 'none'}")


def prepare_to_iterate(args: TrainingArguments, datasets: Sequence[Any]) -> None:
    """Set what the loader needs for datasets that can only be iterated: each process reads them itself."""
    if not any(dataset is not None and only_iterates(dataset) for dataset in datasets):
        return
    accelerator: Any = args.accelerator_config  # of a dict, __post_init__ makes an object
    if accelerator.dispatch_batches:
        raise ValueError("dispatch_batches: expected False with a dataset that can only be iterated, got True")
    accelerator.dispatch_batches = False
    if args.dataloader_num_workers != 0:
        warnings.warn(
            f"a dataset that can only be iterated is read by one worker, not by {args.dataloader_num_workers}",
            stacklevel=3,
        )
        args.dataloader_num_workers = 0


def check_logits_dtype(given: str | torch.dtype, args: TrainingArguments, model: str | AnyModel) -> str:
    """`name_of_logits_dtype` for a model that is loaded, or is to be loaded from a path."""
    if isinstance(model, str):
        options = args.model_init_kwargs if isinstance(args, GRPOConfig) else None
        return name_of_logits_dtype(given, args, as_dict(options).get("dtype", torch.float32))
    return name_of_logits_dtype(given, args, getattr(model, "dtype", None))


def load_policy(model: str | AnyModel, args: GRPOConfig, peft_config: Any) -> tuple[nn.Module, list[str]]:
    """(the model to train, the names of the frozen copies of its adapters that are its reference)."""
    if isinstance(model, str):
        options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(model, **{**options, **as_dict(args.model_init_kwargs)})
    elif args.model_init_kwargs:
        warnings.warn("model_init_kwargs has no effect on a model that is passed as an object", stacklevel=3)
    if peft_config is None:
        return model, add_reference(model) if args.objective().needs_ref and is_peft(model) else []
    from peft import get_peft_model

    if is_peft(model):
        raise ValueError("peft_config: expected None with a model that has an adapter already, got both")
    return get_peft_model(model, peft_config), []


def prepare_tokenizer(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer, loaded from the model's path if None, with a pad token that the model's configs agree on."""
    config = model.config.get_text_config()
    if tokenizer is None:
        path = model.config._name_or_path
        if not path:
            raise ValueError("processing_class: expected a tokenizer, since the model was not loaded from a path")
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class: expected a tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("processing_class: expected a tokenizer with a pad or an eos token, got neither")
    config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def end_tokens(model: AnyModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: a model may end its turn with another one than the tokenizer's."""
    ends = as_list(model.generation_config.eos_token_id)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    return ends


def as_list(ids: int | Sequence[int] | None) -> list[int]:
    """Token ids as a generation config has them: none, one or several."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def prepare_policy(model: AnyModel, args: GRPOConfig) -> None:
    """What training needs of the model beyond its weights: no dropout if so asked, inputs that require a gradient."""
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", None):
        warnings.warn("the load-balancing loss of experts models is not part of the objective", stacklevel=3)
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if args.checkpoints_activations and is_peft(model):
        model.enable_input_require_grads()  # the first checkpointed layer's input comes from frozen weights
