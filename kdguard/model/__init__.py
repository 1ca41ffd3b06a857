"""Loading: a 4-bit base, LoRA on it, and the base seen through it."""
