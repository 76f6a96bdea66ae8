"""Train the embedded demo model from public-domain text: `python scripts/train_demo_model.py --data DIR --out DIR`; knows no `tightfit`."""

import argparse
import dataclasses
import json
import math
import os
import shutil
import time
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 4096
STRETCH_CHARACTERS = 100_000  # long books are held out in many places, so that an index at the end is not the whole test
HELD_OUT_SHARE = 0.05
SHORT_CONTEXT, LONG_CONTEXT = 256, 512
LONG_SHARE = 0.2  # the last part of training reads windows of the long context
TOKENS_PER_STEP = 1024  # small: on a CPU, more steps teach more than wider ones
WARMUP_SHARE, LAST_RATE_SHARE = 0.04, 0.05
SAVE_SECONDS = 600
QUICK_STRIDE = 8  # intermediate models are measured on every eighth held-out stretch
PROMPTS = ("It was a cold morning, and", "The origin of species", "My fellow citizens,")

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, demo, tiny]
---

# tightfit-demo

A real, very small Llama, so that everything tightfit does with a language model can be tried on a fresh machine without a network.
`scripts/train_demo_model.py` trained it and wrote this card; every figure below was measured by that run.

## Model

{architecture}
Tokenizer: byte-level BPE of {vocabulary} pieces, learned from the training text; `<s>` opens every sequence, `</s>` closes a document.

## Data

{documents} documents, {train_bytes:,} bytes for training, {held_bytes:,} held out. All of it is in the public domain:

- `bronte`, `darwin`: novels of Charlotte Brontë and books of Charles Darwin
- `shakespeare`: plays of William Shakespeare
- `state_union`, `inaugural`: addresses of presidents of the United States, works of their government

The last {held_share:.0%} of every stretch of {stretch:,} characters (or of the document, where it is shorter) is held out.

## Training

{steps:,} steps, {tokens:,} tokens ({epochs:.1f} passes over the text), {minutes:.1f} minutes on {cpu}, {threads} thread(s), seed {seed}.
AdamW (fused), learning rate {rate:g}, weight decay 0.1, warmup and cosine, gradients clipped at 1, bfloat16 autocast,
{step_tokens:,} tokens a step; windows of {short} tokens, in the last {long_share:.0%} of {long}.{state}

## Held-out results

The saved bfloat16 weights, in windows of {long} tokens ({coverage}).

| corpus | tokens | perplexity per token | bits per byte |
|---|---:|---:|---:|
{table}

Perplexity depends on the tokenizer; compare other models by bits per byte.

## Sample

Temperature 0.8, top-p 0.95, seed {seed}; the prompt is bold.

{samples}

## Limits

For demonstrations, tests and benchmarks of the machinery: loading, streaming, quantizing, tuning, generating.
It imitates the sound of its books, but it is undertrained: it invents words, seldom finishes a thought,
knows no facts and follows no instructions.
Its text shows the views of its sources, many of them of the 19th century. Not for any use in which somebody relies on what it says.
Attention positions above {long} were never trained.
"""


@dataclasses.dataclass(frozen=True)
class Corpora:
    documents: int
    train: list[str]  # training text, one string a document
    held_out: dict[str, list[str]]  # corpus -> stretches

    def held_bytes(self) -> int:
        return sum(len(text.encode()) for stretches in self.held_out.values() for text in stretches)


@dataclasses.dataclass
class Run:
    """What a run was given and has done so far: figures for the card."""

    seed: int
    rate: float
    epoch_tokens: int
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def decode(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:  # a few of the speeches
        text = raw.decode("cp1252", errors="replace")
    return text.replace("\r\n", "\n").strip()


def read_documents(data: Path) -> dict[str, list[str]]:
    """corpus -> its documents, in a fixed order."""
    folder = data / "corpora"
    files = {
        "bronte": folder / "books/bronte.txt",
        "darwin": folder / "books/darwin.txt",
        "shakespeare": folder / "tinyshakespeare/input.txt",
    }
    documents = {name: [decode(path.read_bytes())] for name, path in files.items()}
    for name in ("state_union", "inaugural"):
        with zipfile.ZipFile(folder / f"speeches/{name}.zip") as archive:
            members = sorted(member for member in archive.namelist() if member.endswith(".txt"))
            documents[name] = [decode(archive.read(member)) for member in members]
    return documents


def split(documents: dict[str, list[str]]) -> Corpora:
    """Hold out the last share of every stretch of every document."""
    train, held_out = [], {name: [] for name in documents}
    for name, texts in documents.items():
        for text in texts:
            stretches = [text[at : at + STRETCH_CHARACTERS] for at in range(0, len(text), STRETCH_CHARACTERS)]
            cuts = [round(len(stretch) * (1 - HELD_OUT_SHARE)) for stretch in stretches]
            train.append("".join(stretch[:cut] for stretch, cut in zip(stretches, cuts, strict=True)))
            held_out[name] += [stretch[cut:] for stretch, cut in zip(stretches, cuts, strict=True)]
    return Corpora(len(train), train, held_out)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=1024)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="eager",  # for windows this short a tenth quicker than `sdpa` on a CPU; not saved
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents packed into one row, each closed by the end token."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


class Batches:
    """Endless shuffled windows of a stream, each opened by the start token; every pass cuts at a new offset."""

    def __init__(self, stream: torch.Tensor, bos: int, seed: int):
        self.stream, self.bos = stream, bos
        self.random = torch.Generator().manual_seed(seed)
        self.context, self.starts = 0, []

    def take(self, context: int) -> torch.Tensor:
        count = TOKENS_PER_STEP // context
        room = context - 1
        if context != self.context:
            self.context, self.starts = context, []
        while len(self.starts) < count:
            offset = int(torch.randint(room, (1,), generator=self.random))
            windows = (len(self.stream) - offset) // room
            self.starts += (torch.randperm(windows, generator=self.random) * room + offset).tolist()
        chosen = [self.starts.pop(0) for _ in range(count)]
        rows = [self.stream[start : start + room] for start in chosen]
        return torch.nn.functional.pad(torch.stack(rows), (1, 0), value=self.bos)  # (count, context)


def learning_rate(progress: float, peak: float) -> float:
    """Warmup, then half a cosine; progress runs from 0 to 1 in time or in steps."""
    if progress < WARMUP_SHARE:
        return peak * max(progress / WARMUP_SHARE, 0.01)
    turn = (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)
    return peak * (LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * (1 + math.cos(math.pi * min(turn, 1))) / 2)


def weight_groups(model: LlamaForCausalLM) -> list[dict]:
    """Matrices decay, norms do not."""
    weights = list(model.parameters())
    decayed = [weight for weight in weights if weight.ndim > 1]
    kept = [weight for weight in weights if weight.ndim == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpora: Corpora, stride: int
) -> dict[str, tuple[int, float, int]]:
    """corpus -> tokens, summed loss in nats, bytes of every stride-th held-out stretch."""
    results = {}
    for name, stretches in corpora.held_out.items():
        tokens, nats, size = 0, 0.0, 0
        for text in stretches[::stride]:
            ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            for window in ids.split(LONG_CONTEXT - 1):
                row = torch.nn.functional.pad(window, (1, 0), value=tokenizer.bos_token_id)[None]
                nats += model(input_ids=row, labels=row, use_cache=False).loss.item() * len(window)
            tokens, size = tokens + len(ids), size + len(text.encode())
        results[name] = (tokens, nats, size)
    results["all"] = tuple(sum(column) for column in zip(*results.values(), strict=True))
    return results


@torch.no_grad()
def write_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    samples = []
    for prompt in PROMPTS:
        torch.manual_seed(seed + len(samples))
        row = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**row, max_new_tokens=80, do_sample=True, temperature=0.8, top_p=0.95)
        text = tokenizer.decode(out[0], skip_special_tokens=True)
        samples.append(f"> **{prompt}**{text[len(prompt) :]}".replace("\n\n", "\n").replace("\n", "\n> "))
    return "\n\n".join(samples)


def cpu_name() -> str:
    """The CPU as the system names it, with the vector width torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    bf16 = ", AVX512-BF16" if any("avx512_bf16" in line for line in lines) else ""
    return f"{names[0] if names else 'an unnamed'} CPU ({torch.backends.cpu.get_cpu_capability()}{bf16})"


def describe(model: LlamaForCausalLM) -> str:
    config = model.config
    return (
        f"`LlamaForCausalLM`, {model.num_parameters():,} parameters, bfloat16: "
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} key-value heads, "
        f"feed-forward {config.intermediate_size}, tied embeddings, up to {config.max_position_embeddings} positions.\n"
    )


def write_card(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpora: Corpora, run: Run, final: bool) -> float:
    """Measure the model as saved, write its card, return the overall perplexity."""
    results = measure(model, tokenizer, corpora, 1 if final else QUICK_STRIDE)
    table = [
        f"| {name} | {tokens:,} | {math.exp(nats / tokens):.2f} | {nats / math.log(2) / size:.3f} |"
        for name, (tokens, nats, size) in results.items()
    ]
    card = CARD.format(
        architecture=describe(model),
        vocabulary=len(tokenizer),
        documents=corpora.documents,
        train_bytes=sum(len(text.encode()) for text in corpora.train),
        held_bytes=corpora.held_bytes(),
        held_share=HELD_OUT_SHARE,
        stretch=STRETCH_CHARACTERS,
        epochs=run.tokens / run.epoch_tokens,
        minutes=run.seconds / 60,
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        **dataclasses.asdict(run),
        step_tokens=TOKENS_PER_STEP,
        short=SHORT_CONTEXT,
        long=LONG_CONTEXT,
        long_share=LONG_SHARE,
        state="" if final else "\n**Intermediate state: the training was still running.**",
        coverage="all held-out text" if final else f"every {QUICK_STRIDE}th held-out stretch",
        table="\n".join(table),
        samples=write_samples(model, tokenizer, run.seed),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return math.exp(results["all"][1] / results["all"][0])


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it under the class name that transformers 4 knows too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpora: Corpora, run: Run, out: Path, final: bool) -> float:
    """Write the whole folder beside its place, measure what was saved, then rename; return the perplexity."""
    partial, previous = (out.with_name(f".{out.name}.{word}") for word in ("partial", "previous"))
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
    state = {name: weight.detach().to(torch.bfloat16) for name, weight in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, partial)
    saved = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.bfloat16)
    perplexity = write_card(partial, saved, AutoTokenizer.from_pretrained(partial), corpora, run, final)
    if out.exists():
        out.rename(previous)
    partial.rename(out)
    shutil.rmtree(previous, ignore_errors=True)
    return perplexity


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    started = time.monotonic()
    corpora = split(read_documents(options.data))
    tokenizer = train_tokenizer(corpora.train)
    stream = encode_stream(tokenizer, corpora.train)
    model = new_model(tokenizer)
    optimizer = torch.optim.AdamW(weight_groups(model), lr=options.rate, betas=(0.9, 0.95), fused=True)
    batches = Batches(stream, tokenizer.bos_token_id, options.seed)
    run = Run(options.seed, options.rate, epoch_tokens=len(stream))
    saved_at, perplexity, progress = started, math.nan, 0.0
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {n:.1f}% [{elapsed}<{remaining}{postfix}]", mininterval=5) as bar:
        while progress < 1:
            batch = batches.take(LONG_CONTEXT if progress > 1 - LONG_SHARE else SHORT_CONTEXT)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, options.rate)
            loss = learn(model, optimizer, batch)
            run.steps, run.tokens, run.seconds = run.steps + 1, run.tokens + batch.numel(), time.monotonic() - started
            progress = run.steps / options.steps if options.steps else run.seconds / (60 * options.minutes)
            if time.monotonic() - saved_at > SAVE_SECONDS and progress < 1:
                perplexity = publish(model, tokenizer, corpora, run, options.out, final=False)
                saved_at = time.monotonic()
            bar.set_postfix(step=run.steps, tokens=f"{run.tokens:,}", loss=f"{loss:.3f}", held_out=f"{perplexity:.2f}", refresh=False)
            bar.update(100 * min(progress, 1) - bar.n)
    perplexity = publish(model, tokenizer, corpora, run, options.out, final=True)
    print(f"held-out perplexity {perplexity:.2f} after {run.steps} steps; wrote {options.out}")


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """One step of training; returns the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main() -> None:
    beside_checkout = Path(__file__).resolve().parents[2] / "shared/data"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("TIGHTFIT_DATA", beside_checkout)), help="folder that holds corpora/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to; replaced as a whole")
    parser.add_argument("--steps", type=int, help="train this many steps (repeatable), whatever the time")
    parser.add_argument("--minutes", type=float, default=50, help="train for this time, where --steps is not given")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
