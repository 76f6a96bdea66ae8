"""chunked_loss: head and cross-entropy in slices of tokens, so that whole logits never exist, forward or backward.

*What shrinks*: activations; in place of logits of (batch · tokens, vocabulary) in 16 and in 32 bits and their gradients, which are
the largest activation of a long batch, only those of one slice are alive, and one gradient as large as the last hidden state.
*What it costs*: nothing in arithmetic, since each slice's gradient is taken at once; a few more operations a slice. A forward pass
with `labels` gives no logits.
*How it works*: when labels are given, the head hands its input on and the model's own loss is not computed. Then slice after slice
goes through the head, its scaling or soft cap, and cross-entropy in float32; its gradient follows before the next slice begins.
*Shapes*: hidden (batch, tokens, width) → loss (); a slice's logits are (slice, vocabulary).
*Relations*: with `recompute` it takes the two largest activations away; whatever the head is (dense, quantized, adapted), it is called.
In `Trainer` a metric that reads logits gets none, and label smoothing or another loss, computed outside the model, sees whole ones.
TRL's trainers slice with a head of their own.
*Paper*: the slicing of Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models, section 4, without its kernel.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tightfit.contracts import Quality, Stage
from tightfit.terms.errors import TightfitError

IGNORED = -100
"""The label of a position that does not count, as everywhere in transformers."""

_BIAS = "final_logits_bias"
"""The buffer that BART and its kin add to their logits."""


def _with_chunked_loss(model: nn.Module, forward: Any, tokens: int, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
    if labels is None:
        return forward(*args, **kwargs)
    counted = kwargs.pop("num_items_in_batch", None)
    targets = kwargs.pop("shift_labels", None)
    if model.config.is_encoder_decoder and kwargs.get("decoder_input_ids") is None:
        kwargs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    with _passing_on(model) as passed:
        output = forward(*args, **kwargs)
    targets = (_next_tokens(labels) if _predicts_next(model) else labels) if targets is None else targets
    loss = chunked_cross_entropy(passed[-1], targets, partial(_logits, model), _head_parameters(model), tokens)
    loss = loss / ((targets != IGNORED).sum() if counted is None else counted)
    return _with_loss(output, loss + _router_loss(model, output))


@contextmanager
def _passing_on(model: nn.Module) -> Iterator[list[Tensor]]:
    """Let the head keep its input and give logits of no width, on which whatever the model does after its head costs nothing."""
    passed: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        passed.append(hidden)
        return hidden[..., :0]

    head, bias = model.get_output_embeddings(), model._buffers.get(_BIAS)
    usual, head.forward = head.forward, keep
    if bias is not None:
        model._buffers[_BIAS] = bias[..., :0]
    try:
        yield passed
    finally:
        head.forward = usual
        if bias is not None:
            model._buffers[_BIAS] = bias


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The head, and what the model does to its logits: a bias (BART), a factor (Cohere), a divisor (Granite) or a soft cap (Gemma)."""
    logits, config = model.get_output_embeddings()(hidden), model.config.get_text_config(decoder=True).to_dict()
    if (bias := model._buffers.get(_BIAS)) is not None:
        logits = logits + bias[0]
    if factor := config.get("logit_scale"):
        logits = logits * factor
    if divisor := config.get("logits_scaling"):
        logits = logits / divisor
    if cap := config.get("final_logit_softcapping"):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.get_output_embeddings().parameters() if parameter.requires_grad]


def _predicts_next(model: nn.Module) -> bool:
    """Whether a position predicts the token after it. A decoder of a pair is shifted on its input, a masked model not at all."""
    return not model.config.is_encoder_decoder and model.loss_type != "ForMaskedLM"


def _next_tokens(labels: Tensor) -> Tensor:
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def _router_loss(model: nn.Module, output: Any) -> Tensor | float:
    """A mixture of experts' balancing loss, where the model was asked for it."""
    config, found = model.config.get_text_config(decoder=True).to_dict(), output.get("aux_loss")
    return config.get("router_aux_loss_coef", 0.0) * found if torch.is_tensor(found) else 0.0


def _with_loss(output: Any, loss: Tensor) -> Any:
    output["loss"] = loss
    output.move_to_end("loss", last=False)
    return output


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], tokens: int
) -> Tensor:
    """The summed cross-entropy of `targets` under `logits_of(hidden)`, `tokens` positions at a time, in float32.

    # hidden: (…, width), targets: (…) with `IGNORED` where nothing counts → ()

    `parameters` are the trainable ones inside `logits_of`. Equal to the whole computation but for the order of sums.
    """
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
    return _ChunkedCrossEntropy.apply(rows, flat, logits_of, tokens, *parameters)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Takes each slice's gradient in the forward pass, so that its logits die with it; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, logits_of: Any, tokens: int, *parameters: Tensor) -> Tensor:
        """# (n, width), (n,) → ()"""
        learns = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:])
        grad_rows = torch.empty_like(rows) if learns else None
        grads = [torch.zeros_like(parameter) for parameter in parameters] if learns else []
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, rows.shape[0], tokens):
            piece = rows[start : start + tokens].detach()
            with torch.set_grad_enabled(learns):
                logits = logits_of(piece.requires_grad_(learns))
            part, gradient = _cross_entropy(logits.detach(), targets[start : start + tokens], learns)
            loss += part
            if grad_rows is not None:
                found = torch.autograd.grad(logits, [piece, *parameters], gradient)
                grad_rows[start : start + tokens] = found[0]
                for whole, more in zip(grads, found[1:], strict=True):
                    whole += more
                del found
            del logits, gradient, piece
        if grad_rows is not None:
            ctx.save_for_backward(grad_rows, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """# () → (n, width), and the parameters' shapes"""
        grad_rows, *grads = ctx.saved_tensors
        return (grad_rows * scale.to(grad_rows.dtype), None, None, None, *[grad * scale.to(grad.dtype) for grad in grads])


def _cross_entropy(logits: Tensor, targets: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
    """The summed loss and its gradient, softmax less one at the target, which takes the memory of the softmax.

    # (slice, vocabulary), (slice,) → (), (slice, vocabulary)
    """
    scores = torch.log_softmax(logits.float(), -1)
    counts = (targets != IGNORED).to(scores.dtype)[:, None]
    at = targets.where(targets != IGNORED, 0)[:, None]
    loss = -(scores.gather(-1, at) * counts).sum()
    return loss, scores.exp_().scatter_add_(-1, at, -counts).mul_(counts).to(logits.dtype) if learns else None


@dataclass(frozen=True)
class ChunkedLoss:
    """Compute the loss in slices of tokens."""

    stage: ClassVar[Stage] = Stage.OBJECTIVE
    quality: ClassVar[Quality] = "exact"

    tokens: int = 256  # in a slice; fewer save memory, tokens · vocabulary · 10 bytes, and keep a GPU less busy

    def apply(self, model: nn.Module) -> None:
        """Wrap the model's forward pass; works on any device, `meta` too. Raises `TightfitError` for a model without a vocabulary head."""
        head = model.get_output_embeddings()
        if head is None:
            raise TightfitError(
                f"`chunked_loss` found no vocabulary head in `{type(model).__name__}`", hint="it is for models that predict tokens"
            )
        if self.tokens < 1:
            raise TightfitError(f"`chunked_loss:tokens` is at least 1, not {self.tokens}", hint="256 suits most models")
        changed = partial(_with_chunked_loss, model, model.forward, self.tokens)
        changed.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]  # `generate` and `Trainer` go by it
        model.forward = changed
