"""The command `python -m minisft.train config.toml`, and `run` for notebooks:

    from minisft.train import run
    result = run("config.toml", learning_rate=1e-4, packing=True)

Everything that can be known to be wrong is told before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.command_line import USAGE, help_text, parse_arguments
from minisft.config import Config, eval_sets, source_list
from minisft.config_file import load
from minisft.errors import run_command

if TYPE_CHECKING:
    from minisft.loop import Result


def run(source: str | Path | dict[str, Any], /, **overrides: Any) -> Result:
    """Train as a configuration file, or a dict shaped like one, says.

    overrides: keys by their last part (learning_rate=1e-4), or in full with **{"train.learning_rate": 1e-4}.
    Raises UserError for a mistake in the configuration, the data or the model.
    """
    return _run(*load(source, overrides, origin="run()"))


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 configuration, 130 interrupted, and those of errors.py."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(USAGE + "       --help lists every key", file=sys.stderr)
        return 2
    return run_command(lambda: _command(argv))


def _command(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    return _run(*load(*parse_arguments(argv))).exit_code


def _run(config: Config, origins: dict[str, str]) -> Result:
    from minisft.data.sources import list_files, parse_source
    from minisft.hub import is_repository_name

    sources = source_list(config.data.train_data) + source_list(config.evaluate.generate_data)
    for source in sources + [s for entry in eval_sets(config.data.eval_data).values() for s in entry]:
        if not is_repository_name((parsed := parse_source(source)).path):
            list_files(parsed)  # a missing file is told now, before torch is imported

    # A thread of an OpenMP pool that waits for the others spins. Where another program takes its core, all of them spin for
    # it, and training on 2 busy cores fell to a thirtieth; after 20,000 turns they now sleep instead.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from minisft import loop

    return loop.run(config, origins)


if __name__ == "__main__":
    sys.exit(main())
