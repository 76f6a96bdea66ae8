"""chunked_loss: the loss and every gradient are those of whole logits, for heads of all kinds, and whole logits never exist."""

import copy
import inspect

import pytest
import torch
import transformers

from tightfit.techniques.chunked_loss import ChunkedLoss
from tightfit.terms.errors import TightfitError

SMALL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": 131, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()
}
MODELS = {
    "llama": ("LlamaForCausalLM", SMALL),
    "tied": ("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "soft cap": ("Gemma2ForCausalLM", SMALL | {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}),
    "factor": ("CohereForCausalLM", SMALL | {"logit_scale": 0.3}),
    "divisor": ("GraniteForCausalLM", SMALL | {"logits_scaling": 2.5}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 131, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTForCausalLM", SMALL | {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "neox": ("GPTNeoXForCausalLM", SMALL),
    "biased head": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 131, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "masked": ("BertForMaskedLM", SMALL),
    "experts": (
        "Qwen3MoeForCausalLM",
        SMALL | {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "biased logits": (
        "BartForConditionalGeneration",
        BART | {"vocab_size": 131, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 2},
    ),
}


def made(name: str) -> torch.nn.Module:
    """A model with random weights; BART's bias, zero at first, is random too."""
    cls, values = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, cls)
    model = model_class(model_class.config_class(**values)).eval()
    if "final_logits_bias" in model._buffers:
        model.final_logits_bias.normal_()
    return model


def batch() -> dict[str, torch.Tensor]:
    """Two rows of 13 tokens, of which some do not count."""
    ids = torch.randint(3, 131, (2, 13), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.where(torch.arange(26).view(2, 13) % 7 == 0, -100, ids)}


@pytest.mark.parametrize("tokens", [7, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_whole_logits(name, tokens):
    plain = made(name)
    chunked = copy.deepcopy(plain)
    ChunkedLoss(tokens).apply(chunked)
    expected, found = plain(**batch()).loss, chunked(**batch()).loss
    torch.testing.assert_close(found, expected)
    (3 * expected).backward()
    (3 * found).backward()
    gradients = {name: parameter.grad for name, parameter in chunked.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked(**batch()).loss, expected)


def test_without_labels_nothing_changes():
    plain, ids = made("llama"), batch()["input_ids"]
    expected = plain(input_ids=ids).logits
    ChunkedLoss().apply(plain)
    assert torch.equal(plain(input_ids=ids).logits, expected)


def test_a_count_for_the_whole_batch_is_taken_as_transformers_takes_it():
    """With gradient accumulation `Trainer` counts the targets of all micro-batches."""
    plain = made("llama")
    expected = plain(**batch(), num_items_in_batch=torch.tensor(40)).loss
    ChunkedLoss(5).apply(plain)
    torch.testing.assert_close(plain(**batch(), num_items_in_batch=torch.tensor(40)).loss, expected)


def test_no_tensor_is_as_large_as_the_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (131,) and tensor.shape != (32, 131):  # the head itself
                    Largest.seen = max(Largest.seen, tensor.numel() // 131)
            return out

    model = made("llama")
    model.lm_head.requires_grad_(False)
    ChunkedLoss(4).apply(model)
    with Largest():
        model(**batch()).loss.backward()
    assert Largest.seen == 4


@pytest.mark.parametrize(
    ("model", "technique", "said"), [("llama", ChunkedLoss(0), "at least 1"), (None, ChunkedLoss(), "no vocabulary head")]
)
def test_what_it_does_not_take(model, technique, said):
    chosen = made(model) if model else transformers.BertModel(transformers.BertConfig(**SMALL))
    with pytest.raises(TightfitError, match=said) as caught:
        technique.apply(chosen)
    assert caught.value.hint


def test_it_says_what_the_model_takes():
    """transformers asks the signature: `Trainer` for the columns to hand on, `generate` for the positions of padded prompts."""
    plain = made("llama")
    expected = inspect.signature(plain.forward)
    chunked = copy.deepcopy(plain)
    ChunkedLoss().apply(chunked)
    assert inspect.signature(chunked.forward) == expected
    assert inspect.signature(copy.deepcopy(chunked).forward) == expected
    prompts = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(2, 13, dtype=torch.long)}
    prompts["attention_mask"][0, :5] = 0
    written = [model.generate(**prompts, max_new_tokens=5, do_sample=False) for model in (plain, chunked)]
    assert torch.equal(*written)
