"""The embedded model `demo`: small enough to travel in the wheel, real enough to forget."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
