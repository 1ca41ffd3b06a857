"""The teacher's final hidden states, kept from a row's first visit: a frozen teacher never says anything else."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from kdguard.files import write_whole

STATES = "teacher-*.states"  # the files of all processes
_MARK = 16  # bytes at the file's beginning, by which a checkpoint knows it


class KeptStates:
    """Hidden states by row in one file, 2 bytes times the hidden size a token for a 16-bit model.

    Where the layers below the lowest adapter are shared, what they say is kept beside, and the file is twice as large.

    The system holds the file in memory while there is room and reads it from disk where there is not. When the disk
    has less than twice the space that all rows need, nothing is kept and the teacher stays live.

    path: the file. lengths: tokens of each row, by row id; a row that is not in it is never kept. of: a fingerprint of
    the rows and their teacher; states that were left by others are not read. room: bytes of the disk that are for the
    checkpoints.
    """

    def __init__(self, path: Path, lengths: Sequence[int], of: str, room: int = 0) -> None:
        self.path, self.of, self.room = path, of, room
        self.ends = torch.tensor([0, *(length - 1 for length in lengths)]).cumsum(0).tolist()
        self.have: set[int] = set()
        self.of_step: set[int] = set()  # those that came since the last optimiser step
        self.file: IO[bytes] | None = None  # its mark, and the positions of all rows one after another
        self.mark = ""
        self.hidden, self.dtype = 0, torch.float32
        self.live = False

    def save(self, checkpoint: Path) -> None:
        """Tell in a checkpoint which states there were after the last step: a run that goes on has the same ones."""
        index: dict[str, Any] = {"of": self.of, "live": self.live, "rows": sorted(self.have - self.of_step)}
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            index |= {"mark": self.mark, "hidden": self.hidden, "dtype": str(self.dtype).removeprefix("torch.")}
        write_whole(self._index(checkpoint), json.dumps(index))

    def resume(self, checkpoint: Path) -> None:
        """Go on with the states that there were at a checkpoint; without any, where they are gone or of another run."""
        index = self._index(checkpoint)
        if not index.exists():
            return
        found = json.loads(index.read_text(encoding="utf-8"))
        self.live = found["live"]  # an answer that is read is rounded in another batch than one that is computed
        if found["of"] != self.of or "mark" not in found or not self.path.exists():
            return
        self.hidden, self.dtype, self.mark = found["hidden"], getattr(torch, found["dtype"]), found["mark"]
        file = open(self.path, "r+b")  # noqa: SIM115
        if file.read(_MARK) == bytes.fromhex(self.mark) and self.path.stat().st_size >= self._place(-1):
            self.file, self.have = file, set(found["rows"])
        else:
            file.close()

    def states_of(
        self, rows: Sequence[int], compute: Callable[[list[int]], list[Tensor]], device: torch.device | str = "cpu"
    ) -> Tensor:
        """(positions, hidden) of the rows one after another, on `device`.

        compute: the places in `rows` of those that are not kept yet -> the hidden states of each, there.
        """
        missing = [place for place, row in enumerate(rows) if row not in self.have]
        found = dict(zip(missing, compute(missing), strict=True)) if missing else {}
        for place, hidden in found.items():
            self._keep(rows[place], hidden)
        return torch.cat(
            [found[place] if place in found else self._read(row).to(device) for place, row in enumerate(rows)]
        )

    def close(self, *, finished: bool) -> None:
        """Let go of the file. Unless the run has finished it stays, for a run that resumes goes on with it."""
        if self.file:
            self.file.close()
        self.file, self.have = None, set()
        if finished:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _index(self, checkpoint: Path) -> Path:
        return checkpoint / f"{self.path.stem}.json"

    def _read(self, row: int) -> Tensor:
        self.file.seek(self._place(row))
        kept = bytearray(self.file.read(self._place(row + 1) - self._place(row)))
        return torch.frombuffer(kept, dtype=self.dtype).view(-1, self.hidden)

    def _keep(self, row: int, hidden: Tensor) -> None:
        if self.file is None and not self.live:
            self.live = not self._make(hidden.shape[-1], hidden.dtype)
        if self.file and row + 1 < len(self.ends):
            self.file.seek(self._place(row))
            self.file.write(hidden.contiguous().cpu().view(torch.uint8).numpy())
            self.have.add(row)
            self.of_step.add(row)

    def _place(self, row: int) -> int:
        return _MARK + self.ends[row] * self.hidden * self.dtype.itemsize

    def _make(self, hidden: int, dtype: torch.dtype) -> bool:
        """Make the file; False where the disk has no room for it."""
        self.hidden, self.dtype, self.mark = hidden, dtype, secrets.token_hex(_MARK)
        size = self._place(-1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        if shutil.disk_usage(self.path.parent).free < size + max(size, self.room):
            return False
        file = open(self.path, "w+b")  # noqa: SIM115
        try:
            if hasattr(os, "posix_fallocate"):  # so that no write in the middle of a run finds the disk full
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
            file.write(bytes.fromhex(self.mark))
        except OSError:
            file.close()
            self.path.unlink()
            return False
        self.file = file
        return True
