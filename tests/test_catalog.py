"""Catalog: how techniques are written on the command line, whose values may hold commas; and recipes, found by their files."""

import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from tightfit import catalog
from tightfit.contracts import Quality, Stage
from tightfit.recipes import Told
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


def test_every_file_of_the_room_is_a_recipe():
    files = {path.stem for path in Path(catalog.__file__).with_name("recipes").glob("[!_]*.py")}
    assert set(catalog.recipe_names()) == files >= {"qst", "qdylora", "leanquant"}
    assert not files & set(catalog.technique_names()), "a name explains one thing"


@pytest.mark.parametrize("name", catalog.recipe_names())
def test_a_recipe_is_explained_without_importing_it(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"tightfit.recipes.{name}", raising=False)
    explained, told = catalog.explain(name), catalog.summary(name)
    assert f"tightfit.recipes.{name}" not in sys.modules
    assert explained["text"].startswith(f"{name}: {told}")
    places = [explained["text"].find(f"*{heading}*") for heading in ("Made of", "Data", "What to expect", "What differs here", "Paper")]
    assert -1 not in places and places == sorted(places)
    parameters = inspect.signature(catalog.recipe(name), eval_str=True).parameters
    assert parameters["told"].annotation is Told
    assert [setting["name"] for setting in explained["settings"]] == [parameter for parameter in parameters if parameter != "told"]
    assert all(setting["price"] for setting in explained["settings"])
    for setting in explained["settings"]:
        default = parameters[setting["name"]].default
        must = default is inspect.Parameter.empty
        assert must == (setting["default"] == "(must be given)") and (must or eval(setting["default"]) == default)


def test_an_unknown_recipe_is_told_with_near_names():
    with pytest.raises(TightfitError, match=r"^no recipe is called `qdilora`$") as caught:
        catalog.recipe("qdilora")
    assert caught.value.hint == "did you mean `qdylora`?"
    with pytest.raises(TightfitError, match=r"^no technique or recipe is called `qdilora`$") as caught:
        catalog.explain("qdilora")
    assert "`qdylora`" in caught.value.hint
