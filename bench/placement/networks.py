"""Models: the networks whose graphs are placed, on `meta` and with their real shapes; as functions that give (module, inputs).

BERT, GPT-2 and Mixtral are Hugging Face's own classes. Inception-v3 and GNMT are written here from their papers: Szegedy et al. 2015
(arXiv 1512.00567), without the auxiliary head; Wu et al. 2016 (arXiv 1609.08144) in the size that Baechi uses (SoCC 2020, section 4).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Example = tuple[nn.Module, dict[str, Tensor]]
WHOLE = ("BasicConv2d", "LSTMCell", "Attention")
"""Classes that accelerate is not to split, of the models that do not say it themselves."""


def bert_base(rows: int = 32, tokens: int = 128, training: bool = False) -> Example:
    """BERT-base with its head for masked words: 110 million parameters."""
    from transformers import BertConfig, BertForMaskedLM

    return _language_model(BertForMaskedLM, BertConfig(), rows, tokens, training)


def gpt2(rows: int = 8, tokens: int = 512, training: bool = False) -> Example:
    """GPT-2 in its smallest size: 124 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _language_model(GPT2LMHeadModel, GPT2Config(), rows, tokens, training)


def mixtral(rows: int = 1, tokens: int = 512, training: bool = False) -> Example:
    """Mixtral-8x7B in bfloat16: 46.7 billion parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return _language_model(MixtralForCausalLM, MixtralConfig(), rows, tokens, training, torch.bfloat16)


def inception_v3(rows: int = 32, training: bool = False) -> Example:
    """Inception-v3 for 299 × 299 pixels: 24 million parameters."""
    with torch.device("meta"):
        inputs = {"pixels": torch.empty(rows, 3, 299, 299)}
        return Inception(), inputs | ({"labels": torch.empty(rows, dtype=torch.long)} if training else {})


def gnmt(rows: int = 128, tokens: int = 40, training: bool = False) -> Example:
    """GNMT with 4 layers of 512 cells and 30,000 words, unrolled over the length of the sentence, as TensorFlow's graph is."""
    with torch.device("meta"):
        inputs = {"source": torch.empty(rows, tokens, dtype=torch.long), "target": torch.empty(rows, tokens, dtype=torch.long)}
        return Translator(), inputs | ({"labels": torch.empty(rows, tokens, dtype=torch.long)} if training else {})


MODELS: dict[str, Callable[..., Example]] = {
    "bert-base": bert_base,
    "gpt2": gpt2,
    "inception-v3": inception_v3,
    "gnmt": gnmt,
    "mixtral-8x7b": mixtral,
}


def _language_model(
    kind: type[nn.Module], config: object, rows: int, tokens: int, training: bool, dtype: torch.dtype = torch.float32
) -> Example:
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        module = kind._from_config(config, dtype=dtype)
        module.tie_weights()
        ids = torch.empty(rows, tokens, dtype=torch.long)
    return module, {"input_ids": ids} | ({"labels": ids} if training else {})


class BasicConv2d(nn.Module):
    """Convolution, batch normalization and ReLU."""

    def __init__(self, channels: int, width: int, size: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class Branches(nn.Module):
    """Several ways from one input, whose outputs lie beside each other."""

    def __init__(self, *ways: nn.Module) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([way(x) for way in self.ways], 1)


def _pool(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1), BasicConv2d(channels, width, 1))


def _mixed_35(channels: int, pooled: int) -> nn.Module:
    """Figure 5: 5 × 5 as it was, and 5 × 5 as two 3 × 3."""
    five = nn.Sequential(BasicConv2d(channels, 48, 1), BasicConv2d(48, 64, 5, padding=2))
    three = nn.Sequential(BasicConv2d(channels, 64, 1), BasicConv2d(64, 96, 3, padding=1), BasicConv2d(96, 96, 3, padding=1))
    return Branches(BasicConv2d(channels, 64, 1), five, three, _pool(channels, pooled))


def _mixed_17(width: int) -> nn.Module:
    """Figure 6: 7 × 7 as 1 × 7 and 7 × 1."""
    across, down = {"size": (1, 7), "padding": (0, 3)}, {"size": (7, 1), "padding": (3, 0)}
    seven = nn.Sequential(BasicConv2d(768, width, 1), BasicConv2d(width, width, **across), BasicConv2d(width, 192, **down))
    twice = nn.Sequential(
        BasicConv2d(768, width, 1),
        BasicConv2d(width, width, **down),
        BasicConv2d(width, width, **across),
        BasicConv2d(width, width, **down),
        BasicConv2d(width, 192, **across),
    )
    return Branches(BasicConv2d(768, 192, 1), seven, twice, _pool(768, 192))


def _mixed_8(channels: int) -> nn.Module:
    """Figure 7: 3 × 3 as 1 × 3 beside 3 × 1."""
    one = nn.Sequential(BasicConv2d(channels, 384, 1), _crossed())
    two = nn.Sequential(BasicConv2d(channels, 448, 1), BasicConv2d(448, 384, 3, padding=1), _crossed())
    return Branches(BasicConv2d(channels, 320, 1), one, two, _pool(channels, 192))


def _crossed() -> nn.Module:
    return Branches(BasicConv2d(384, 384, (1, 3), padding=(0, 1)), BasicConv2d(384, 384, (3, 1), padding=(1, 0)))


def _smaller(*ways: nn.Module) -> nn.Module:
    """Section 5: convolutions of stride 2 beside a pooling."""
    return Branches(*ways, nn.MaxPool2d(3, 2))


class Inception(nn.Module):
    """Inception-v3 (table 1 of the paper, in the widths of its authors' code)."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            BasicConv2d(3, 32, 3, 2),
            BasicConv2d(32, 32, 3),
            BasicConv2d(32, 64, 3, padding=1),
            nn.MaxPool2d(3, 2),
            BasicConv2d(64, 80, 1),
            BasicConv2d(80, 192, 3),
            nn.MaxPool2d(3, 2),
        )
        self.mixed = nn.ModuleList(
            [
                *(_mixed_35(channels, pooled) for channels, pooled in ((192, 32), (256, 64), (288, 64))),
                _smaller(
                    BasicConv2d(288, 384, 3, 2),
                    nn.Sequential(BasicConv2d(288, 64, 1), BasicConv2d(64, 96, 3, padding=1), BasicConv2d(96, 96, 3, 2)),
                ),
                *(_mixed_17(width) for width in (128, 160, 160, 192)),
                _smaller(
                    nn.Sequential(BasicConv2d(768, 192, 1), BasicConv2d(192, 320, 3, 2)),
                    nn.Sequential(
                        BasicConv2d(768, 192, 1),
                        BasicConv2d(192, 192, (1, 7), padding=(0, 3)),
                        BasicConv2d(192, 192, (7, 1), padding=(3, 0)),
                        BasicConv2d(192, 192, 3, 2),
                    ),
                ),
                _mixed_8(1280),
                _mixed_8(2048),
            ]
        )
        self.head = nn.Linear(2048, classes)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or the loss where there are labels."""
        x = self.stem(pixels)
        for block in self.mixed:
            x = block(x)
        logits = self.head(functional.dropout(x.mean((2, 3)), training=self.training))
        return logits if labels is None else functional.cross_entropy(logits, labels)


class Attention(nn.Module):
    """Which words of the source one step of the decoder looks at (Bahdanau et al. 2014, section 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ask, self.answer = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, state: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
        weights = torch.softmax(self.score(torch.tanh(self.ask(state)[:, None] + keys)), 1)  # (rows, tokens, 1)
        return (weights * memory).sum(1)


class Translator(nn.Module):
    """GNMT: the first layer reads both ways, residual connections from the third layer on, attention from the decoder's first layer."""

    def __init__(self, words: int = 30000, width: int = 512, layers: int = 4) -> None:
        super().__init__()
        self.width = width
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        self.onward, self.back = nn.LSTMCell(width, width), nn.LSTMCell(width, width)
        self.encoder = nn.ModuleList(nn.LSTMCell(2 * width if layer == 1 else width, width) for layer in range(1, layers))
        self.decoder = nn.ModuleList(nn.LSTMCell(2 * width, width) for _ in range(layers))
        self.attention = Attention(width)
        self.head = nn.Linear(width, words)

    def forward(self, source: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits for each word of the target, or the loss where there are labels."""
        words = self.source(source).unbind(1)
        both = zip(self._read(self.onward, words), self._read(self.back, words[::-1])[::-1], strict=True)
        steps = [torch.cat(pair, -1) for pair in both]
        for layer, cell in enumerate(self.encoder):
            read = self._read(cell, steps)
            steps = [new + old for new, old in zip(read, steps, strict=True)] if layer else read
        memory = torch.stack(steps, 1)
        logits = self.head(torch.stack(self._write(self.target(target).unbind(1), memory, self.attention.answer(memory)), 1))
        return logits if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def _read(self, cell: nn.Module, steps: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
        state = (steps[0].new_zeros(len(steps[0]), self.width),) * 2
        outputs = []
        for step in steps:
            state = cell(step, state)
            outputs.append(state[0])
        return outputs

    def _write(self, words: tuple[Tensor, ...], memory: Tensor, keys: Tensor) -> list[Tensor]:
        """Step by step through all layers, since each step's attention asks with the step before it."""
        states = [(words[0].new_zeros(len(words[0]), self.width),) * 2 for _ in self.decoder]
        seen, outputs = words[0].new_zeros(len(words[0]), self.width), []
        for word in words:
            x = word
            for layer, cell in enumerate(self.decoder):
                states[layer] = cell(torch.cat((x, seen), -1), states[layer])
                if not layer:
                    seen = self.attention(states[0][0], keys, memory)
                x = states[layer][0] + x if layer > 1 else states[layer][0]
            outputs.append(x)
        return outputs
