"""Lengths: how many tokens each side of a model can tell apart, and what is said to work that is longer."""

from collections.abc import Iterator
from typing import Any

from tightfit.terms.errors import TightfitError

_AFTER_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "data2vec-text", "ibert"),
    *("longformer", "luke", "lilt", "markuplm", "mpnet", "esm"),
)
"""Architectures whose first token has the position after that of padding (`create_position_ids_from_input_ids` over one table)."""


def positions_of(config: Any) -> int | None:
    """Tokens that one side of the model takes; None where nothing limits them (BLOOM's and T5's distances are relative)."""
    values = vars(config.get_text_config())
    if "relative_attention_num_buckets" in values and "max_position_embeddings" not in values:
        return None
    positions = values.get("max_position_embeddings") or values.get("n_positions")
    if positions and config.model_type in _AFTER_PADDING:
        return positions - config.pad_token_id - 1
    return positions


def check_lengths(config: Any, tokens: int, new_tokens: int = 0) -> None:
    """Refuse a prompt of `tokens` (or a sequence, where nothing is written) and `new_tokens` that are more than the model's positions.

    A decoder holds both; an encoder–decoder model holds the prompt on one side and the new tokens on the other.
    """
    positions = positions_of(config)
    for needed, what in _sides(config, tokens, new_tokens):
        if positions and needed > positions:
            raise TightfitError(
                f"{what}, more than the model's {positions} positions",
                hint=f"the model has {positions} positions{_advice(config, positions, tokens, new_tokens)}",
            )


def _sides(config: Any, tokens: int, new_tokens: int) -> Iterator[tuple[int, str]]:
    if config.is_encoder_decoder or not new_tokens:
        yield tokens, f"a sequence has {tokens} tokens"
        yield new_tokens, f"{new_tokens} new tokens are asked for"
    else:
        yield tokens + new_tokens, f"{tokens} tokens and {new_tokens} new ones make {tokens + new_tokens}"


def _advice(config: Any, positions: int, tokens: int, new_tokens: int) -> str:
    if config.is_encoder_decoder or not new_tokens:
        return " on each side" if config.is_encoder_decoder else f": ask for `--context {positions}` or less"
    if tokens < positions:
        return f", for prompt and new tokens together: shorten the prompt, or ask for `--max-new-tokens {positions - tokens}`"
    return ", for prompt and new tokens together: shorten the prompt"
