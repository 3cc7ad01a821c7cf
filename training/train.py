"""Train the tiny demonstration model on one GPU and write it in Hugging Face format.

    python -m training.data shards DATA &  # packed token shards, made while training runs
    python -m training.train DATA --minutes 18 --out model

The architecture is that of mlx-lm's (and transformers') `qwen2`.  Rows of 16384 tokens hold
many documents; FlexAttention keeps each document to itself, so one compiled graph serves both
phases: short documents first, then needles and documents of up to 12k tokens.  The schedule
follows the clock, so that training fits a fixed time whatever the speed of the GPU.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from training import chat, data
from training.network import CONFIG, Qwen2, losses_and_hits, token_losses
from training.optimizer import Muon, learning_rate

BLOCK = 128  # FlexAttention's block of queries or keys


# --- data -------------------------------------------------------------------------------------------


def shards(folder, progress, phases):
    """Rows of the phase that `progress()` has reached, waiting for shards still being written."""
    index = dict.fromkeys(phases, 0)
    while True:
        phase = [name for name, start in phases.items() if progress() >= start][-1]
        path = folder / "shards" / f"{phase}-{index[phase]:05d}.npz"
        if not path.exists():
            if index[phase] and (path.parent / "done").exists():
                index[phase] = 0  # all shards used: start over
            else:
                time.sleep(0.2)
            continue
        index[phase] += 1
        yield np.load(path)


def batches(folder, rows, progress, phases):
    for shard in shards(folder, progress, phases):
        arrays = shard["ids"], shard["weights"], shard["segments"]
        for start in range(0, len(arrays[0]) - rows + 1, rows):
            yield [a[start : start + rows] for a in arrays]


def to_device(batch, device):
    """(ids, targets, weights of the targets, mask)"""
    ids, weights, segments = (torch.from_numpy(a.astype(np.int32)).to(device, non_blocking=True) for a in batch)
    ids = ids.long()
    targets = ids.roll(-1, 1)
    weights = weights.roll(-1, 1).float()
    weights[:, -1] = 0
    return ids, targets, weights, document_mask(segments)


def document_mask(segments):
    """Causal attention within each document of a row."""
    _, length = segments.shape

    def visible(b, h, q, k):
        return (q >= k) & (segments[b, q] == segments[b, k])

    if segments.device.type == "cpu":
        at = torch.arange(length)
        return ((at[:, None] >= at) & (segments[:, :, None] == segments[:, None, :]))[:, None]
    # Which blocks of queries and keys meet, from the segments (rising numbers) at block edges.
    first, last = segments[:, ::BLOCK], segments[:, BLOCK - 1 :: BLOCK]
    at = torch.arange(first.shape[1], device=segments.device)
    before = at[:, None] > at
    meet = (before | (at[:, None] == at)) & (last[:, None, :] >= first[:, :, None])
    full = meet & before & (first[:, None, :] == last[:, :, None])
    blocks = [x for dense in (meet & ~full, full) for x in ordered(dense[:, None])]
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length))


def ordered(dense):
    """The number of blocks set in each row and their indices, set ones first."""
    return dense.sum(-1, dtype=torch.int32), dense.int().argsort(dim=-1, descending=True, stable=True).int()


# --- held-out measurements ---------------------------------------------------------------------------


def read_lines(path):
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def held_out_rows(folder, prompts, texts, length, rows):
    """Held-out prompts with their answers, and texts, packed like training rows.

    Yields (batch, [(kind, row, start, end)]): tokens start..end-1 of that row are to be predicted.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = []
    for item in read_lines(prompts):
        prompt = tokenizer.encode(chat.prompt_text(item["messages"], item["tools"]), add_special_tokens=False).ids
        answer = tokenizer.encode(item["answer"] + chat.IM_END, add_special_tokens=False).ids
        documents.append((item["kind"], prompt + answer, len(prompt)))
    for item in read_lines(texts):
        documents.append(("text:" + item["source"], tokenizer.encode(item["text"]).ids, 1))
    documents = [d for d in documents if len(d[1]) <= length]
    packed = [[]]
    for document in sorted(documents, key=lambda d: -len(d[1])):
        row = next((r for r in packed if sum(len(d[1]) for d in r) + len(document[1]) <= length), None)
        if row is None:
            packed.append(row := [])
        row.append(document)
    for first in range(0, len(packed), rows):
        ids, spans = np.zeros((rows, length), np.uint16), []
        segments = np.full((rows, length), 65535, np.uint16)
        for r, row in enumerate(packed[first : first + rows]):
            at = 0
            for number, (kind, tokens, start) in enumerate(row):
                ids[r, at : at + len(tokens)] = tokens
                segments[r, at : at + len(tokens)] = number + 1
                spans.append((kind, r, at + start, at + len(tokens)))
                at += len(tokens)
        yield (ids, np.zeros_like(ids), segments), spans


@torch.no_grad()
def measure(measured, model, folder, held_out, length, rows, device):
    """Per kind: the share of prompts whose whole answer is the greedy one; perplexity of texts."""
    right, texts = {}, {}
    for batch, spans in held_out_rows(folder, held_out / "prompts.jsonl", held_out / "texts.jsonl", length, rows):
        ids, targets, _, mask = to_device(batch, device)
        losses, hits = (x.cpu() for x in measured(model, ids, targets, mask, device))
        for kind, row, start, end in spans:
            if kind.startswith("text:"):
                texts.setdefault(kind[5:], []).append(losses[row, start - 1 : end - 1])
            else:
                right.setdefault(kind, []).append(bool(hits[row, start - 1 : end - 1].all()))
    accuracy = {kind: round(sum(x) / len(x), 3) for kind, x in sorted(right.items())}
    perplexity = {source: round(math.exp(torch.cat(x).mean()), 2) for source, x in sorted(texts.items())}
    perplexity["all"] = round(math.exp(torch.cat([t for x in texts.values() for t in x]).mean()), 2)
    return {"accuracy": accuracy, "perplexity": perplexity}


# --- export -------------------------------------------------------------------------------------------


def export(model, folder, out, shard_bytes=15 * 2**20):
    """Hugging Face format: bf16 safetensors in small shards, config and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    groups, size = [{}], 0
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        if size + tensor.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    index = {"metadata": {"total_size": sum(t.nbytes for g in groups for t in g.values())}, "weight_map": {}}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, out / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(group, name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = {"eos_token_id": tokenizer.token_to_id(chat.IM_END), "pad_token_id": tokenizer.token_to_id(chat.END_OF_TEXT)}
    generation = {**ends, "do_sample": False}
    for name, content in {"model.safetensors.index.json": index, "config.json": CONFIG | ends,
                          "generation_config.json": generation}.items():  # fmt: skip
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())


# --- training -----------------------------------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("model"))
    parser.add_argument("--held-out", type=Path, default=Path("heldout"))
    parser.add_argument("--minutes", type=float, default=18.0)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=data.ROW, help="tokens of a row (less to try it on a CPU)")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--start", type=Path, help="folder with the weights to start from")
    parser.add_argument("--phases", default="short:0,long:0.5", help="phases of data.PHASES and where they begin")
    parser.add_argument("--decay-from", type=float, default=0.5, help="where the learning rate begins to fall")
    parser.add_argument("--measure-every", type=float, default=0.2, help="share of the time between measurements")
    parser.add_argument("--within", type=float, help="minutes from the start of the program, instead of --minutes")
    parser.add_argument("--report-every", type=int, default=50, help="steps between lines of the log")
    return parser.parse_args()


def main():
    args = arguments()
    launched = time.time()
    phases = {name: float(start) for name, start in (part.split(":") for part in args.phases.split(","))}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Qwen2().to(device)
    if args.start:
        weights = {name: t for file in args.start.glob("*.safetensors") for name, t in load_file(file).items()}
        model.load_state_dict(weights)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")
    compiled, measured = token_losses, losses_and_hits
    if device == "cuda":
        compiled = torch.compile(token_losses, dynamic=False)
        measured = torch.compile(losses_and_hits, dynamic=False)

    begun, paused, step, seen = None, 0.0, 0, 0
    progress = lambda: 0.0 if begun is None else (time.time() - begun - paused) / (60 * args.minutes)  # noqa: E731
    next_measure, average, last = args.measure_every, None, time.time()

    def report():
        figures = measure(measured, model, args.data, args.held_out, args.length, args.rows, device)
        print(json.dumps(figures), flush=True)
        return figures

    for batch in batches(args.data, args.rows, progress, phases):
        at = progress()
        if at >= 1:
            break
        ids, targets, weights, mask = to_device([a[:, : args.length] for a in batch], device)
        loss = (compiled(model, ids, targets, mask, device) * weights).sum() / weights.sum().clamp(min=1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(at, args.lr, args.decay_from)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        muon.step(lr)
        model.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        if step == 5 or (begun is None and device == "cpu"):  # compilation does not count
            if device == "cuda":
                torch.cuda.synchronize()
            begun, last, seen = time.time(), time.time(), 0
            if args.within:
                args.minutes = args.within - (begun - launched) / 60
        if step % args.report_every == 0:
            value = loss.item()
            average = value if average is None else 0.9 * average + 0.1 * value
            speed, last = args.report_every * ids.numel() / (time.time() - last), time.time()
            print(f"step {step:5d} {at:6.1%} {seen / 1e6:6.0f} M tokens  loss {value:.3f} average {average:.3f}  "
                  f"norm {norm.item():.2f}  lr {lr:.2e}  {speed / 1e3:.0f} k tokens/s", flush=True)  # fmt: skip
        if at >= next_measure and at < 0.97:
            start = time.time()
            report()
            export(model, args.data, args.out)
            paused += time.time() - start if next_measure == args.measure_every else 0  # compilation again
            next_measure += args.measure_every
            last = time.time()

    with torch.no_grad():  # measure the weights as they are written
        for p in model.parameters():
            p.copy_(p.bfloat16())
    export(model, args.data, args.out)
    if args.measure_every < 1:
        figures = report() | {"steps": step, "tokens": seen, "minutes": args.minutes}
        (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
