"""The ladder that training goes down when memory runs out: every rung costs time, and the last one tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kdguard.guard.loss import LOGITS

CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout to repeat
SHORTEST = 16  # tokens that a row is cut to, at least


@dataclass
class Lean:
    """With how little memory training gets by. A rung that was taken is kept for the rest of the run.

    logits: of the loss's products at once. tokens: through the model at once, padding included, or a single row;
    None is a whole micro-batch. checkpointing: keep one hidden state a layer, and compute the rest again in backward.
    offload: keep those in the computer's memory and not the GPU's. longest: tokens of a row; a longer one loses its
    beginning. done: the rungs that were taken, in words.
    """

    logits: int = LOGITS
    tokens: int | None = None
    checkpointing: bool = False
    offload: bool = False
    longest: int | None = None
    done: list[str] = field(default_factory=list)

    def step_down(
        self, rows: Sequence[int], tokens: int, vocabulary: int, *, can_checkpoint: bool = True, shorten: bool = False
    ) -> str | None:
        """Take the next rung that helps where memory ran out, and say which; None where there is none left.

        rows: the lengths of those that were in the model. tokens: theirs, with their padding. can_checkpoint: whether
        the model can. shorten: whether rows may be cut.
        """
        if self.logits == LOGITS and tokens * vocabulary > LOGITS // 4:
            self.logits //= 4
            said = "the loss in chunks of a quarter"
        elif len(rows) > 1:
            self.tokens = tokens // 2
            said = f"at most {self.tokens:,} tokens at once, or one row"
        elif can_checkpoint and not self.checkpointing:
            self.checkpointing = True
            said = "activation checkpointing"
        elif can_checkpoint and not self.offload:
            self.offload = True
            said = "activation checkpoints in the computer's memory"
        elif shorten and max(rows) > SHORTEST:
            self.longest = max(SHORTEST, max(rows) * 3 // 4)
            said = f"rows cut to their last {self.longest:,} tokens"
        else:
            return None
        self.done.append(said)
        return said
