"""placement: how far from the best are the placements, what do simpler ways give, and how long does finding them take?

python bench/placement/run.py makespan|throughput|speed|measured [--only TEXT] [--missing] [--fresh] [--results FOLDER] [--dry]

Graphs are those of models (networks.py), and of files in the folder `graphs` of `TIGHTFIT_DATA`, or of ../shared/data. Rows are `GRAPH
DEVICES MEMORY` (`gnmt_inference/LayerGraphs 4 barely`), `HEURISTIC OPERATORS` for `speed`, `MODEL/training` for `measured`. What is in
results/PART.json already is not run again; `--missing` says what is still to run. Seconds are the graphs' own, except those of finding
and of `measured`.
"""

import argparse
import json
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from layered import speed_row
from perform import measured_row
from record import machine_facts, read_result, say, write_result
from rows import Case, least_bytes, makespan_row, throughput_row
from sources import Source, sources

from tightfit.terms.cluster import Cluster, Device, Link

HERE = Path(__file__).resolve().parent
Settings = dict[str, Any]
Row = dict[str, Any]


def cluster(settings: Settings, devices: int, memory_bytes: int) -> Cluster:
    """Devices that are alike."""
    link = Link(settings["pipedream_link"], settings["pipedream_latency"])
    return Cluster(tuple(Device(f"device {number}", memory_bytes) for number in range(devices)), link)


def cases(settings: Settings, source: Source) -> Iterator[tuple[str, Callable[[], list[Case]]]]:
    """By name, the clusters to try until one holds the graph: as the file says, and so many devices of loose to scarce memory."""

    def tries(devices: int, memory: str) -> list[Case]:
        need, loose = least_bytes(source.graph, devices), least_bytes(source.graph, 1)
        sizes = {
            "loose": [loose],
            "middle": [int((need * max(loose, need)) ** 0.5)],
            "barely": [int(need * by) for by in settings["barely"]],
        }
        return [Case(source, cluster(settings, devices, size), size / need) for size in sizes[memory]]

    if source.devices and source.memory_bytes:
        given = Case(source, cluster(settings, source.devices, source.memory_bytes), 0.0)
        yield f"{source.name} {source.devices} own", lambda: [given]
    for devices in settings["devices"]:
        for memory in ("loose", "middle", "barely"):
            yield f"{source.name} {devices} {memory}", partial(tries, devices, memory)


def jobs_of(part: str, settings: Settings) -> Iterator[tuple[str, Callable[[], Row]]]:
    """All rows of a part, by name."""
    if part == "speed":
        for heuristic in settings["speed"]["heuristics"]:
            for operators in settings["speed"]["operators"]:
                if heuristic != "m_sct" or operators <= settings["speed"]["sct_operators"]:
                    yield (
                        f"{heuristic} {operators}",
                        lambda heuristic=heuristic, operators=operators: speed_row(settings, heuristic, operators),
                    )
        return
    if part == "measured":
        for model in settings["measured"]["models"]:
            for training in (False, True):
                yield f"{model}/{'training' if training else 'inference'}", partial(measured_row, settings["measured"], model, training)
        return
    measure = makespan_row if part == "makespan" else throughput_row
    for source in sources(part, settings):
        for name, tries in cases(settings, source):
            yield name, lambda tries=tries: first_row(measure, settings, tries())


def first_row(measure: Callable[[Settings, Case], Row], settings: Settings, tries: list[Case]) -> Row:
    """The row of the first case for which a placement is found; else what was said for the last."""
    row: Row = {}
    for case in tries:
        began = time.perf_counter()
        row = measure(settings, case)
        row |= {"memory_factor": case.memory_factor, "row_seconds": time.perf_counter() - began}
        if "fault" not in row:
            break
    return row


def told(row: Row) -> str:
    """What a person wants to see while it runs."""
    if "fault" in row:
        return row["fault"]
    if "ways" in row:
        return ", ".join(
            f"{way} {one['measured_seconds'] * 1e3:.1f} ms, simulated × {one['ratio']:.2f}" for way, one in row["ways"].items()
        )
    if "operators_per_second" in row:
        return f"{row['seconds']:.2f} s"
    over = f", {row['over_exact']:.3f} of the exact" if row.get("over_exact") else ""
    return f"{row['seconds'] * 1e3:.2f} ms, gap {row['gap']:.1%} to {row['bound_by']}{over}, by {row['by']} in {row['place_seconds']:.1f} s"


def run(part: str, settings: Settings, args: argparse.Namespace) -> dict[str, Row]:
    """The rows that are asked for and not there yet, each written as soon as it is done."""
    file = args.results / f"{part}.json"
    before = {} if args.fresh or args.dry else read_result(file)
    facts = before.get("machine") or machine_facts(settings["threads"])
    rows = dict(before.get("rows", {}))
    for name, measure in jobs_of(part, settings):
        if name in rows or args.only not in name:
            continue
        rows[name] = measure()
        say(f"{name}: {told(rows[name])}")
        if not args.dry:
            write_result(file, {"question": "placement", "part": part, "machine": facts, "settings": settings, "rows": rows})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["makespan", "throughput", "speed", "measured"])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--missing", action="store_true", help="say what is still to run")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--dry", action="store_true", help="a few small rows in seconds, and nothing is kept")
    args = parser.parse_args()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    small = settings.pop("dry")
    if args.dry:
        for part in ("speed", "measured"):
            settings[part] |= small.pop(part)
        settings |= small
    if args.missing:
        done = read_result(args.results / f"{args.part}.json").get("rows", {})
        print("\n".join(name for name, _ in jobs_of(args.part, settings) if name not in done and args.only in name))
        return
    rows = run(args.part, settings, args)
    print(json.dumps({"part": args.part, "rows": len(rows), "faults": sum("fault" in row for row in rows.values())}))


if __name__ == "__main__":
    main()
