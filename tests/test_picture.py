"""Pictures of schedules: what a name may hold, what is refused, and that no half file is left."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from tightfit.data.graphs import GraphFile
from tightfit.picture import draw_schedule, refuse_picture
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.placement import PlaceReport
from tightfit.verbs.placing import place, read_cluster

pytest.importorskip("matplotlib")


def report_of(name: str, seconds: float = 1.0, objective: str = "makespan") -> PlaceReport:
    """Two operators that fit on no device together, and the tensor between them."""
    graph = Graph(name, (Operator("a", seconds, 60, output_bytes=20), Operator("b", 3 * seconds, 60)), ((0, 1),))
    return place(GraphFile(graph, ("a", "b")), read_cluster("2x100B", links=["20B/s"]), objective, 0)


def drawn(report: PlaceReport, file: Path) -> str:
    """The picture's text: its letters are paths, and each string stands before them as a comment."""
    draw_schedule(report, str(file))
    return file.read_text()


def test_a_dollar_is_a_dollar(tmp_path: Path) -> None:
    report = report_of("cost $x_1{$ and $\\frac$")
    devices = tuple(replace(device, name=f"${device.name}^") for device in report.cluster.devices)
    told = drawn(replace(report, cluster=replace(report.cluster, devices=devices)), tmp_path / "p.svg")
    assert "<!-- cost $x_1{$ and $\\frac$: 2 operators" in told and "<!-- $device 0^ -->" in told


@pytest.mark.parametrize(("objective", "title"), [("makespan", "a step in 5.00 s"), ("throughput", "a sample every 4.00 s")])
def test_the_title_tells_what_was_asked_for(tmp_path: Path, objective: str, title: str) -> None:
    assert title in drawn(report_of("g", objective=objective), tmp_path / "p.svg")  # 1 + 1 + 3; the larger of 1 + 1 and 1 + 3


def test_bars_stand_where_the_schedule_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 to 1 runs `a`, 1 to 2 its output travels, 2 to 5 runs `b` on the other device, which holds 60 and then 80 bytes."""
    from matplotlib.axes import Axes

    bars, fills = [], []
    monkeypatch.setattr(
        Axes, "broken_barh", lambda _, spans, height, facecolors, **__: bars.extend((*s, *height, facecolors) for s in spans)
    )
    monkeypatch.setattr(Axes, "fill_between", lambda _, times, floor, tops, **__: fills.append((list(times), floor, tops)))
    told = drawn(report_of("g"), tmp_path / "p.svg")
    forward, moved = "#4c72b0", "#dd8452"
    assert sorted(bars) == [(0.0, 1.0, -0.38, 0.5, forward), (1.0, 1.0, 1.16, 0.16, moved), (2.0, 3.0, 0.62, 0.5, forward)]
    assert all(f"<!-- {word} -->" in told for word in ("forward", "receives", "device 0", "device 1", "seconds", "80 B of 100 B"))
    (times, floor, tops) = fills[1]
    held = {time: (floor - top) / 0.8 * 100 for time, top in zip(times, tops, strict=True)}
    assert held[1.0] == pytest.approx(80) and max(held.values()) == pytest.approx(80)


def test_a_step_without_time_is_drawn_without_a_word(tmp_path: Path) -> None:
    graph = Graph("still", (Operator("a", 0.0, 1),), ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(place(GraphFile(graph, ("a",)), read_cluster("1x100B"), "makespan", 0), tmp_path / "p.svg")


def test_the_same_answer_makes_the_same_file(tmp_path: Path) -> None:
    report = report_of("g")
    still = replace(report, placed=replace(report.placed, place_seconds=1.0))
    assert drawn(still, tmp_path / "a.svg") == drawn(still, tmp_path / "b.SVG")


def test_kinds_are_told_by_the_end_of_the_name(tmp_path: Path) -> None:
    for name, magic in (("p.PNG", b"\x89PNG"), ("p.pdf", b"%PDF"), ("p.Svg", b"<?xml")):
        draw_schedule(report_of("g"), str(tmp_path / name))
        assert (tmp_path / name).read_bytes().startswith(magic)
    for name in ("p.doc", "p", "svg"):
        with pytest.raises(TightfitError, match="is no picture"):
            refuse_picture(name)


def test_no_half_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full(_: Figure, file: str, **__: object) -> None:
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "p.svg").write_text("an older one")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(TightfitError, match=r"cannot write `.*p\.svg`: No space left"):
        draw_schedule(report_of("g"), str(tmp_path / "p.svg"))
    assert [file.name for file in tmp_path.iterdir()] == ["p.svg"]
    assert (tmp_path / "p.svg").read_text() == "an older one"
