"""The one way to report a user's mistake.

A `UserError` says what is wrong, with the values, and what to do next. The commands print it as two lines and exit with
its code; nobody sees a traceback for a mistake of their own. Internal invariants use `assert`.
"""

import os
import sys
from collections.abc import Callable
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS

CONFIG = 2  # the configuration or the command line
DATA = 65  # a data file or a row
MODEL = 66  # model or tokenizer files
SAVE = 74  # checkpoints could not be written
STOPPED = 75  # stopped by a signal after saving; the same command resumes
NONFINITE = 76  # a loss or gradient that is not finite


class UserError(ValueError):
    """A mistake that the user can correct.

    message: what is wrong, with the values. hint: what to do next. exit_code: one of the constants above.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int = CONFIG):
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


def run_command(command: Callable[[], int]) -> int:
    """Call a command and return its exit code. For a user's mistake, a full disk or a file that may not be read or written
    it prints two lines on stderr, not a traceback."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"minisft: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has ended, as in `... --help | head`
        sys.stdout = open(os.devnull, "w")  # else Python complains once more when it flushes at the end
        return 141
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT, EFBIG, EACCES, EPERM, EROFS):
            raise
        print(f"minisft: error: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
        print("  check its free space and permissions, then run the same command again", file=sys.stderr)
        return SAVE
    except KeyboardInterrupt:
        print("minisft: interrupted", file=sys.stderr)
        return 130
