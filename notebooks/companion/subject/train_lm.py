"""Train the embedded language model from scratch: `make lm`, or `python -m
companion.subject.train_lm --help`.

Notable here:
- transformers' own `Gemma2ForCausalLM`, small: grouped-query attention, alternating sliding and
  global layers, soft-capped logits, norms before and after each block, GeGLU, tied embeddings, BOS.
- Muon (Jordan et al. 2024, torch's implementation) on the matrices of the blocks, AdamW on
  embeddings and norms.
- warm-up, constant, then linear to zero: the schedule of a run that knows its length only in
  tokens.
- bf16 autocast around float32 master weights; checkpoints by rename; a killed run goes on where it
  stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas as pd
import tokenizers
import torch
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from jumprelu.corpus import load_texts, tokenize
from jumprelu.files import SUBJECT, cache_root, digest, read_json, write_json, write_text, writing

from .texts import fingerprint


@dataclass(frozen=True)
class LMConfig:
    """Size and training of the embedded model.

    The defaults are those of the weights in `jumprelu/subject`, but for which rows of a document
    with more than 64 are drawn: that was evened out after their run, so training again gives a
    model like it and not the same one.
    """

    vocab_size: int = 4096
    d_model: int = 256
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    d_mlp: int = 768
    sliding_window: int = 128
    """Every other layer sees only this many tokens back: half a training context, so that it
    matters."""
    context_size: int = 256
    batch_rows: int = 16
    pool_tokens: int = 18_000_000
    """Tokens cut from the corpus and shuffled, row by row."""
    tokens: int = 12_300_000
    """Training tokens: the first so many of the pool, each seen once."""
    lr: float = 5e-3
    embedding_lr: float = 6e-3
    weight_decay: float = 0.05
    warmup: float = 0.0146
    """Share of the run over which the learning rates rise."""
    decay: float = 0.25
    """Share of the run, its last, over which they fall linearly to zero."""
    seed: int = 0
    source: str = "installed"


def gemma_config(config: LMConfig) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        query_pre_attn_scalar=config.head_dim,
        sliding_window=config.sliding_window,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )


def train_tokenizer(texts, vocab_size: int, documents: int = 1500) -> PreTrainedTokenizerFast:
    """Byte-level BPE on a sample of documents: words with their leading space, digits one by one,
    runs of blanks."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+ *|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(words), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    sample = itertools.islice(texts.shuffle(seed=0), documents)
    tokenizer.train_from_iterator((row["text"] for row in sample), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    )


def learning_rate(progress: float, config: LMConfig) -> float:
    """Factor in [0, 1] at `progress` in [0, 1] of the run: up, flat, linearly down."""
    return min(1.0, progress / config.warmup, (1 - progress) / config.decay)


def make_optimizers(model: torch.nn.Module, config: LMConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=config.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


def heldout_loss(model: torch.nn.Module, ids: torch.Tensor, batch_rows: int = 16) -> float:
    """Mean next-token cross-entropy in nats per token; ids: [n_rows, context_size]."""
    losses = []
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
        for rows in ids.split(batch_rows):
            losses += [model(rows, labels=rows).loss.float().item()] * len(rows)
    return sum(losses) / len(losses)


def training_rows(config: LMConfig, work: Path):
    """Tokenizer, training rows as int32 [n_rows, context_size], validation rows; made once, then
    read back."""
    request = (
        config.source,
        config.vocab_size,
        config.context_size,
        config.pool_tokens,
        config.seed,
    )
    folder = work / f"tokens-{digest(*request)}"
    if not (folder / "done").exists():
        texts = load_texts(config.source, "train")
        tokenizer = train_tokenizer(texts, config.vocab_size)
        rows = config.pool_tokens // config.context_size
        # at most 64 rows (about 50 kB) of a document, so that the run sees more documents
        train = tokenize(
            texts, tokenizer, config.context_size, rows, rows_per_document=64, seed=config.seed
        )
        heldout = tokenize(
            load_texts(config.source, "validation"),
            tokenizer,
            config.context_size,
            192,
            rows_per_document=4,
        )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
        tokenizer.save_pretrained(folder)
        with writing(folder / "rows.pt") as f:
            torch.save({"train": train.ids[order].to(torch.int32), "heldout": heldout.ids}, f)
        # A streamed source has no length, and its end may be far.
        whole = isinstance(texts, datasets.Dataset)
        corpus = (
            {"corpus": fingerprint(load_texts(config.source, "test")), "documents": len(texts)}
            if whole
            else {}
        )
        write_json(folder / "done", corpus)
    saved = torch.load(folder / "rows.pt", weights_only=True, mmap=True)
    return PreTrainedTokenizerFast.from_pretrained(folder), saved["train"], saved["heldout"], folder


def train_lm(
    config: LMConfig,
    out: Path,
    device: str = "cpu",
    checkpoint_seconds: float = 300,
    compiled: bool | None = None,
) -> Path:
    """Train and write model, tokenizer, training log and configuration to the folder `out`; returns
    `out`.

    compiled: use torch.compile (a third faster on 2 cores, after a minute); by default, where there
    is a compiler. Killed at any time and called again with the same configuration, it goes on from
    its last checkpoint.
    """
    work = cache_root() / "lm"
    tokenizer, train, heldout, folder = training_rows(config, work)
    checkpoint = work / f"checkpoint-{digest(dataclasses.asdict(config))}.pt"
    torch.manual_seed(config.seed)
    model = Gemma2ForCausalLM(gemma_config(config)).to(device)
    if compiled is None:
        compiled = device != "cpu" or shutil.which("g++") is not None
    forward = torch.compile(model) if compiled else model
    optimizers = make_optimizers(model, config)
    steps = config.tokens // (config.batch_rows * config.context_size)
    if steps * config.batch_rows > len(train):
        raise ValueError(
            f"{config.tokens} training tokens were asked for, the pool has {train.numel()}: lower "
            "tokens, or raise "
            "pool_tokens (a small corpus may not have as many)"
        )
    first, log, seconds = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, log, seconds = state["step"], state["log"], state["seconds"]
        print(f"going on from step {first} of {steps}")

    def save(step: int) -> None:
        with writing(checkpoint) as f:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step,
                    "log": log,
                    "seconds": seconds,
                },
                f,
            )

    heldout = heldout.to(device)
    progress = tqdm(
        range(first, steps), initial=first, total=steps, desc="training the LM", mininterval=10
    )
    started, saved_at, recent = time.monotonic(), time.monotonic(), []
    for step in progress:
        factor = learning_rate((step + 0.5) / steps, config)
        rows = train[step * config.batch_rows : (step + 1) * config.batch_rows].long().to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = forward(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.detach())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds += time.monotonic() - started
            started = time.monotonic()
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * config.batch_rows * config.context_size,
                "train_loss": torch.stack(recent).mean().item(),
                "lr_factor": factor,
            }
            if not math.isfinite(entry["train_loss"]):
                raise FloatingPointError(
                    f"the loss is {entry['train_loss']} at step {step + 1}: lower lr and start "
                    "again"
                )
            if (step + 1) % 250 == 0 or step + 1 == steps:
                entry["heldout_loss"] = heldout_loss(model, heldout)
                progress.set_postfix(
                    heldout=f"{entry['heldout_loss']:.3f}", train=f"{entry['train_loss']:.3f}"
                )
            log.append(entry)
            recent = []
            if time.monotonic() - saved_at > checkpoint_seconds:
                save(step + 1)
                saved_at = time.monotonic()
    save(steps)
    staging = work / "staging"
    model.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    for file in staging.iterdir():  # a model half written would look whole
        with writing(out / file.name) as temporary:
            shutil.copyfile(file, temporary)
    shutil.rmtree(staging)
    write_text(out / "training.csv", pd.DataFrame(log).to_csv(index=False, float_format="%.5g"))
    made = {
        "config": dataclasses.asdict(config),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        **read_json(folder / "done"),
    }
    write_json(out / "training.json", made)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m companion.subject.train_lm", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=SUBJECT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    for field in dataclasses.fields(LMConfig):
        kind = type(field.default)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=kind,
            default=field.default,
            help="default: %(default)s",
        )
    given = vars(parser.parse_args())
    out, device = given.pop("out"), given.pop("device")
    print(f"wrote {train_lm(LMConfig(**given), out, device)}")


if __name__ == "__main__":
    main()
