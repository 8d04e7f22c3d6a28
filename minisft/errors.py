"""The one way to report a user's mistake.

A `UserError` says what is wrong, with the values, and what to do next. The commands print it as two lines and exit with
its code; nobody sees a traceback for a mistake of their own. Internal invariants use `assert`.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS, ESTALE

CONFIG = 2  # the configuration or the command line
DATA = 65  # a data file or a row
MODEL = 66  # model or tokenizer files
SAVE = 74  # the disk: checkpoints could not be written, or a file not be read
STOPPED = 75  # stopped by a signal after saving; the same command resumes
NONFINITE = 76  # a loss or gradient that is not finite

DISK = (ENOSPC, EDQUOT, EFBIG, EACCES, EPERM, EROFS, EIO, ESTALE)  # an OSError of the disk, not of the program


class UserError(ValueError):
    """A mistake that the user can correct.

    message: what is wrong, with the values. hint: what to do next. exit_code: one of the constants above.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int = CONFIG):
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


def warn(message: str) -> None:
    """Print a warning on stderr. Where stderr is a file on a full disk, the run goes on without it."""
    with suppress(OSError):
        print(f"minisft: WARNING {message}", file=sys.stderr)


def run_command(command: Callable[[], int]) -> int:
    """Call a command and return its exit code. For a user's mistake, a full disk or a file that may not be read or written
    it prints two lines on stderr, not a traceback."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refuse(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output has ended, as in `... --help | head`
        return 141
    except OSError as error:
        if error.errno not in DISK:
            raise
        hint = "check the disk, its free space and its permissions, then run the same command again"
        return _refuse(f"{error.filename or 'disk'}: {error.strerror}\n  {hint}", SAVE)
    except KeyboardInterrupt:
        print("minisft: interrupted", file=sys.stderr)
        return 130
    finally:
        _drop_what_cannot_be_written()


def _refuse(message: str, exit_code: int) -> int:
    with suppress(OSError):  # stderr may be a file on the same full disk
        print(f"minisft: error: {message}", file=sys.stderr)
    return exit_code


def _drop_what_cannot_be_written() -> None:
    """Else Python flushes stdout and stderr once more when it ends, complains, and replaces the exit code by 120."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w"))
