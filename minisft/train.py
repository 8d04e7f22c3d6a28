"""The command `python -m minisft.train config.toml`, and `run` for notebooks:

    from minisft import run
    result = run("config.toml", learning_rate=1e-4, packing=True)

A file with `stages` is several runs, one after the other (config/stages.py). Every mistake that can be found
without torch is reported before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.config.command_line import USAGE, help_text, parse_arguments
from minisft.config.stages import Stage, load_stages
from minisft.errors import STOPPED, reports_in, run_command
from minisft.heap import start_without_caches
from minisft.signals import BEFORE_STEPS, StopSignal

if TYPE_CHECKING:
    from minisft.finish import Result


def run(source: str | Path | dict[str, Any], /, **overrides: Any) -> Result:
    """Train as a configuration file, or a dict shaped like one, says; of a list of stages, the result of the last one.

    overrides: keys by their last part (learning_rate=1e-4), or in full with **{"train.learning_rate": 1e-4}.
    Raises UserError for a mistake in the configuration, the data or the model, and Stopped, a KeyboardInterrupt, where a signal
    comes before the first step. A later signal saves and returns, with exit code 75.
    """
    with StopSignal(BEFORE_STEPS, STOPPED) as signal:
        return _run(load_stages(source, overrides, origin="run()"), signal)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 130 interrupted, and those of errors.py."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(USAGE + "       --help lists every key", file=sys.stderr)
        return 2
    return run_command(lambda: _command(argv))


def _command(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    start_without_caches()
    with StopSignal(BEFORE_STEPS, STOPPED, is_command=True) as signal:
        return _run(load_stages(*parse_arguments(argv)), signal).exit_code


def _run(stages: list[Stage], signal: StopSignal) -> Result:
    from minisft.prepare.look import look, look_for_run

    look(stages)
    for stage in stages:
        look_for_run(stage)
    # OpenMP threads spin while they wait for each other. If another program takes one thread's core, all others spin for it:
    # training on 2 busy cores fell to a thirtieth of its speed. After 20,000 turns they now sleep instead.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # On a GPU, memory that is reserved in pieces of fixed size is lost where the sizes of a run's tensors change.
    if sys.platform == "linux" and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if stages[0].title:
        from minisft.run_stages import run_stages

        return run_stages(stages, signal)
    from minisft import loop

    with reports_in(stages[0].config.output_dir):
        return loop.run(stages[0].config, stages[0].origins, signal)


if __name__ == "__main__":
    sys.exit(main())
