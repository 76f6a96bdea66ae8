"""Experts: solve fused experts one after the other, each for the tokens that are routed to it.

What they are called with for all samples is kept at their door, as the hidden states are at a block's. Tokens are routed as the block
routes them whose layers before the experts are in few bits already; an expert's second matrix is fed what its first one, in few bits
too, makes of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tightfit.contracts import Solves
from tightfit.formats.experts import TOKENS, QuantizedExperts
from tightfit.runtime.calibrate import DENSE, Door, Walk, called, means_of, parts, room
from tightfit.runtime.solve import located, solved

EXPERTS = "experts-"
"""What the file of the states that enter fused experts is called before its name."""

FEWEST = 4
"""An expert needs a token for so many columns at least: with fewer the solved weights are worse than rounded ones."""

Pairs = Iterator[tuple[Tensor, Tensor | None]]
"""What a matrix is fed, and what it is fed in the dense model where that is asked for, some tokens at a time."""


@dataclass(frozen=True)
class Routed:
    """The tokens of all samples as they enter fused experts, and as they enter those of the dense block."""

    hidden: Tensor  # (tokens, d)
    choices: Tensor  # (tokens, k) of experts, int16
    dense: Tensor | None  # (tokens, d)

    def places(self, expert: int) -> Tensor:
        """Which tokens chose the expert.  # → (n,)"""
        return (self.choices == expert).any(dim=1).nonzero()[:, 0]

    def inputs(self, places: Tensor) -> Pairs:
        """The tokens at `places`, on their device.  # → pairs of (at most TOKENS, d) float32"""
        for some in places.split(TOKENS):
            at = some.to(self.hidden.device)
            x, y = self.hidden[at], None if self.dense is None else self.dense[at]
            yield x.to(some.device).float(), None if y is None else y.to(some.device).float()


def routed_of(walk: Walk, name: str, door: Door, dense: Door | None) -> Routed | None:
    """What the fused experts at `name` are called with; None where that is not every token of every sample."""
    entering = _entering(walk, name, door, EXPERTS)
    beside = _entering(walk, name, dense, DENSE + EXPERTS) if entering and dense else None
    if entering is None or (dense and beside is None):
        return None
    return Routed(*entering, beside and beside[0])


def _entering(walk: Walk, name: str, door: Door, stem: str) -> tuple[Tensor, Tensor] | None:
    """# → (tokens, d), (tokens, k) int16"""
    rooms: list[Tensor] = []
    for part in parts(walk):
        call = called(walk, name, door, part)
        hidden, choices = _routing(*call.args, **call.kwargs) if call else (torch.empty(0), torch.empty(0))
        if len(hidden) != walk.samples[part].numel():
            return None
        if not rooms:
            rooms = _rooms(walk, hidden, choices, stem)
        begin = part.start * walk.samples.shape[1]
        for kept, new in zip(rooms, (hidden, choices), strict=True):
            kept[begin : begin + len(new)] = new
    return rooms[0], rooms[1]


def _routing(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
    """What fused experts are called with, in this order or by these names; how much each choice counts is not asked here."""
    return hidden_states, top_k_index


def _rooms(walk: Walk, hidden: Tensor, choices: Tensor, stem: str) -> list[Tensor]:
    tokens, file = walk.samples.numel(), walk.file and walk.file.with_stem(f"{stem}{walk.file.stem}")
    states = room(file, hidden, (tokens, hidden.shape[1]))
    if file:
        file.unlink()  # its pages live as long as the tensor
    return [states, choices.new_empty((tokens, choices.shape[1]), dtype=torch.int16)]


def solve_experts(
    technique: Solves, path: str, dense: nn.Module, layer: QuantizedExperts, routed: Routed, told: Callable[[str], None]
) -> int:
    """Fill `layer` with the solved matrices of `dense`; experts that few tokens reach are rounded, and their number is returned.

    `told` hears the path of each matrix that is done. Raises `TightfitError` with that path in front.
    """
    for name, parameter in dense.named_parameters():
        if name not in layer.matrices:
            layer.absorb(name, parameter)
    missed = 0
    for expert in range(layer.num_experts):
        places = routed.places(expert)
        enough = len(places) * FEWEST >= max(columns for _, columns in layer.shapes.values())
        missed += not enough
        for name in layer.matrices:
            where = f"{path}[{expert}].{name}"
            if enough:
                fed = routed.inputs(places) if name == layer.matrices[0] else _inside(dense, layer, expert, routed.inputs(places))
                layer.keep_expert(name, expert, solved(technique, where, _matrix(dense, layer, name, expert), *means_of(fed)))
            else:
                with located(where):
                    layer.absorb_expert(name, expert, dense.get_parameter(name)[expert])
            told(where)
    return missed


def _inside(dense: nn.Module, layer: QuantizedExperts, expert: int, inputs: Pairs) -> Pairs:
    """What the second matrix is fed: products of the first, in few bits and dense, gated.  # pairs of (n, d) → pairs of (n, width)"""
    name = layer.matrices[0]
    rounded, weight = layer.dequantize(name, expert, torch.float32), _matrix(dense, layer, name, expert)
    bias = dense.get_parameter(f"{name}_bias")[expert].float() if layer.has_bias else None
    for x, y in inputs:
        inner = layer.gate(nn.functional.linear(x, rounded, bias))
        yield inner, None if y is None else layer.gate(nn.functional.linear(y, weight, bias))


def _matrix(dense: nn.Module, layer: QuantizedExperts, name: str, expert: int) -> Tensor:
    """# → (out, in) float32"""
    matrix = dense.get_parameter(name)[expert].float()
    return matrix.t() if layer.is_transposed else matrix
