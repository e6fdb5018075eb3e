"""The head of a Hugging Face model: logits made from what is read off the config are the model's own."""

import pytest
import torch
import transformers

from fastgrpo.models.head import check_completion_head, run_completion_head
from fastgrpo.reference import project

TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
HEADS = {
    "Llama": {},
    "Qwen2": dict(tie_word_embeddings=True),
    "Qwen3": dict(head_dim=8),
    "Gemma2": dict(head_dim=8, final_logit_softcapping=5.0),
    "Cohere": dict(logit_scale=0.3),
    "Granite": dict(logits_scaling=4.0),
}


def tiny_model(family, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, pad_token_id=0, bos_token_id=None, eos_token_id=1, **{**TINY, **options}
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # logits large enough for a softcap to show
    return model


@pytest.mark.parametrize("family", HEADS)
def test_logits_equal_the_models(family):
    model = tiny_model(family, **HEADS[family])
    check_completion_head(model)
    ids = torch.randint(2, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits[:, -5:-1]
        got = run_completion_head(
            model, ids, mask, 4, lambda hidden, head: project(hidden, head.weight, **head.options)
        )
    assert own.abs().max() > 1
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
