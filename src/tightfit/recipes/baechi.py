"""baechi: place a model's step on memory-limited devices with the paper's three algorithms, beside one device and our own search (Baechi).

*Made of*: a step of the model, recorded on paper with what each operator takes; m-TOPO, m-ETF and m-SCT on the graph that the paper's
three steps make smaller (forward only, single readers co-placed, groups fused); and `tightfit place` on the whole graph beside them.
*Data*: none; the model's shape is enough.
*What to expect*: `seconds_m_topo`, `seconds_m_etf`, `seconds_m_sct` and `seconds` (ours) of one simulated step in the report, -1 where one
found nothing that fits, and how far ours is from the best possible at most (`gap`). The paper places 654 to 206,000 times as fast as
learning-based placers (abstract); where memory suffices its heuristics keep nearly all on one device, as its logs show too.
*What differs here*: times are worked out from this machine's rates, not profiled. m-SCT's linear program is solved by HiGHS in place of
MOSEK, and its rounding gives each operator at most one favourite child and one favourite parent. Co-placed groups stop growing at a 32nd of
a device's memory or of the work, since a chain of single readers would be one. Memory is exact over time. A tensor that two operators of a
device read is sent once.
*Paper*: Jeon et al. 2020, Baechi: Fast Device Placement of Machine Learning Graphs (SoCC), sections 3 and 4; extended 2023
(arXiv 2301.08695).
"""

from dataclasses import replace
from typing import Literal

from tightfit.recipes import SILENT, Told
from tightfit.terms.placement import PlaceReport


def run(
    model: str,  # a folder, a preset, or a Hugging Face id
    output: str,  # the JSON file that takes the report with the placement
    *,
    devices: str = "4x6.44GiB",  # as the paper's four GPUs of 8 GB, of which so much was free
    link: str = "5.7GB/s",  # between any two, as its TensorFlow version measured
    latency: float = 0.000134,  # seconds of each transfer beside its bytes, as there
    serial: bool = False,  # a device sends or receives one tensor at a time, as its TensorFlow version; the other is PyTorch's
    training: bool = True,  # with backward and optimizer; or one pass
    batch: int = 32,  # sequences at once; the paper's: 32 to 128 samples
    context: int = 128,  # tokens of each
    grain: Literal["module", "block", "operator"] = "module",  # what one operator is: a leaf module, as its PyTorch version, or finer
    seconds: float = 10.0,  # how long our own search looks for something better
    told: Told = SILENT,
) -> PlaceReport:
    """Place one step of `model`, and hold the paper's algorithms against each other, one device and our own search."""
    from tightfit.talk import write
    from tightfit.verbs.placing import Step, place, place_as_in_paper, read_cluster, recorded

    cluster = read_cluster(devices, None, [link], latency, serial)
    source = recorded(model, Step(batch, context, training, grain))
    scores: dict[str, float] = {"operators": len(source.graph.operators)}
    for name in ("m-TOPO", "m-ETF", "m-SCT"):
        found = place_as_in_paper(source, cluster, name)
        key = name.replace("-", "_").lower()
        scores |= {"operators_fused": found.operators, f"seconds_{key}": found.seconds, f"place_seconds_{key}": found.place_seconds}
        what = f"a step of {found.seconds:.4f} s" if found.seconds >= 0 else "nothing that fits"
        told.finding(f"{name}: {what}, in {found.place_seconds:.2f} s over {found.operators} fused operators")
    report = place(source, cluster, "makespan", seconds)
    report = replace(report, scores={**scores, "seconds": report.placed.seconds, "gap": report.placed.gap})
    write(output, report.to_json())
    return report
