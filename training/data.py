"""Tokenizer, training shards and held-out prompts for the tiny demonstration model.

With M for training:

    python -m M.corpus --docs ... --stdlib ... --out DATA/corpus.jsonl.xz
    python -m M.data tokenizer DATA             # tokenizer files and the word list
    python -m M.data shards DATA --workers 14   # packed token shards, in the background of train
    python -m M.data heldout DATA --out heldout # prompts with expected answers
    python -m M.data check DATA                 # the chat template against chat.render
"""

import argparse
import json
import lzma
import multiprocessing
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training import chat, tasks

VOCABULARY = 8192
MAX_LENGTH = 16384
ROW, ROWS = 16384, 64  # one shard: 64 rows of 16384 tokens
CHARS_PER_TOKEN = 3.4  # a rough figure, to choose text sizes
# Share of all tokens, longest corpus chunk and needle text (tokens) of the training phases.
PHASES = {
    "short": {"shares": {"corpus": 0.38, "chat": 0.37, "needle": 0.25}, "chunk": 2048, "needle": 1800},
    "long": {"shares": {"corpus": 0.34, "chat": 0.22, "needle": 0.44}, "chunk": 6144, "needle": 12000},
    "final": {"shares": {"corpus": 0.36, "chat": 0.40, "needle": 0.24}, "chunk": 4096, "needle": 12000},
}
WEIGHT = {"corpus": 1, "chat": 2, "needle": 5}  # loss weight of a trained token
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Corpus:
    """Documents of one split, and the docstring facts."""

    def __init__(self, folder, split="train"):
        self.texts, self.facts, self.sources = [], [], []
        with lzma.open(Path(folder) / "corpus.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                item = json.loads(line)
                if item["split"] == "facts":
                    self.facts.append({key: item[key] for key in ("name", "kind", "text")})
                elif item["split"] == split:
                    self.texts.append(item["text"])
                    self.sources.append(item["source"])
        self.ends = np.cumsum([len(text) for text in self.texts])
        words = Path(folder) / "words.json"
        if words.exists():
            tasks.WORDS[:] = json.loads(words.read_text())

    def chunk(self, r, chars):
        """Part of a random document, from its start or from a line start; and whether it ends the document."""
        at = r.randrange(int(self.ends[-1]))
        i = int(np.searchsorted(self.ends, at, side="right"))
        text = self.texts[i]
        start = at - int(self.ends[i]) + len(text)
        start = 0 if r.random() < 0.1 or len(text) < chars else text.rfind("\n", 0, start) + 1
        return text[start : start + chars], start + chars >= len(text)

    def passage(self, m, chars):
        """At least about `chars` characters of documents, cut at line ends."""
        parts, size = [], 0
        while size < chars:
            text, _ = self.chunk(m.r, chars - size + 200)
            text = text[: text.rfind("\n") + 1].strip("\n")
            if text:
                parts.append(text)
                size += len(text) + 2
        return "\n\n".join(parts)


# --- tokenizer -------------------------------------------------------------------------------------


def train_tokenizer(folder):
    corpus = Corpus(folder)
    counts = Counter(word for text in corpus.texts for word in re.findall(r"(?<![\w.])[a-z]{4,9}(?![\w.(])", text))
    words = sorted(word for word, _ in counts.most_common(4000))
    (folder / "words.json").write_text(json.dumps(words))
    tasks.WORDS[:] = words

    def samples():
        r = random.Random(0)
        for text in r.sample(corpus.texts, len(corpus.texts)):
            yield text[:8000]
        for seed in range(15000):
            messages, tools, _ = short_task(tasks.Maker(seed, corpus=corpus))
            yield re.sub(r"<[^<>\n]+>", "", "".join(text for text, _ in chat.render(messages, tools)))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    added = len(chat.SPECIAL) + len(chat.TOOL_TAGS)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - added, show_progress=False, max_token_length=16,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(samples(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in chat.SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in chat.TOOL_TAGS])
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, "bos_token": None,
        "eos_token": chat.IM_END, "pad_token": chat.END_OF_TEXT, "unk_token": None,
        "clean_up_tokenization_spaces": False, "add_prefix_space": False, "chat_template": chat.CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


# --- samples ---------------------------------------------------------------------------------------


def short_task(m):
    makers, weights = zip(*tasks.SHORT_TASKS, strict=True)
    return m.r.choices(makers, weights)[0](m)


def needle_task(m, longest):
    """A retrieval task of log-uniform length up to `longest` tokens."""
    tokens = int(150 * (longest / 150) ** m.r.random())
    if m.chance(0.25):
        return tasks.lookup(m, int(min(tokens, 5000) * 2.0))
    return tasks.needles(m, int(tokens * CHARS_PER_TOKEN))


def encode_chat(tokenizer, messages, tools, weight):
    """Token ids and loss weights: only answers are trained."""
    ids, weights = [], []
    for text, is_answer in chat.render(messages, tools):
        part = tokenizer.encode(text, add_special_tokens=False).ids
        ids += part
        weights += [weight if is_answer else 0] * len(part)
    return ids, weights


class Samples:
    """An endless stream of packed rows in which each kind keeps its share of the tokens."""

    def __init__(self, folder, phase, seed):
        self.phase, self.corpus = PHASES[phase], Corpus(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.end = self.tokenizer.token_to_id(chat.END_OF_TEXT)
        self.maker = tasks.Maker(seed, corpus=self.corpus)
        self.used, self.pending = dict.fromkeys(self.phase["shares"], 0), None

    def text(self, tokens):
        chunk, ends = self.corpus.chunk(self.maker.r, int(tokens * 5))
        ids = self.tokenizer.encode(chunk, add_special_tokens=False).ids
        if ends and len(ids) < tokens:
            ids.append(self.end)
        return ids[:tokens], [WEIGHT["corpus"]] * min(len(ids), tokens)

    def draw(self):
        shares = self.phase["shares"]
        kind = min(shares, key=lambda k: self.used[k] / shares[k])
        if kind == "corpus":
            longest = self.phase["chunk"]
            sample = self.text(self.maker.r.randint(longest // 8, longest))
        elif kind == "chat":
            sample = encode_chat(self.tokenizer, *short_task(self.maker)[:2], WEIGHT["chat"])
        else:
            sample = encode_chat(self.tokenizer, *needle_task(self.maker, self.phase["needle"])[:2], WEIGHT["needle"])
        self.used[kind] += len(sample[0])
        return sample

    def row(self):
        """(ids, weights, segment numbers) of one full row; the end is filled with corpus text."""
        ids, weights, segments = [], [], []
        number = 0
        while len(ids) < ROW:
            sample = self.pending or self.draw()
            self.pending = None
            room = ROW - len(ids)
            if len(sample[0]) > ROW:
                continue
            if len(sample[0]) > room:
                self.pending, sample = sample, self.text(min(room, 2048))
            ids += sample[0]
            weights += [0, *sample[1][1:]]  # a segment's first token has nothing to be predicted from
            segments += [number] * len(sample[0])
            number += 1
        return ids, weights, segments


def write_shard(job):
    folder, phase, index = job
    path = folder / "shards" / f"{phase}-{index:05d}.npz"
    if path.exists():
        return
    samples = cached_samples(folder, phase)
    samples.maker.r.seed(f"{phase}-{index}")
    samples.pending = None
    ids, weights, segments = zip(*(samples.row() for _ in range(ROWS)), strict=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(temporary, ids=np.array(ids, np.uint16), weights=np.array(weights, np.uint8),
             segments=np.array(segments, np.uint16))  # fmt: skip
    temporary.rename(path)


CACHE = {}


def cached_samples(folder, phase):
    if phase not in CACHE:
        CACHE[phase] = Samples(folder, phase, 0)
    return CACHE[phase]


def write_shards(folder, workers, counts):
    (folder / "shards").mkdir(exist_ok=True)
    jobs = [(folder, phase, i) for phase, count in counts.items() for i in range(count)]
    with multiprocessing.Pool(workers) as pool:
        for _ in pool.imap_unordered(write_shard, jobs, chunksize=1):
            pass
    (folder / "shards" / "done").touch()


# --- held-out prompts ------------------------------------------------------------------------------

HELD_OUT = {  # kind: (task, number)
    "memory": (tasks.memory, 40), "tool_call": (tasks.tool_call, 60), "tool_result": (tasks.tool_result, 20),
    "json": (tasks.json_answer, 40), "arithmetic": (tasks.arithmetic, 30), "text": (tasks.text_operation, 40),
    "docstring": (tasks.docstring, 40), "grounded": (tasks.grounded, 20), "small_talk": (tasks.small_talk_no_data, 15),
}  # fmt: skip
HELD_OUT_NEEDLES = {512: 20, 1024: 40, 2048: 40, 4096: 36, 8192: 20}  # tokens: number


def held_out_items(folder, scale=1):
    """Prompts of unseen names, words, sums and texts: {"kind", "messages", "tools", "check"}."""
    corpus = Corpus(folder, "heldout")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for kind, (task, count) in HELD_OUT.items():
        for i in range(count * scale):
            m = tasks.Maker(f"heldout-{kind}-{i}", "heldout", corpus)
            messages, tools, check = task(m)
            yield finish(kind, messages, tools, check)
    for length, count in HELD_OUT_NEEDLES.items():
        for i in range(count * scale):
            m = tasks.Maker(f"heldout-needle-{length}-{i}", "heldout", corpus)
            chars = int(length * CHARS_PER_TOKEN)
            while True:  # shrink until the prompt fits the length
                m.r.seed(f"heldout-needle-{length}-{i}")
                messages, tools, check = tasks.needles(m, chars, m.pick([1, 2, 4]), 1, (i + 0.5) / (count * scale))
                size = len(tokenizer.encode(chat.prompt_text(messages[:-1], tools), add_special_tokens=False).ids)
                if size <= length:
                    break
                chars = int(chars * min(0.97, length / size))
            yield finish(f"needle-{length}", messages, tools, check)


def finish(kind, messages, tools, check):
    if check["kind"] == "tool":  # the prompt ends before the call
        last = max(i for i, x in enumerate(messages) if x.get("tool_calls"))
        messages = messages[: last + 1]
    return {"kind": kind, "messages": messages[:-1], "tools": tools, "check": check,
            "answer": messages[-1]["content"] or chat.tool_call_text(messages[-1]["tool_calls"])}  # fmt: skip


def write_held_out(folder, out, scale=1):
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "prompts.jsonl", "w", encoding="utf-8") as file:
        for item in held_out_items(folder, scale):
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
    corpus, r = Corpus(folder, "heldout"), random.Random(0)
    by_source = {}
    for source, text in zip(corpus.sources, corpus.texts, strict=True):
        by_source.setdefault(source, []).append(text)
    with open(out / "texts.jsonl", "w", encoding="utf-8") as file:
        for source, texts in sorted(by_source.items()):
            for text in r.sample(texts, min(3, len(texts))):
                file.write(json.dumps({"source": source, "text": text[:6000]}, ensure_ascii=False) + "\n")


def check(folder):
    """The chat template and chat.render must agree, and answers must tokenize on their own."""
    from transformers import AutoTokenizer

    tokenizer, corpus, trained = AutoTokenizer.from_pretrained(folder), Corpus(folder), Counter()
    for seed in range(3000):
        m = tasks.Maker(seed, "train" if seed % 2 else "heldout", corpus)
        messages, tools, _ = short_task(m) if seed % 3 else needle_task(m, 600)
        ours = "".join(text for text, _ in chat.render(messages, tools))
        theirs = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert ours == theirs, f"seed {seed}:\n{ours!r}\n{theirs!r}"
        ids, weights = encode_chat(tokenizer.backend_tokenizer, messages, tools, 1)
        assert ids == tokenizer.encode(ours, add_special_tokens=False), f"seed {seed}: tokens differ"
        trained["tokens"] += len(ids)
        trained["answers"] += sum(weights)
    print(f"template and tokens agree on 3000 conversations; {trained['answers'] / trained['tokens']:.1%} are answers")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tokenizer", "shards", "heldout", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--short", type=int, default=480, help="shards of the first phase")
    parser.add_argument("--long", type=int, default=480, help="shards of the second phase")
    parser.add_argument("--final", type=int, default=0, help="shards of the final phase")
    parser.add_argument("--out", type=Path, default=Path("heldout"))
    parser.add_argument("--scale", type=int, default=1, help="times as many held-out prompts")
    args = parser.parse_args()
    if args.command == "tokenizer":
        train_tokenizer(args.folder)
    elif args.command == "shards":
        write_shards(args.folder, args.workers, {phase: getattr(args, phase) for phase in PHASES})
    elif args.command == "heldout":
        write_held_out(args.folder, args.out, args.scale)
    else:
        check(args.folder)


if __name__ == "__main__":
    main()
