"""Catalog: how techniques are written on the command line, whose values may hold commas."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from tightfit import catalog
from tightfit.contracts import Quality, Stage
from tightfit.terms.errors import TightfitError


@dataclass(frozen=True)
class Lora:
    """Settings of every type that the command line can write."""

    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "exact"
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    rank: int = 8
    scale: float = 1.0
    bias: bool = False
    kind: Literal["plain", "gated"] = "plain"
    where: str = ""


@pytest.fixture(autouse=True)
def lora(monkeypatch):
    real = catalog.technique
    monkeypatch.setattr(catalog, "technique", lambda name: Lora if name == "lora" else real(name))


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("lora", {}),
        ("lora:", {}),
        ("lora:rank=4", {"rank": 4}),
        ("lora:rank=4,", {"rank": 4}),
        ("lora: rank = 4 , bias = TRUE", {"rank": 4, "bias": True}),
        ("lora:targets=q_proj,v_proj,rank=8", {"targets": ("q_proj", "v_proj"), "rank": 8}),
        ("lora:rank=8,targets=q_proj, v_proj", {"rank": 8, "targets": ("q_proj", "v_proj")}),
        ("lora:targets=q_proj", {"targets": ("q_proj",)}),
        ("lora:layers=0,1,17", {"layers": (0, 1, 17)}),
        ("lora:layers=3,shares=0.5,1,kind=gated", {"layers": (3,), "shares": (0.5, 1.0), "kind": "gated"}),
        ("lora:scale=2,bias=false", {"scale": 2.0, "bias": False}),
        (r"lora:where=layers\.(\d{1,2})\.mlp", {"where": r"layers\.(\d{1,2})\.mlp"}),
        ("lora:where=a,b,rank=2", {"where": "a,b", "rank": 2}),
        ("lora:where=(?=q),rank=2", {"where": "(?=q)", "rank": 2}),
        ("offload:streamed=0,1", {"streamed": (0, 1)}),
        ("offload:slots=3,streamed=2", {"slots": 3, "streamed": (2,)}),
        ("int8:where=q_proj,v_proj", {"where": "q_proj,v_proj"}),
    ],
)
def test_what_is_written_is_what_is_set(text, settings):
    assert catalog.parse(text) == (text.partition(":")[0], settings)
    assert all(type(found) is type(settings[name]) for name, found in catalog.parse(text)[1].items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora:q_proj", "`q_proj` is not a setting"),
        ("lora:q_proj,rank=4", "`q_proj` is not a setting"),
        ("lora:,4,rank=4", "`4` is not a setting"),
        ("lora:rank=4,5", "`lora:rank` is a number, not `4,5`"),
        ("lora:rank=four", "`lora:rank` is a number, not `four`"),
        ("lora:layers=0,one", "`lora:layers` is a number, not `one`"),
        ("lora:layers=", "`lora:layers` is a number, not ``"),
        ("lora:bias=true,false", "`lora:bias` is true or false, not `true,false`"),
        ("lora:kind=plain,gated", "`lora:kind` cannot be `plain,gated`"),
        ("lora:ranks=4", "`lora` has no setting `ranks`"),
        ("lora:rank=4,ranks=4", "`lora` has no setting `ranks`"),
        ("lora:where=a{2,1}", "`lora:where=a{2,1}` is not a regular expression"),
    ],
)
def test_what_is_no_setting_is_one_clear_line(text, message):
    with pytest.raises(TightfitError, match=f"^{re.escape(message)}"):
        catalog.parse(text)
