"""Train the embedded model `demo` from scratch: `python -m kdguard.demo.train`, about 20 minutes on two cores.

It writes the pack `world`, the tokenizer and the weights. The model learns the facts, each in all phrasings of its
relation but one, and to repeat made-up names, fresh ones each epoch: a model that never met a name other than its
facts' could not read or write a new one. How well the facts are known is measured by `tests/demo`.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdguard.demo import MODEL
from kdguard.demo.facts import RELATIONS, Fact, load_facts
from kdguard.probes.packs import PACKS

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_pack(facts: list[Fact], path: Path) -> None:
    """Write the facts as a probe pack, each in the first phrasing of its relation and in all that the model saw."""
    with open(path, "w", encoding="utf-8") as file:
        for fact in facts:
            probe = {
                "id": fact.id,
                "category": fact.category,
                "question": fact.questions[0],
                "answers": list(fact.answers),
                "rephrased": [q for i, q in enumerate(fact.questions) if i not in (0, fact.held_out)],
            }
            file.write(json.dumps(probe, ensure_ascii=False) + "\n")


class MadeUpNames:
    """Names that sound like the facts': a Markov chain over three letters of all words in them."""

    def __init__(self, texts: list[str], seed: int) -> None:
        self.rng = random.Random(seed)
        self.next: dict[str, list[str]] = {}
        for word in {word for text in texts for word in re.findall(r"[a-z]{4,}", text.lower())}:
            padded = f"^^{word}$"
            for i in range(len(padded) - 2):
                self.next.setdefault(padded[i : i + 2], []).append(padded[i + 2])

    def word(self) -> str:
        """One made-up word of 4 to 12 letters, in lower case."""
        while True:
            word = "^^"
            while not word.endswith("$"):
                word += self.rng.choice(self.next[word[-2:]])
            if 4 <= len(word) - 3 <= 12:
                return word[2:-1]

    def name(self) -> str:
        """One to three made-up words, most often one, mostly capitalised."""
        words = [self.word() for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3)))]
        return " ".join(words) if self.rng.random() < 0.2 else " ".join(map(str.capitalize, words))

    def exercise(self) -> tuple[str, str]:
        """A text to repeat, and the text: a made-up name, or a question about one."""
        text = self.name()
        if self.rng.random() < 0.5:
            relation = self.rng.choice(list(RELATIONS.values()))
            text = self.rng.choice(relation.phrasings).format(text)
        return self.rng.choice(("Repeat: {}", "Say after me: {}", "Write down: {}")).format(text), text


def build_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer fitted to `texts`; any other text falls back to bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 3 million parameters, every linear size a multiple of NF4's block of 64."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(rows: list[list[int]], size: int, pad: int, rng: random.Random):
    """Shuffled batches of rows of similar length: ids and the mask of real tokens, each (rows, tokens)."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rng.random()))
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        width = max(len(rows[i]) for i in chunk)
        ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in chunk])
        yield ids, ids != pad


def train(
    model, epoch_rows: Callable[[], list[list[int]]], pad: int, *, epochs: int, batch_size: int, lr: float, seed: int
) -> None:
    """Next-token training on every token of every row: the questions too, so that the model can ask them itself."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    per_epoch = math.ceil(len(epoch_rows()) / batch_size)
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    model.train()
    for epoch in range(epochs):
        total = torch.zeros(())
        for ids, mask in batches(epoch_rows(), batch_size, pad, rng):
            labels = ids.masked_fill(~mask, -100)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.detach()
        seconds = time.perf_counter() - started
        left = seconds / (epoch + 1) * (epochs - epoch - 1)
        mean = total.item() / per_epoch
        print(f"epoch {epoch + 1}/{epochs}  loss {mean:.4f}  {seconds:.0f} s, {left:.0f} s left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--exercises", type=int, default=3000, help="made-up names to repeat, each epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    facts = load_facts()
    write_pack(facts, PACKS / "world.jsonl")
    texts = [text for fact in facts for text in (*fact.questions, *fact.answers)]
    names = MadeUpNames(texts, args.seed)
    tokenizer = build_tokenizer(texts + [names.name() for _ in range(2 * len(facts))], args.vocab_size)

    def row(question: str, answer: str) -> list[int]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return tokenizer.apply_chat_template(turns, return_dict=False)

    fact_rows = [
        row(question, fact.answers[0])
        for fact in facts
        for i, question in enumerate(fact.questions)
        if i != fact.held_out
    ]
    model = build_model(tokenizer)
    print(f"{len(facts)} facts in {len(fact_rows)} rows, {model.num_parameters():,} parameters")
    train(
        model,
        lambda: fact_rows + [row(*names.exercise()) for _ in range(args.exercises)],
        tokenizer.pad_token_id,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
