"""dylora: every rank is a plain LoRA of that rank, what a step leaves out stays untouched, and the files are PEFT's."""

import copy
import json
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
from families import ids, make
from safetensors.torch import save_file

import tightfit
from tightfit import catalog, steps
from tightfit.contracts import Initialises, Learns, Policy, Transform
from tightfit.describe.skeleton import meta_copy
from tightfit.describe.source import describe
from tightfit.rehearse.allocator import allocator_peak
from tightfit.rehearse.fake import inputs_for
from tightfit.rehearse.rehearsal import measure, rehearse
from tightfit.runtime.build import build
from tightfit.techniques.dylora import DyLoRA, Rows, set_rank, truncated
from tightfit.techniques.lora import LoRA, adapted_layers
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

RANK, ALPHA = 5, 6.0
ONE_LAYER = r"layers\.0\.self_attn\.q_proj"
BASES = [[], ["int8"], ["nf4:layout=standard"]]


def batch(model):
    """Two rows, the same in every call."""
    return inputs_for(model, Workload("tune", 2, 16), lambda shape, high: torch.arange(32).view(2, 16) % min(high, 90))


def fill(model):
    """Adapters that do something: B is zero at first."""
    numbers = torch.Generator().manual_seed(0)
    for rows in model.modules():
        if isinstance(rows, Rows):
            rows.fill(torch.randn(rows.whole().shape, generator=numbers) * 0.05)
    return model


def matrices(layer):
    """A (rank, in) and B (out, rank) of a layer, as leaves of their own."""
    return [part["default"].whole().requires_grad_() for part in (layer.lora_A, layer.lora_B)]


def adapted(technique):
    """The model, always the same, with the adapters of `technique`."""
    model = make("llama")
    technique.apply(model)
    return model


def one_layer(**settings):
    """A model, its only adapted layer, and something to feed it.  # (7, in)"""
    model = make("llama")
    DyLoRA(rank=RANK, alpha=ALPHA, where=ONE_LAYER, **settings).apply(model)
    (layer,) = adapted_layers(fill(model))
    return model, layer, torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(2))


def gradients(part):
    """By rank; None where there is none."""
    return [row.grad for row in part["default"].parameters()]


@pytest.mark.parametrize("scale", ["rank", "largest"])
@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_a_rank_is_the_plain_sum_of_its_first_rows(rank, scale):
    """`base(x) + alpha / b · B[:, :b] A[:b] x` by hand, or over the largest b; gradients too. What takes no part has none at all."""
    model, layer, x = one_layer(scale=scale)
    divisor = {"rank": rank, "largest": RANK}[scale]
    a, b = matrices(layer)
    set_rank(model, rank)
    expected = x @ layer.base_layer.weight.T + ALPHA / divisor * (x @ a[:rank].T) @ b[:, :rank].T
    found = layer(x)
    torch.testing.assert_close(found, expected)
    assert layer.scaling["default"] == ALPHA / divisor
    found.square().sum().backward()
    expected.square().sum().backward()
    for part, whole in ((layer.lora_A, a.grad), (layer.lora_B, b.grad.T)):
        rows = gradients(part)
        torch.testing.assert_close(torch.stack(rows[:rank]), whole[:rank])
        assert rows[rank:] == [None] * (RANK - rank)
        assert all(row.is_contiguous() for row in rows[:rank])


def test_in_frozen_mode_only_the_last_row_learns():
    """The sum is that of the full mode, and so is the gradient of row b; below and above there is none."""
    model, layer, x = one_layer(mode="frozen")
    other, twin, _ = one_layer()
    for each in (model, other):
        set_rank(each, 3)
    assert torch.equal(layer(x), twin(x))
    layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    for part in ("lora_A", "lora_B"):
        found, full = gradients(getattr(layer, part)), gradients(getattr(twin, part))
        assert [place for place, row in enumerate(found) if row is not None] == [2]
        torch.testing.assert_close(found[2], full[2])


def masked_adamw(weight, gradient, moves, state, rate=1e-2, decay=0.1, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """AdamW (Loshchilov and Hutter, algorithm 2) by hand, on the rows that move; each counts its own steps.  # weight: (rank, n)"""
    first, second, count = state
    count[moves] += 1
    first[moves] = beta1 * first[moves] + (1 - beta1) * gradient[moves]
    second[moves] = beta2 * second[moves] + (1 - beta2) * gradient[moves] ** 2
    mean, square = first[moves] / (1 - beta1 ** count[moves]), second[moves] / (1 - beta2 ** count[moves])
    weight[moves] = weight[moves] * (1 - rate * decay) - rate * mean / (square.sqrt() + epsilon)


@pytest.mark.parametrize(("mode", "slower"), [("full", 0.0), ("frozen", 0.0), ("full", 0.5)])
def test_adamw_over_drawn_ranks(mode, slower):
    """Thirty steps of the library's optimizer against matrices whose rows are masked by hand, in 64 bits."""
    model, layer, x = one_layer(mode=mode, slower=slower, seed=3)
    target = torch.randn(7, layer.out_features, generator=torch.Generator().manual_seed(4))
    a, b = (matrix.detach().double() for matrix in matrices(layer))
    b = b.T.contiguous()  # by rank, as A
    base = x.double() @ layer.base_layer.weight.detach().double().T
    states = [(torch.zeros_like(m), torch.zeros_like(m), torch.zeros(RANK, 1, dtype=torch.double)) for m in (a, b)]
    optimizer = steps.make_optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    rates = torch.tensor([[1e-2], [1e-2 / 2**slower], [1e-2 / 3**slower], [1e-2 / 4**slower], [1e-2 / 5**slower]]).double()
    drawn = Counter()
    for step in range(30):
        model.rank_draw.begin_step(step)
        rank = model.rank_draw.nesting.rank
        drawn[rank] += 1
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        a.requires_grad_(), b.requires_grad_()
        (base + ALPHA / rank * x.double() @ a[:rank].T @ b[:rank] - target).square().mean().backward()
        learnt, a, b = (a.grad, b.grad), a.detach(), b.detach()
        moves = slice(rank - 1 if mode == "frozen" else 0, rank)
        for weight, gradient, state in zip((a, b), learnt, states, strict=True):
            masked_adamw(weight, gradient, moves, state, rates[moves], decay=0.0 if slower else 0.1)
    assert set(drawn) == set(range(1, RANK + 1))
    torch.testing.assert_close(layer.lora_A["default"].whole().double(), a, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.lora_B["default"].whole().T.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_what_a_step_leaves_out_does_not_move(kind):
    """Bit for bit, its state too, though momentum and weight decay are there."""
    model, layer, x = one_layer()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = {"adamw": torch.optim.AdamW, "sgd": lambda rows, **k: torch.optim.SGD(rows, momentum=0.9, **k)}
    optimizer = made[kind](trained, lr=0.01, weight_decay=0.1)

    def step(rank):
        set_rank(model, rank)
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(RANK), step(RANK)
    before = copy.deepcopy([(row, optimizer.state[row]) for row in trained])
    step(2)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, row, (old, state) in zip(names, trained, before, strict=True):
        takes_part = int(name.rpartition(".")[2]) < 2
        assert torch.equal(row, old) != takes_part
        same = [torch.equal(optimizer.state[row][key], value) for key, value in state.items() if isinstance(value, torch.Tensor)]
        assert same and all(same) != takes_part


def test_the_draw_knows_seed_and_step_only():
    settings = {"rank": 8, "least": 3, "where": ONE_LAYER}
    first, again, other = (adapted(DyLoRA(**settings, seed=seed)).rank_draw for seed in (1, 1, 2))

    def drawn(policy, numbers):
        ranks = []
        for step in numbers:
            policy.begin_step(step)
            ranks.append(policy.nesting.rank)
        return ranks

    ranks = drawn(first, range(10_000))
    torch.manual_seed(99)
    assert drawn(again, reversed(range(10_000))) == ranks[::-1]
    assert drawn(other, range(100)) != ranks[:100]
    assert ranks[:12] == [3, 7, 3, 5, 7, 7, 3, 3, 4, 6, 5, 8], "a run that resumes under another version must draw the same"
    counts = Counter(ranks)
    assert set(counts) == set(range(3, 9))
    assert all(abs(count - 10_000 / 6) < 4 * (10_000 * 5 / 36) ** 0.5 for count in counts.values())
    pairs = Counter(pairwise(ranks))
    assert len(pairs) == 36 and max(pairs.values()) < 2 * min(pairs.values()), "a step says nothing about the next"


def test_low_ranks_are_drawn_more_often_and_none_is_left_out():
    """The share of ranks up to b is that of u² below b / 6, the root; against the chi-squared bound of 5 degrees at 1 in 10,000."""
    policy, drawn = adapted(DyLoRA(rank=8, least=3, draw="low", where=ONE_LAYER)).rank_draw, Counter()
    for step in range(10_000):
        policy.begin_step(step)
        drawn[policy.nesting.rank] += 1
    expected = {rank: 10_000 * (((rank - 2) / 6) ** 0.5 - ((rank - 3) / 6) ** 0.5) for rank in range(3, 9)}
    assert set(drawn) == set(expected)
    assert sum((drawn[rank] - count) ** 2 / count for rank, count in expected.items()) < 25.7
    policy.end_training()
    assert policy.nesting.rank == 8


def test_all_layers_take_the_rank_drawn_and_give_it_back():
    model = tightfit.apply(make("llama"), ["dylora:rank=8"])
    twin = copy.deepcopy(model)
    layers = list(adapted_layers(model))
    assert {layer.scaling["default"] for layer in layers} == {2.0}, "nobody drew: the largest"
    model.rank_draw.begin_step(1)
    rank = model.rank_draw.nesting.rank
    assert rank < 8
    model.eval(), model.train()
    assert {(layer.lora_A["default"].weight.shape[0], layer.lora_B["default"].weight.shape[1]) for layer in layers} == {(rank, rank)}
    assert {layer.scaling["default"] for layer in layers} == {16 / rank}
    assert {layer.scaling["default"] for layer in adapted_layers(twin)} == {2.0}, "a copy has a rank of its own"
    model.rank_draw.end_training()
    assert {layer.scaling["default"] for layer in layers} == {2.0}
    assert isinstance(model.rank_draw, Policy)
    assert all(isinstance(DyLoRA(), socket) for socket in (Transform, Initialises, Learns))


def test_it_starts_as_lora_does():
    """From the same random state the same A, and B zero; at the largest rank it is LoRA."""
    made = [make("llama"), make("llama")]
    expected = steps.loss_of(made[0], batch(made[0]))
    for model, technique in zip(made, (DyLoRA(rank=8), LoRA(rank=8)), strict=True):
        torch.manual_seed(5)
        technique.apply(model)
    assert torch.equal(steps.loss_of(made[0], batch(made[0])), expected)
    ours, theirs = DyLoRA(rank=8).learned_state(made[0]), LoRA(rank=8).learned_state(made[1])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert DyLoRA(rank=8).learned_config(made[0]) == LoRA(rank=8).learned_config(made[1])
    DyLoRA(rank=8).initialise(made[0])
    again = DyLoRA(rank=8).learned_state(made[0])
    for name, tensor in again.items():
        assert torch.equal(tensor, ours[name]) == (".lora_B." in name)
        assert ".lora_B." in name or 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1, "kaiming: uniform within 1 / sqrt(in)"


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_adapters_learn_over_any_base(family, base):
    model = tightfit.apply(make(family), base)
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tightfit.apply(model, ["dylora:rank=4"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32} and {parameter.dim() for parameter in trained} == {1}
    base = steps.loss_of(model, batch(model)).item()
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    for step in range(12):
        model.rank_draw.begin_step(step)
        steps.train_step(model, batch(model), optimizer)
    held = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert held.keys() == frozen.keys()
    assert all(torch.equal(held[name], frozen[name]) for name in frozen)
    losses = []
    for rank in (1, 2, 4):
        set_rank(model, rank)
        losses.append(steps.loss_of(model, batch(model)).item())
    assert len(set(losses)) == 3 and max(losses) < base


def save(folder, config, state):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("family", "scale"), [("llama", "rank"), ("llama", "largest"), ("gpt2", "largest"), ("t5", "rank")])
def test_plain_peft_loads_every_rank(family, scale, tmp_path):
    """Of a file that was cut, and of the one that was not: equal logits. What was cut holds settings of PEFT's only."""
    from peft import LoraConfig, PeftModel

    plain, technique = make(family), DyLoRA(rank=RANK, alpha=ALPHA, scale=scale)
    model = copy.deepcopy(plain)
    technique.apply(model)
    config, state = technique.learned_config(fill(model)), technique.learned_state(model)
    save(tmp_path / "whole", config, state)
    inputs = inputs_for(plain, Workload("embed", 2, 20), ids)
    base = plain(**inputs).logits
    for rank in (1, 3, RANK):
        set_rank(model, rank)
        save(tmp_path / str(rank), *truncated(config, state, rank))
        assert truncated(config, state, rank)[0].keys() <= LoraConfig().to_dict().keys()
        expected = model(**inputs).logits
        assert (expected - base).abs().max() > 1e-3
        for name in [str(rank)] + ["whole"] * (rank == RANK):
            loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / name).eval()
            assert next(adapted_layers(loaded)).lora_A["default"].weight.shape[0] == rank
            torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_weigh_alike_come_back():
    technique = DyLoRA(rank=RANK, alpha=ALPHA, scale="largest")
    source, other = (adapted(technique) for _ in range(2))
    config, state = technique.learned_config(fill(source)), technique.learned_state(source)
    technique.load_learned(other, json.loads(json.dumps(config)), state)
    found = technique.learned_state(other)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    twin = adapted(DyLoRA(rank=RANK, alpha=ALPHA))
    with pytest.raises(TightfitError, match="dylora_scale largest in place of rank"):
        DyLoRA(rank=RANK, alpha=ALPHA).load_learned(twin, config, state)


def test_what_was_learned_comes_back():
    technique = DyLoRA(rank=RANK, alpha=ALPHA)
    source, other = (adapted(technique) for _ in range(2))
    config, state = technique.learned_config(fill(source)), technique.learned_state(source)
    assert {tuple(tensor.shape) for name, tensor in state.items() if "q_proj" in name} == {(RANK, 64), (64, RANK)}
    assert all(tensor.is_contiguous() for tensor in [*state.values(), *truncated(config, state, 2)[1].values()])
    set_rank(other, 2)  # must not matter
    technique.load_learned(other, json.loads(json.dumps(config)), state)
    found = dict(other.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in source.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in found.items()}
    name = min(state)
    faults = [
        (config | {"r": 9}, state, "r 9 in place of 5"),
        (config | {"lora_alpha": 1.0}, state, "lora_alpha 1.0"),
        (config | {"dylora_scale": "largest"}, state, "dylora_scale largest in place of rank"),
        (config, {key: tensor for key, tensor in state.items() if key != name}, "lacks"),
        (config, state | {"more": state[name]}, "unknown"),
        (config, truncated(config, state, 2)[1], "shape"),
    ]
    for bad_config, bad_state, said in faults:
        with pytest.raises(TightfitError, match=said) as caught:
            technique.load_learned(other, bad_config, bad_state)
        assert caught.value.hint
    assert all(torch.equal(found[name], before[name]) for name in before)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_takes_the_rank_of_its_step(dropout):
    """Bit for bit: nothing is drawn anew between the passes."""

    def learnt(techniques):
        model = tightfit.apply(make("llama"), [f"dylora:rank=8,dropout={dropout}", *techniques])
        fill(model).train()
        model.rank_draw.begin_step(2)
        assert 1 < model.rank_draw.nesting.rank < 8
        torch.manual_seed(6)
        steps.loss_of(model, batch(model)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected, found = learnt([]), learnt(["recompute"])
    assert found.keys() == expected.keys() and len(found) > 28
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_over_a_streamed_base(tmp_path):
    """Built from files with most blocks on disk: the gradients are those of the resident run."""
    make("llama", torch.bfloat16).save_pretrained(tmp_path)
    tune = Workload("tune", 1, 24)

    def learnt(streamed):
        settings = {"dylora": {"rank": 4}, "recompute": {}} | ({"offload": {"streamed": streamed}} if streamed else {})
        homes = tuple("disk" if position in streamed else "ram" for position in range(4))
        plan = Plan(str(tmp_path), tune, Budget(ram=1 << 40), "exact", settings, homes, {"ram": {"weights": 10**6}}, {}, {})
        with build(plan, describe(str(tmp_path))) as built:
            first = next(adapted_layers(built.model)).lora_A["default"].whole()
            assert 0 < first.abs().max() <= 64**-0.5, "`initialise` filled it"
            assert all(layer.lora_B["default"].whole().abs().max() == 0 for layer in adapted_layers(built.model))
            fill(built.model)
            built.model.rank_draw.begin_step(7)
            steps.loss_of(built.model.train(), inputs_for(built.model, tune, ids)).backward()
            return {name: parameter.grad for name, parameter in built.model.named_parameters() if parameter.grad is not None}

    expected, found = learnt(()), learnt((1, 2, 3))
    assert found.keys() == expected.keys() and len(found) >= 56
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_on_paper_it_has_the_same_parameters():
    live = make("llama")
    paper = meta_copy(live)
    for model in (live, paper):
        for name in ("int8", "dylora"):
            catalog.make(name, {}).apply(model)
    shapes = [
        {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in model.named_parameters()} for model in (live, paper)
    ]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in paper.parameters())


@pytest.mark.parametrize(
    "techniques", [["dylora:rank=6"], ["dylora:rank=6", "nf4"], ["dylora:rank=6", "recompute"], ["dylora:mode=frozen,rank=6"]], ids="+".join
)
def test_the_rehearsed_peak_is_the_measured_one(techniques):
    """Law 1, at the largest rank: 1 % of the CPU allocator's records."""
    tune, live = Workload("tune", 2, 128), make("llama")
    del live.model.layers[2:]
    made = [catalog.make(*catalog.parse(text)) for text in techniques]
    rehearsed = rehearse(lambda: meta_copy(live), tune, made).peak_bytes
    model = tightfit.apply(copy.deepcopy(live), techniques)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *model.buffers()]
    }

    def work():
        with ExitStack() as hooks:
            measure(model, inputs_for(model, tune, ids), tune, hooks)

    assert rehearsed == pytest.approx(sum(storages.values()) + allocator_peak(work), rel=0.01)


def test_low_ranks_are_good_where_those_of_lora_are_not():
    """The papers' point: forty steps on one batch, then cut to few ranks. LoRA gets the better of both scalings."""

    def sharp(technique):
        model = make("llama")
        model.lm_head.weight.data.mul_(8)  # as random weights are, its logits could not tell tokens apart
        technique.apply(model)
        return model

    def tuned(technique):
        model = sharp(technique)
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-3)
        for step in range(40):
            if isinstance(technique, DyLoRA):
                model.rank_draw.begin_step(step)
            steps.train_step(model, batch(model), optimizer)
        return technique.learned_config(model), technique.learned_state(model)

    def loss_at(rank, adapter, alpha):
        config, state = truncated(*adapter, rank)
        technique = LoRA(rank=rank, alpha=alpha)
        model = sharp(technique)
        technique.load_learned(model, config | {"lora_alpha": alpha}, state)
        return steps.loss_of(model, batch(model)).item()

    nested, plain = tuned(DyLoRA(rank=8)), tuned(LoRA(rank=8))
    for rank, margin in ((1, 0.8), (2, 0.5), (4, 0.6)):
        ours, theirs = loss_at(rank, nested, 16.0), min(loss_at(rank, plain, alpha) for alpha in (16.0, 16.0 * rank / 8))
        assert ours < margin * theirs


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        ({"rank": 0}, "`dylora:rank` is at least 1", "64"),
        ({"rank": 4, "least": 5}, "between 1 and the rank, 4, not 5", "1"),
        ({"least": 0}, "between 1 and the rank", "1"),
        ({"mode": "frosen"}, "no mode `frosen`", "did you mean `frozen`?"),
        ({"scale": "larges"}, "no scale `larges`", "did you mean `largest`?"),
        ({"draw": "lwo"}, "no draw `lwo`", "did you mean `low`?"),
        ({"slower": -0.5}, "`dylora:slower` is between 0 and 1, not -0.5", "0.5"),
        ({"where": "nothing"}, "`dylora` found no linear layer", "q_proj"),
    ],
)
def test_what_it_does_not_take(settings, said, hint):
    model = make("llama")
    with pytest.raises(TightfitError, match=said) as caught:
        DyLoRA(**settings).apply(model)
    assert hint in caught.value.hint
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing was changed"


def test_ranks_it_does_not_have():
    model = tightfit.apply(make("llama"), ["dylora:rank=4"])
    technique = DyLoRA(rank=4)
    for rank in (0, 5):
        with pytest.raises(TightfitError, match="ranks 1 to 4"):
            set_rank(model, rank)
        with pytest.raises(TightfitError, match="ranks 1 to 4"):
            truncated(technique.learned_config(model), technique.learned_state(model), rank)
    with pytest.raises(TightfitError, match="no adapters of several ranks"):
        set_rank(make("llama"), 1)
    with pytest.raises(TightfitError, match="adapters that this model has already"):
        DyLoRA().apply(model)


def test_each_setting_has_a_price():
    settings = catalog.explain("dylora")["settings"]
    assert [setting["name"] for setting in settings] == [
        "rank",
        "alpha",
        "dropout",
        "where",
        "least",
        "mode",
        "scale",
        "slower",
        "draw",
        "seed",
    ]
    assert all(setting["price"] for setting in settings)
