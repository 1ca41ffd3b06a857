"""A training that trains nothing is stopped: its adapter stays what it was, whatever the loss says."""

from accelerate import Accelerator
from transformers import TrainerCallback

from kdguard.errors import KdguardError


class AdapterMoves(TrainerCallback):
    """Stops a run in which nothing trains: LoRA's B starts at zero and must have left it once the rate was above 0."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.checked = False
        self.rate = 0.0
        self.steps = 0  # not of the whole run, where it was gone on with

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        if self.rate > 0 and not self.checked and not self.accelerator.optimizer_step_was_skipped:
            self.checked = True
            still = [
                name
                for name, weight in model.named_parameters()
                if weight.requires_grad
                and "lora_B" in name
                and "expert" not in name
                and not weight.any()  # an expert may wait for its tokens
            ]
            if still:
                raise KdguardError(
                    f"{len(still)} adapter weights did not move in the first step, {still[0]} among them",
                    "this model's layers pass no gradient to them; please report it with the model's name",
                )

    def on_train_end(self, args, state, control, **kwargs):
        if self.steps == state.max_steps and not self.checked:
            why = "their gradients were infinite in fp16" if self.rate else "their learning rate was 0"
            raise KdguardError(
                f"the adapter did not move in any of {self.steps:,} steps, for {why}",
                f"a lower learning rate: --lr {args.learning_rate / 4:g}" if self.rate else "more --epochs",
            )
