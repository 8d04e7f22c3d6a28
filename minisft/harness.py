"""lm-evaluation-harness on an exported model: `minisft evaluate FOLDER --tasks hellaswag,arc_easy`.

The library lm-eval (the extra `minisft[lm-eval]`) has the tasks and their scores, and runs the folder by transformers, as
everyone does whose numbers ours are compared with. Its tasks download their data sets.
"""

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from minisft.console import aligned
from minisft.errors import DATA, MODEL, UserError, shortened
from minisft.model.adapter_files import CONFIG_FILE, base_of, model_folder
from minisft.model.start import find_start


def run_tasks(
    folder: Path,
    tasks: list[str],
    *,
    device: str,
    dtype: str = "auto",
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    include_path: str | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: value}} as the harness names them ("acc,none", "acc_stderr,none").

    folder: a run's output, a model folder or an adapter. limit: rows of each task. include_path: a folder with more tasks, as
    YAML.
    Raises UserError without the library, for a folder that holds no model, and for a task that does not exist or fails.
    """
    folder = model_folder(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a GGUF file", hint="the harness runs model folders", exit_code=MODEL)
    evaluate, manager = _library()
    arguments: dict[str, Any] = {"pretrained": str(folder), "dtype": dtype, "trust_remote_code": False}
    if (folder / CONFIG_FILE).exists():
        arguments |= {"pretrained": str(find_start(folder).folder), "peft": str(folder), "tokenizer": str(folder)}
        if not (folder / "tokenizer.json").exists():
            arguments["tokenizer"] = base_of(folder)[0]
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr):  # the numbers alone are on stdout
            known = manager(include_path=include_path)
            if missing := [task for task in tasks if not known.match_tasks([task])]:
                raise UserError(
                    f"--tasks: the harness has no task {', '.join(missing)}",
                    hint="lm-eval ls tasks lists them; --include_path FOLDER adds your own",
                )
            found = evaluate(
                model="hf",
                model_args=arguments,
                tasks=tasks,
                device=device,
                batch_size=batch_size,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                task_manager=known,
                bootstrap_iters=1000,
                log_samples=False,
                verbosity=None,
            )
    except UserError:
        raise
    except Exception as error:  # a data set that cannot be had, a task that is broken: of the library's many kinds
        problem = (
            f"lm-evaluation-harness failed: {type(error).__name__}: {shortened(' '.join(str(error).split()), 300)}"
        )
        raise UserError(
            problem, hint="run it by itself to see more: lm-eval run --model hf ...", exit_code=DATA
        ) from error
    return {task: _numbers(values) for task, values in found["results"].items()}


def _library() -> tuple[Any, Any]:
    """(simple_evaluate, TaskManager)"""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        hint = "install it: pip install 'minisft[lm-eval]'"
        raise UserError(f"--tasks needs the library lm-eval ({error})", hint=hint, exit_code=MODEL) from None
    return simple_evaluate, TaskManager


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """The scores for people, a metric a line."""
    rows = [("task", "metric", "value", "stderr")]
    for task, values in found.items():
        for name, value in values.items():
            metric, _, how = name.partition(",")
            if metric.endswith("_stderr") or not how:
                continue
            error = values.get(f"{metric}_stderr,{how}")
            label = metric if how == "none" else f"{metric} ({how})"
            rows.append((task, label, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
    return aligned(rows, left=2)
