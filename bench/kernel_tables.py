"""Kernel tables: what the page of benchmarks shows of products with few-bit weights."""

from cells import ABSENT, Results, table, times, told, yes

SIDES = {
    "table": "tables",
    "affine": "groups of 128",
    "nf4-packed": "NF4, bitsandbytes' kernel",
    "nf4-standard": "NF4, bitsandbytes, decoded",
}


def kernels(results: Results) -> str:
    """One row beside bitsandbytes and plain reading; more rows beside dense weights."""
    if "cpu" not in results:
        return ABSENT
    result = results["cpu"]
    one, many = [], []
    for row in result["rows"]:
        named = SIDES.get(row["name"]) or (f"{SIDES[row['name'].partition('-')[0]]}, {row['bits']} bits" if _is_ours(row["name"]) else "")
        if not named:
            continue
        if row["tokens"] == 1:
            pace = f"{1e3 * row['seconds']:.2f} ms"
            one.append([named, row["dtype"], pace, times(row["times nf4-packed"]), times(row.get(f"times read-{row['bits']}"))])
        elif row["bits"] == 4 and row["tokens"] in (16, 256):
            many.append([named, row["dtype"], str(row["tokens"]), times(row["times dense"])])
    kept = result["kept"]
    bars = f"At most {result['settings']['bars']['nf4-packed']} times NF4's kernel: {yes(kept['nf4-packed'])}. At most "
    bars += f"{result['settings']['bars']['read-4']} times the reading: {yes(kept['read-4'])}."
    parts = [
        "A 4096 × 4096 matrix on one thread, another copy at each call, so that none sits in a cache. *Reading* is the time in which the "
        "same bytes are summed. Medians of ratios within a round.",
        table("one row|input|time:|over NF4's kernel:|over reading:", one),
        bars,
        table("more rows, 4 bits|input|rows:|over dense bfloat16:", many),
        told(result["machine"], "kernels", "cpu"),
    ]
    return "\n\n".join(parts)


def _is_ours(name: str) -> bool:
    return name.partition("-")[0] in ("table", "affine")
