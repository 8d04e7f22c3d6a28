"""`minisft evaluate FOLDER --data FILE`: what a model makes of a data set, by kind of token and by source.

FOLDER is what `minisft generate` takes: a run's output folder, or any model folder, the base model too. The rows are read as in
training; for a run with its own data settings. Every number is a mean over exactly the tokens it names, so it is the same
whatever the batch size and the packing.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.config.command_line import parse_arguments, take_options, whole_number
from minisft.config.load import RESOLVED_NAME, load
from minisft.errors import UserError
from minisft.files import checked_path
from minisft.strict_json import spelled
from minisft.units import digits

if TYPE_CHECKING:
    from minisft.config.sections import Config

USAGE = """\
usage: minisft evaluate FOLDER --data FILE [--data FILE ...] [--json] [--KEY VALUE ...]
       minisft evaluate FOLDER --tasks TASK,TASK [--limit N] [--num_fewshot N] [--json]

Loss, perplexity, accuracy and entropy of a data set, by kind of token and by source, as means over exactly the tokens that are
named. probability is the mean of p(target): for the terminator it says how surely answers end.

  --data FILE   rows in any format that trains; may be repeated
  --json        print only the numbers, as JSON

  --tasks NAMES run lm-evaluation-harness instead (pip install 'minisft[lm-eval]'), for example hellaswag,arc_easy; with
                --limit N (rows of each task), --num_fewshot N, --batch_size N (8), --apply_chat_template, --include_path FOLDER
                (tasks of your own, as YAML)

FOLDER is a run's output folder or a model folder. Other options are keys of the configuration, as for `minisft train`: those of
[data] and [audit], such as --max_length 2048, and --precision, --device, --per_device_train_batch_size and --chat_template. In
preference rows the chosen answer is evaluated.
"""
OF_TASKS = {"limit": 1, "num_fewshot": 0, "batch_size": 1}  # numbers that the harness reads, at least this
READ = ("train.per_device_train_batch_size", "train.precision", "train.device", "train.seed", "model.chat_template")
READ += ("model.local_files_only", "data.", "audit.")
OF_RUN = ("data.eval_data", "data.eval_fraction", "data.stream")  # what has no meaning for the rows that are given
COLUMNS = ("tokens", "loss", "perplexity", "accuracy", "entropy", "probability")


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    options, rest = take_options(argv, ("data", "tasks", *OF_TASKS, "include_path"), ("json", "apply_chat_template"))
    name, overrides = parse_arguments(rest)
    if name is None or ("data" in options) == ("tasks" in options):
        hint = "minisft evaluate FOLDER --data FILE"
        raise UserError("command line: a folder and either --data FILE or --tasks NAMES are needed", hint=hint)
    folder = Path(checked_path(name, "the folder"))
    if "tasks" in options:
        return _run_tasks(folder, options, overrides)
    if unread := options.keys() - {"data", "json"}:
        raise UserError(f"--{sorted(unread)[0]} is of the tasks of --tasks", hint="leave it out beside --data")
    with tempfile.TemporaryDirectory() as temporary:
        lines, parts = _evaluate(configuration(folder, options["data"], overrides, temporary), folder)
    if "json" in options:
        print(json.dumps(spelled(parts), indent=2, allow_nan=False, ensure_ascii=False))
        return 0
    from minisft.console import wrap

    print("\n".join([wrap(lines), "", *table(parts)]))
    return 0


def _run_tasks(folder: Path, options: dict, overrides: dict) -> int:
    """The tasks of lm-evaluation-harness."""
    from minisft import runtime
    from minisft.harness import run_tasks
    from minisft.harness import table as task_table

    device = {name.rpartition(".")[2]: value for name, value in overrides.items()}
    if unread := device.keys() - {"device"}:
        hint = "give it with --data; the harness has options of its own"
        raise UserError(f"--{sorted(unread)[0]} is not read beside --tasks", hint=hint)
    if device.get("device", "auto") not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device['device']}: expected auto, cpu or cuda")
    found = run_tasks(
        folder,
        [task.strip() for names in options["tasks"] for task in names.split(",") if task.strip()],
        device=str(runtime.pick_device(device.get("device", "auto"))),
        apply_chat_template="apply_chat_template" in options,
        include_path=options.get("include_path", [None])[-1],
        **{key: whole_number(key, options[key][-1], least) for key, least in OF_TASKS.items() if key in options},
    )
    print(
        json.dumps(spelled(found), indent=2, ensure_ascii=False) if "json" in options else "\n".join(task_table(found))
    )
    return 0


def configuration(folder: Path, data: list[str], overrides: dict, temporary: str) -> "Config":
    """That of the run whose folder, model or checkpoint this is; else the default one with what the model says of its training.
    These rows are its training data. The token cache is not kept: the folder of the run may be read-only."""
    from minisft.answers import trained_as

    here = folder.absolute()
    places = [here, here.parent, *([here.parents[1]] if here.parent.name == "checkpoints" else [])]
    run = next((place for place in places if (place / RESOLVED_NAME).exists()), None)
    values = {"data.train_data": data, "data.cache_dir": temporary}
    if run is None:
        values |= {"model.model_name_or_path": str(folder), "output_dir": temporary}
        trained = trained_as(folder)
        values |= {f"data.{key}": trained[key] for key in ("max_length", "control_tokens") if key in trained}
    config, origins = load(run / RESOLVED_NAME if run else {}, {**values, **overrides}, origin="command line")
    given = {key for key, origin in origins.items() if origin == "command line"} - values.keys()
    if unread := sorted(key for key in given if not key.startswith(READ) or key in OF_RUN):
        hint = f"it reads {', '.join(READ[:-2])} and the keys of [data] and [audit]; the model stays as it is stored"
        raise UserError(f"{unread[0]} on the command line: evaluate does not read it", hint=hint)
    if "model.chat_template" not in given:  # the folder has the run's
        config = replace(config, model=replace(config.model, chat_template=None))
    # All of these rows and no others, and of a pair the chosen answer, whatever the run was. Its own are left in until here, as
    # other keys of it may need evaluation data.
    rows = replace(config.data, eval_data=None, eval_fraction=0.0, stream=False)
    if rows.eval_packing is not None and ("data.packing" not in given or "data.eval_packing" in given):
        rows = replace(rows, packing=rows.eval_packing)  # as the run was evaluated
    return replace(config, trainer_type="sft", verbose=False, data=rows)


def _evaluate(config: "Config", folder: Path) -> tuple[list[str], dict[str, dict[str, float]]]:
    """(lines about the data, the scores by part)"""
    from minisft import runtime
    from minisft.answers import open_model
    from minisft.evaluation import scores
    from minisft.prepare.data import prepare_data

    device = runtime.pick_device(config.train.device)
    answerer = open_model(folder, chat_template=config.model.chat_template)
    loader, _, lines = prepare_data(config, answerer.tokenizer, title="data")
    lines = [line for line in lines if str(config.data.cache_dir) not in line]  # which is gone at the end
    if sys.stderr.isatty():
        print(f"{loader.steps_per_epoch:,} batches ...", file=sys.stderr)
    found = scores(
        answerer.model,
        replace(loader, shuffle=False, accumulation=1),
        device,
        runtime.pick_precision(config.train, device),
    )
    return lines, found


def table(parts: dict[str, dict[str, float]]) -> list[str]:
    """The scores for people, a part a line."""
    from minisft.console import aligned

    rows = [("", *COLUMNS)]
    for name, means in parts.items():
        cells = (f"{means[key]:,}" if key == "tokens" else digits(means[key], 4) for key in COLUMNS)
        rows.append((name if len(name) <= 32 else f"...{name[-29:]}", *cells))
    return aligned(rows, left=1)
