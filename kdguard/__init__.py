"""kdguard: fine-tune a language model on your own data without making it forget what it knew."""

__version__ = "0.1.0"
