"""How the program starts and how it ends: whatever a person can mend is one line and its remedy."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kdguard.cli import INTERRUPTED, app, fail
from kdguard.errors import KdguardError
from kdguard.processes import first_to_fail


class _Output(io.TextIOWrapper):
    """Falls silent once nobody can read it: a pipe or a terminal that was closed ends no training.

    Its buffer is another stream's too, which closes it.
    """

    def write(self, text: str) -> int:
        with self._until_closed():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._until_closed():
            super().flush()

    def close(self) -> None:
        self.flush()

    @contextmanager
    def _until_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def main() -> None:
    """The console script. Only our own faults are tracebacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # a model may say what a console in cp1252 cannot show
            by_line, at_once = stream.line_buffering, stream.write_through
            setattr(sys, name, _Output(stream.buffer, stream.encoding, "replace", None, by_line, at_once))
    try:
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort) as stop:
        signal = (stop.__cause__ or stop).args  # the parser wraps what a command raises
        code = 128 + signal[0] if signal else INTERRUPTED
    except KdguardError as error:
        code = fail(error.exit_code, error.message, error.hint)
    except OSError as error:
        code = fail(
            1, f"{error.filename or 'a file'}: {error.strerror or error}", "free some space or mend its permissions"
        )
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help was the answer
            code = 2
        elif hasattr(error, "format_message"):  # the parser's own errors
            command = " ".join(sys.argv[1:2]) if sys.argv[1:2] and not sys.argv[1].startswith("-") else ""
            code = fail(2, error.format_message(), f"kdguard {command} --help".replace("  ", " "))
        elif type(error).__name__ == "OutOfMemoryError":
            code = fail(
                1,
                "the GPU ran out of memory",
                "close what else uses it; a smaller --rank, --max-length or model: kdguard presets",
            )
        elif first_to_fail():
            raise
        else:
            code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
