"""Quantize tables: what the page of benchmarks shows of models in few bits."""

from typing import Any

from cells import ABSENT, Results, table, told, yes

NAMES = {
    "rtn": "rtn",
    "gptq": "gptq",
    "gptq-strong": "gptq, grouped and searched",
    "lean": "lean",
    "lean-affine": "lean, affine",
    "lean-affine-grouped": "lean, affine, grouped",
    "nf4": "NF4, scales in 8 bits (bitsandbytes)",
    "nf4-plain": "NF4 (bitsandbytes)",
    "hqq": "HQQ (torchao)",
    "k-quants": "k-quants (llama.cpp)",
}
"""Methods in the order of the table."""

MODELS = ("stories260k", "demo", "minilm")


def quantize_quality(results: Results) -> str:
    """Scores by model, bits and method; the bars; what one setting of `lean` does."""
    found = {model: results[model] for model in MODELS if model in results}
    if not found:
        return ABSENT
    rows, bars = [], []
    for model, result in found.items():
        rows.append([model, "-", "dense", "32", _score(result["dense"]), "", "", ""])
        for bits in map(str, result["settings"]["bits"]):
            ways = result["summary"].get(bits, {})
            rows += [_row(model, bits, method, ways[method]) for method in NAMES if method in ways]
        kept = result["summary"]["bars"]
        bars += [[model, name, kept.get(f"{name}, by") or "", yes(value)] for name, value in kept.items() if not name.endswith(", by")]
    intro = (
        "Trained models after their blocks' linear layers were quantized: perplexity of text that was not drawn, or, for a model of "
        "sentences, the mean cosine to its dense embeddings and Spearman's correlation on the STS benchmark. *Bits*: of a weight, tables "
        "and scales included. *Closed*: the share of plain GPTQ's gap to the dense model that is gone, in log perplexity or in cosine. "
        "Means over *seeds*, each of which draws other calibration text; *spread* is their standard deviation in nats or cosine."
    )
    first = table("model|codes:|method|bits:|score:|closed:|spread:|seeds:", rows)
    second = table("model|wished|by|kept", bars)
    sources = [told(result["machine"], "quantize_quality", model) for model, result in found.items()]
    return "\n\n".join(
        [intro, first, "Ours of any width counts against a peer that is as large or larger.", second, *_explored(results), *sources]
    )


def _row(model: str, bits: str, method: str, way: dict[str, Any]) -> list[str]:
    share = way["share_closed"]
    closed = "" if share is None or method == "gptq" else f"{share:.0%}"
    spread = f"{way['spread']:.4f}" if len(way["seeds"]) > 1 else ""
    return [model, bits, NAMES[method], f"{way['bits_per_weight']:.2f}", _score(way), closed, spread, str(len(way["seeds"]))]


def _score(way: dict[str, Any]) -> str:
    if "perplexity" in way:
        return f"{way['perplexity']:.3f}"
    return f"{way['cosine']:.4f} ({way['spearman']:.3f})"


def _explored(results: Results) -> list[str]:
    """A table a model: what changes when one setting of `lean` does."""
    parts = []
    for model in MODELS:
        result = results.get(f"explore_{model}")
        if result is None:
            continue
        changes: dict[str, dict[int, str]] = {}
        for row in result["rows"]:
            changes.setdefault(row["change"], {})[row["bits"]] = _score(row)
        bits = sorted({row["bits"] for row in result["rows"]}, reverse=True)
        body = table(
            "|".join([f"{model}: change", *(f"{one} bits:" for one in bits)]),
            ([f"`{name}`", *(by.get(one, "") for one in bits)] for name, by in changes.items()),
        )
        parts += ["One setting of `lean` at a time, the first seed:" if not parts else "", body]
    return [part for part in parts if part]
