"""`minisft COMMAND ...` = `python -m minisft COMMAND ...`. Only the module of that command is imported."""

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches

from minisft import __version__
from minisft.errors import UserError, run_command
from minisft.signals import StopSignal

COMMANDS = {  # name: (module with main(argv) -> exit code, what it does)
    "train": ("minisft.train", "fine-tune a model: train CONFIG.toml"),
    "init": ("minisft.commands.init", "write a configuration: asks, or reads another trainer's file"),
    "audit": ("minisft.commands.audit", "check a data set: what is trained in it and what is wrong"),
    "plan": ("minisft.commands.plan", "steps, memory, time and cost of a run before it starts, and what makes it fit"),
    "evaluate": ("minisft.commands.evaluate", "loss and accuracy of a data set, by kind of token and source"),
    "report": ("minisft.commands.report", "one page about one run, or about what differs between several"),
    "export": (
        "minisft.commands.export",
        "write a model where others run it: a copy, merged, as GGUF, or of a checkpoint",
    ),
    "verify-resume": (
        "minisft.commands.verify_resume",
        "prove that a resumed run is the same run, on your configuration",
    ),
    "selfcheck": ("minisft.commands.selfcheck", "check the equalities of this engine on your model, data and machine"),
    "diff": ("minisft.commands.diff", "where the losses of two runs part, and everything that differs between them"),
    "explain": ("minisft.commands.explain", "what a key of the configuration means, and where its value comes from"),
    "ledger": ("minisft.commands.ledger", "rows that a run found hard, forgot, or one row over all steps"),
    "chat": ("minisft.commands.chat", "talk to a trained model"),
    "generate": ("minisft.commands.generate", "answer prompts with a trained model"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help", ""):
        print(_usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"minisft {__version__}")
        return 0
    with StopSignal(is_command=True):
        return _command(name)(rest)


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name}", hint=hint)
    return importlib.import_module(COMMANDS[name][0]).main


def _usage() -> str:
    lines = ["usage: python -m minisft COMMAND ...", ""]
    lines += [f"  {name:<15}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([*lines, "", "COMMAND --help lists its options."])


if __name__ == "__main__":
    sys.exit(main())
