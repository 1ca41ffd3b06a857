"""A script with transformers' Trainer, and the guard in it: GuardedTrainer in place of Trainer, and rehearsal rows."""

import json
import tempfile
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, TrainingArguments, set_seed

from kdguard import Guard, GuardedTrainer, Probe, answer, load_base, load_probes, rehearse

FACTS = [json.loads(line) for line in (Path(__file__).parent / "new_facts.jsonl").read_text().splitlines()[:40]]


def tokenise(fact: dict[str, str]) -> dict[str, list[int]]:
    """The answer and its end of turn are targets; what stands before them is the prompt."""
    turns = [{"role": "user", "content": fact["question"]}, {"role": "assistant", "content": fact["answer"]}]
    ids = tokenizer.apply_chat_template(turns)["input_ids"]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt, "this chat template renders a prompt that is no prefix of the whole"
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def tune(weight: float) -> None:
    set_seed(0)
    lora = LoraConfig(r=64, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GuardedTrainer(
            model,
            TrainingArguments(
                output_dir=folder,
                num_train_epochs=10,
                per_device_train_batch_size=8,
                learning_rate=4e-3,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=[tokenise(fact) for fact in FACTS],
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            guard=Guard(weight),
            rehearsal_dataset=rehearsal,
            rehearsal=1.0 if weight else 0.0,
        )
        trainer.train()
    learned, kept = (sum(each.correct for each in answer(model, tokenizer, asked)) for asked in (new, known))
    print(f"guard weight {weight:g}: {learned} of {len(new)} facts learned, {kept} of {len(known)} old ones kept")
    model.unload()


new = [Probe(str(i), "new", fact["question"], (fact["answer"],)) for i, fact in enumerate(FACTS)]
loaded = load_base("demo")  # or a model and a tokenizer of your own
base, tokenizer = loaded.model, loaded.tokenizer
probes = load_probes(["world"])[::10]
known = [probe for probe, said in zip(probes, answer(base, tokenizer, probes), strict=True) if said.correct]
rehearsal = rehearse(base, tokenizer, 400)
tune(weight=0.0)
tune(weight=12.0)
