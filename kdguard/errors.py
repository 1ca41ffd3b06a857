"""What can go wrong, said in one line, and the next thing to type.

KdguardError             exit 1: the run failed
+-- InputError           exit 2: the input or a flag is wrong
+-- OutOfMemory          exit 1: memory ran out, and nothing that takes less of it was left to try
"""


class KdguardError(Exception):
    """`message` says what went wrong; `hint` is the next thing to do or type."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(KdguardError):
    """Something the person gave is wrong: a file, a row, a flag, a config key. Nothing was written."""

    exit_code = 2


class OutOfMemory(KdguardError):
    """Memory ran out, and so did the ways to take less of it."""
