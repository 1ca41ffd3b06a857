"""A script with TRL's SFTTrainer, and the guard in it: TRL tokenises the rows, GuardedTrainer trains on them."""

import json
import tempfile
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from kdguard import Guard, GuardedTrainer, Probe, answer, load_base, rehearse

FACTS = [json.loads(line) for line in (Path(__file__).parent / "new_facts.jsonl").read_text().splitlines()[:40]]


class GuardedSFTTrainer(GuardedTrainer, SFTTrainer):
    """GuardedTrainer has the loss, the batches and the checkpoints; SFTTrainer the rest."""


set_seed(0)
loaded = load_base("demo")  # or a model and a tokenizer of your own
rehearsal = rehearse(loaded.model, loaded.tokenizer, 200)
with tempfile.TemporaryDirectory() as folder:
    trainer = GuardedSFTTrainer(
        loaded.model,
        SFTConfig(
            output_dir=folder,
            num_train_epochs=10,
            per_device_train_batch_size=8,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": fact["question"]}],
                    "completion": [{"role": "assistant", "content": fact["answer"]}],
                }
                for fact in FACTS
            ]
        ),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(r=64, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
        guard=Guard(weight=12.0),
        rehearsal_dataset=rehearsal,
        rehearsal=1.0,
    )
    trainer.train()
new = [Probe(str(i), "new", fact["question"], (fact["answer"],)) for i, fact in enumerate(FACTS)]
learned = sum(each.correct for each in answer(trainer.model, loaded.tokenizer, new))
print(f"{learned} of {len(new)} facts learned")
