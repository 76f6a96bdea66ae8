"""The command line: what each verb prints, its JSON, and plans and reports that are saved and taken up again."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from tightfit import catalog, verbs
from tightfit.presets import presets
from tightfit.recipes import SILENT, Told
from tightfit.terms.errors import TightfitError
from tightfit.terms.footprint import KINDS
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.report import Report
from tightfit.terms.units import GIB, MIB
from tightfit.terms.workload import Workload

HEADINGS = ["*What shrinks*", "*What it costs*", "*How it works*", "*Shapes*", "*Relations*", "*Paper*"]
RUN = ["run", "tightfit-demo", "--prompt", "The sea was calm", "--max-new-tokens", 4, "--ram", "64GiB"]


def test_list_names_every_technique_and_preset(tightfit_says):
    said = tightfit_says("list", "--json")
    values = json.loads(said.out)
    assert (said.code, said.err) == (0, "")
    assert list(values["techniques"]) == catalog.technique_names()
    assert all(len(summary) > 20 for summary in values["techniques"].values())
    assert list(values["recipes"]) == catalog.recipe_names()
    assert all(len(summary) > 20 for summary in values["recipes"].values())
    assert values["presets"] == list(presets())
    shown = tightfit_says("list").out
    assert all(name in shown for name in [*values["techniques"], *values["presets"]])
    assert all(f"recipe {name}" in shown for name in values["recipes"])


@pytest.mark.parametrize("name", catalog.technique_names())
def test_explain_has_every_heading_and_every_setting_with_its_price(name, tightfit_says):
    values = json.loads(tightfit_says("explain", name, "--json").out)
    assert values["text"].startswith(f"{name}: ")
    places = [values["text"].find(heading) for heading in HEADINGS]
    assert -1 not in places and places == sorted(places)
    names = [field.name for field in fields(catalog.technique(name))]
    assert [setting["name"] for setting in values["settings"]] == names
    assert all(setting["price"] for setting in values["settings"])
    shown = tightfit_says("explain", name).out
    assert values["text"].splitlines()[0] in shown
    assert all(f"{name} = " in shown for name in names)


@pytest.mark.parametrize("name", catalog.recipe_names())
def test_a_recipe_is_explained_with_its_settings(name, tightfit_says):
    values = json.loads(tightfit_says("explain", name, "--json").out)
    assert set(values) == {"name", "text", "settings"} and values["text"].startswith(f"{name}: ")
    shown = tightfit_says("explain", name).out
    assert all(f"{setting['name']} = {setting['default']}" in shown for setting in values["settings"])


def test_plan_json_tells_all(tightfit_says):
    said = tightfit_says("plan", "llama-2-7b", "--gpu", "6GiB", "--ram", "32GiB", "--disk", "100GiB", "--context", 256, "--json")
    values = json.loads(said.out)
    assert said.code == 0
    assert (values["model"], values["quality"]) == ("llama-2-7b", "exact")
    assert values["budget"] == {"gpu": 6 * GIB, "ram": 32 * GIB, "disk": 100 * GIB, "gpus": 1}
    assert values["workload"] == {
        "task": "generate",
        "batch": 1,
        "tokens": 256,
        "new_tokens": 128,
        "optimizer": "adamw",
        "micro_batch": 0,
        "precision": "no",
        "target_tokens": 0,
    }
    assert values["techniques"]["offload"]["streamed"] == [place for place, home in enumerate(values["residency"]) if home != "gpu"]
    assert (len(values["residency"]), sum(values["resting"].values())) == (32, 32)
    assert values["predicted_bytes"] == {tier: sum(parts.values()) for tier, parts in values["predicted"].items()}
    assert all(set(parts) <= set(KINDS) for parts in [*values["predicted"].values(), *values["phases"].values()])
    assert all(values["predicted_bytes"][tier] <= values["budget"][tier] for tier in values["predicted_bytes"])
    assert set(values["seconds"]) >= {"load", "prefill", "token", "stream"}
    assert values["reasons"] and {"techniques", "reason"} == set(values["turned_down"][0])
    assert values["streamed_bytes"] > 0
    assert json.loads(json.dumps(Plan.from_json(values).to_json())) == values


@pytest.mark.parametrize("task", ["tune", "embed"])
def test_plan_of_other_tasks(task, tightfit_says, saved):
    values = json.loads(tightfit_says("plan", saved("bert"), "--task", task, "--batch", 2, "--context", 64, "--ram", "16GiB", "--json").out)
    assert values["workload"]["task"] == task
    assert values["seconds"]["step"] > 0
    assert ("optimizer" in values["predicted"]["ram"]) == (task == "tune")


def test_plan_shows_a_map_and_the_pace(tightfit_says):
    said = tightfit_says("plan", "tightfit-demo", "--ram", "8GB", "--quality", "near", "--max-new-tokens", 16)
    assert said.code == 0
    assert re.search(r"^tightfit-demo: read 512 tokens, write 16$", said.out, re.MULTILINE)
    for word in ("techniques", "blocks", "12 on", "ram", "of 7.45 GiB", "pace", "a token", "because", "not taken", "tightfit probe"):
        assert word in said.out


def test_run_json_adds_what_was_measured(tightfit_says):
    said = tightfit_says(*RUN, "--json")
    values = json.loads(said.out)
    assert said.code == 0
    assert values["plan"]["model"] == "tightfit-demo"
    assert 1 <= values["tokens"] <= 4 and isinstance(values["text"], str)
    assert values["measured_peak_bytes"] == sum(values["measured"].values())
    assert values["predicted_peak_bytes"] == Plan.from_json(values["plan"]).tensor_bytes()
    assert values["deviation"] == values["measured_peak_bytes"] / values["predicted_peak_bytes"] - 1
    assert abs(values["deviation"]) < 0.05 and values["warnings"] == []
    assert values["process"]["run_peak"] >= values["process"]["anonymous"] > values["measured"]["weights"]
    assert set(values["seconds"]) == {"load", "first_token", "per_token", "whole", "waited"}


def test_a_plan_is_repeated_and_its_report_is_shown_again(tightfit_says, tmp_path):
    """plan --save, run --plan twice with --save-report, report: the same plan and, since it is greedy, the same text."""
    plan, saved = tmp_path / "plan.json", tmp_path / "report.json"
    words = [
        "plan",
        "tightfit-demo",
        "--ram",
        "64GiB",
        "--context",
        16,
        "--max-new-tokens",
        4,
        "--technique",
        "int8:where=mlp",
        "--save",
        plan,
    ]
    assert tightfit_says(*words).code == 0
    assert Plan.load(plan).techniques == {"int8": {"where": "mlp"}}
    repeat = ["run", "--plan", plan, "--prompt", "The sea was calm"]
    first = tightfit_says(*repeat, "--save-report", saved)
    again = json.loads(tightfit_says(*repeat, "--json").out)
    assert first.code == 0
    report = Report.from_json(json.loads(saved.read_text()))
    assert report.plan == Plan.load(plan) == Plan.from_json(again["plan"])
    assert first.out.strip() == f"The sea was calm{report.text}".strip(), "stdout is data"
    assert "planned" in first.err and "kept its word" in first.err, "stderr is talk"
    assert (again["text"], again["tokens"], again["measured"]) == (report.text, report.tokens, report.measured)
    shown = tightfit_says("report", saved)
    assert shown.code == 0
    assert all(word in shown.out for word in ("planned", "measured", "weights", "process", "first token after"))
    assert json.loads(tightfit_says("report", saved, "--json").out) == json.loads(saved.read_text())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", "report.json"]


def test_a_streamed_run_by_a_machine_that_was_probed(tightfit_says, monkeypatch, tmp_path):
    """A machine whose overhead is so high that this process stays below it: what is left of the budget makes the model stream."""
    monkeypatch.setenv("TIGHTFIT_HOME", str(tmp_path))
    Machine(probed=True, overhead_ram=16 * GIB, allocator_slack=0.0).save()
    resident = json.loads(tightfit_says(*RUN, "--json").out)
    values = json.loads(tightfit_says(*RUN[:-2], "--ram", 16 * GIB + 11 * MIB, "--json").out)
    assert "offload" in values["plan"]["techniques"] and values["plan"]["notes"] == []
    assert values["moved_bytes"] >= values["plan"]["streamed_bytes"] > 0
    assert values["text"] == resident["text"]
    assert values["measured_peak_bytes"] < 11 * MIB < resident["measured_peak_bytes"]
    assert abs(values["deviation"]) < 0.05


def test_eval_of_a_small_text(tightfit_says, tmp_path):
    """Perplexity by hand: one window, every token but the first."""
    import torch

    from tightfit.describe.source import describe
    from tightfit.runtime.build import build
    from tightfit.runtime.tokens import encode

    text = "It was a bright day, and the old man sat by the sea."
    (tmp_path / "text").write_text(text)
    values = json.loads(tightfit_says("eval", "tightfit-demo", tmp_path / "text", "--context", 64, "--ram", "64GiB", "--json").out)
    skeleton = describe("tightfit-demo")
    ids = encode(skeleton, text).input_ids
    with build(Plan.all_resident("tightfit-demo", Workload(), 12, {}), skeleton) as held, torch.no_grad():
        logits = held.model(input_ids=ids[:, :-1]).logits[0].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    assert values["tokens"] == ids.shape[1] - 1
    assert values["perplexity"] == pytest.approx(2.718281828 ** (loss / values["tokens"]), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(loss / 0.69314718 / len(text), rel=1e-4)
    shown = tightfit_says("eval", "tightfit-demo", tmp_path / "text", "--context", 8, "--ram", "64GiB")
    assert shown.code == 0
    assert re.search(r"perplexity \d+\.\d+   bits per byte \d\.\d+   over \d+ tokens", shown.out)


def test_a_saved_plan_is_not_changed_by_options(tightfit_says, tmp_path):
    plan = tmp_path / "plan.json"
    assert tightfit_says("plan", "tightfit-demo", "--ram", "4GiB", "--save", plan).code == 0
    said = tightfit_says("run", "--plan", plan, "--ram", "2GiB", "--technique", "int8")
    assert said.code == 1
    assert "`--ram`, `--technique` would change the plan" in said.err and "hint: " in said.err


def test_bare_tightfit_shows_its_help(tightfit_says):
    said = tightfit_says()
    assert said.code == 2 and "Usage: " in said.out + said.err and "error:" not in said.err


def test_bench_hands_options_on(tightfit_says, tmp_path, monkeypatch):
    """A benchmark prints one JSON object; without `--json` it is not shown."""
    (tmp_path / "bench" / "toy").mkdir(parents=True)
    (tmp_path / "bench" / "toy" / "run.py").write_text("import json, sys\nprint(json.dumps({'given': sys.argv[1:]}))\n")
    monkeypatch.chdir(tmp_path)
    assert json.loads(tightfit_says("bench", "toy", "--part", "a", "--json").out) == {"given": ["--part", "a"]}
    assert tightfit_says("bench", "toy", "--part", "a").out == "results are in bench/toy/results\n"
    assert "did you mean `toy`" in tightfit_says("bench", "to").err


def test_an_interrupt_is_told_in_one_line(tightfit_says, monkeypatch):
    def interrupted(*_words, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "plan", interrupted)
    said = tightfit_says("plan", "llama-2-7b", "--ram", "8GiB")
    assert (said.code, said.out) == (130, "")
    assert said.err.strip() == "interrupted; nothing was left behind"


def test_a_fault_of_our_own_is_told_as_one(tightfit_says, monkeypatch):
    def broken(*_words, **_more):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(verbs, "plan", broken)
    monkeypatch.delenv("TIGHTFIT_TRACEBACK", raising=False)
    said = tightfit_says("plan", "llama-2-7b", "--ram", "8GiB")
    assert said.code == 70
    assert "error: unexpected RuntimeError: two\n" in said.err and "hint:" in said.err and "Traceback" not in said.err
    monkeypatch.setenv("TIGHTFIT_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        tightfit_says("plan", "llama-2-7b", "--ram", "8GiB")


@pytest.mark.parametrize("verb", ["plan", "run", "eval", "probe", "report", "list", "explain", "recipe", "bench", "demo"])
def test_every_verb_has_help(verb, tightfit_says):
    said = tightfit_says(verb, "--help")
    assert said.code == 0
    assert "Usage: " in said.out and verb in said.out


def test_square_brackets_are_shown_as_they_are(tightfit_says):
    """rich would take `[red]` for markup, and `[/]` for an error in it."""
    assert "`[red]x[/]`" in tightfit_says("plan", "[red]x[/]").err


@pytest.fixture
def called(monkeypatch):
    """What a recipe is called with: a function with the parameters of `qst` that notes them, and does nothing."""
    seen = {}
    run = catalog.recipe("qst")

    def noting(**settings):
        seen.update(settings)
        raise TightfitError("that was all")

    noting.__signature__ = inspect.signature(run, eval_str=True)
    noting.__doc__ = run.__doc__
    monkeypatch.setattr("tightfit.cli.recipe.recipe", lambda name: noting)
    return seen


def test_options_of_a_recipe_are_its_settings(tightfit_says, called):
    words = ["MODEL", "DATA", "-o", "OUT", "--eval", "HELD", "--lr", "1e-3", "--downsample", "max_pool", "--ram", "2GiB", "--resume"]
    said = tightfit_says("recipe", "qst", *words)
    assert (said.code, said.err) == (1, "error: that was all\n")
    defaults = {name: item.default for name, item in inspect.signature(catalog.recipe("qst")).parameters.items() if name != "told"}
    told = called.pop("told")
    assert isinstance(told, Told) and told is not SILENT
    given = {"model": "MODEL", "data": "DATA", "output": "OUT", "held_out": "HELD", "learning_rate": 1e-3}
    assert called == {**defaults, **given, "downsample": "max_pool", "ram": "2GiB", "resume": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qts"], "error: no recipe is called `qts`\n\nhint: did you mean `qst`?"),
        (["qst", "MODEL", "DATA"], "error: Missing option '--output' / '-o'."),
        (["qst", "MODEL", "DATA", "-o", "OUT", "--batch", "0"], "error: Invalid value for '--batch'"),
        (["qst", "MODEL", "DATA", "-o", "OUT", "--downsample", "sum"], "error: Invalid value for '--downsample'"),
        (["qst", "MODEL", "DATA", "-o", "OUT", "--rnak", "4"], "error: No such option: --rnak"),
        (["qst", "MODEL", "DATA", "-o", "OUT"], "error: no model is called `MODEL`"),
        (["qst", "tightfit-demo", "DATA", "-o", "OUT"], "error: there is no "),
    ],
)
def test_what_a_recipe_cannot_do_is_one_line(words, message, tightfit_says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = tightfit_says("recipe", *words)
    assert said.code in (1, 2) and said.out == "" and said.err.startswith(message) and "Traceback" not in said.err
    assert not list(tmp_path.iterdir())


def test_help_of_a_recipe_has_every_setting(tightfit_says):
    said = tightfit_says("recipe", "qdylora", "--help")
    names = {"held_out": "eval", "learning_rate": "lr"}
    settings = [setting["name"] for setting in catalog.explain("qdylora")["settings"] if setting["name"] not in ("model", "data")]
    assert said.code == 0 and "told" not in said.out
    assert all(f"--{names.get(name, name).replace('_', '-')}" in said.out for name in settings)


def test_an_interrupted_recipe_says_how_it_goes_on(tightfit_says, called, monkeypatch):
    def interrupted(**_settings):
        raise KeyboardInterrupt

    interrupted.__signature__ = inspect.signature(catalog.recipe("qst"), eval_str=True)
    monkeypatch.setattr("tightfit.cli.recipe.recipe", lambda name: interrupted)
    said = tightfit_says("recipe", "qst", "MODEL", "DATA", "-o", "OUT")
    assert said.code == 130 and "`--resume` goes on from what was saved for OUT" in said.err


def test_a_recipe_on_a_small_text(tightfit_says, tmp_path):
    (tmp_path / "text").write_text("It was a bright day, and the old man sat by the sea. " * 20)
    words = ["recipe", "qst", "tightfit-demo", tmp_path / "text", "--steps", 1, "--context", 32, "--ram", "64GiB"]
    said = tightfit_says(*words, "-o", tmp_path / "out", "--save-report", tmp_path / "report.json")
    assert said.code == 0, said.err
    scores = json.loads((tmp_path / "report.json").read_text())["scores"]
    assert scores["steps"] == 1 and scores["qlora_peak_bytes"] > scores["side_peak_bytes"] > 0
    assert re.search(rf"^loss +{scores['loss']:.4f}$", said.out, re.MULTILINE)
    assert re.search(r"^qlora peak bytes +[\d.]+ MiB$", said.out, re.MULTILINE)
    assert all(word in said.err for word in ("one step over", "step 1 of 1", "times as much", "kept its word", "saved in"))


def test_the_report_of_a_recipe_as_json(tightfit_says, tmp_path, monkeypatch):
    """Of a run that was made: what a recipe gives back is what is printed, and nothing else is."""
    plan = Plan.all_resident("tightfit-demo", Workload("tune"), 12, {})
    seconds = {"load": 1.0, "first_step": 1.0, "step": 1.0}
    made = Report(plan, {"weights": 1}, {"load_peak": 1, "run_peak": 1}, seconds, scores={"loss": 0.5, "some_bytes": 2048.0, "steps": 3.0})

    def giving(**_settings):
        return made

    giving.__signature__ = inspect.signature(catalog.recipe("qst"), eval_str=True)
    monkeypatch.setattr("tightfit.cli.recipe.recipe", lambda name: giving)
    words = ["recipe", "qst", "MODEL", "DATA", "-o", "OUT"]
    said = tightfit_says(*words, "--json")
    assert (said.code, said.err) == (0, "") and Report.from_json(json.loads(said.out)) == made
    assert [line.split() for line in tightfit_says(*words).out.splitlines()] == [
        ["loss", "0.5000"],
        ["some", "bytes", "2.0", "KiB"],
        ["steps", "3"],
    ]


def test_naming_recipes_loads_nothing_heavy():
    program = "import sys\nfrom tightfit.cli import main\nmain()\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program, "recipe", "--help"], capture_output=True, text=True)
    modules = set(done.stderr.split())
    assert "qdylora" in done.stdout and "tightfit.recipes.qdylora" in modules
    assert not modules & {"torch", "transformers", "numpy"}
