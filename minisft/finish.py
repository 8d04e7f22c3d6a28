"""The end of a run: the model is exported, the held-out prompts are completed, and the last page says what there is."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from minisft import console, ranks, signals
from minisft.atomic_folder import verify_folder
from minisft.checkpoint import load_checkpoint, step_folder
from minisft.config.sections import Config
from minisft.control import Control
from minisft.errors import STOPPED, Stopped, warn
from minisft.export import export_model, is_exported, read_model
from minisft.log_files import read_metrics
from minisft.loggers import Loggers
from minisft.optimizers import evaluation_weights
from minisft.parallel import is_sharded, on_first_rank
from minisft.prepare.run import Run
from minisft.samples import complete, example_prompt
from minisft.signals import StopSignal
from minisft.spikes import describe_spikes


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    output_dir: Path
    model_dir: Path | None  # the trained model as Hugging Face files; None where the run was stopped early
    step: int  # optimizer steps taken
    metrics: dict[str, float] = field(default_factory=dict)  # the last value of everything that was logged
    exit_code: int = 0  # 0 done, 75 stopped by a signal after saving
    signal: str | None = None  # the one that asked this process to stop, perhaps too late for a run that was done


def is_complete(config: Config, run: Run) -> bool:
    """All steps are taken, or early stopping has run out of patience."""
    patience = config.evaluate.early_stopping_patience
    return run.progress.step >= run.total_steps or patience is not None and run.progress.best.num_bad >= patience


def finish(
    config: Config,
    run: Run,
    folder: Path,
    loggers: Loggers | None,
    bar: console.ProgressBar,
    values: dict[str, float],
    signal: StopSignal,
    control: Control | None,
) -> Result:
    """Export the model, complete the held-out prompts, and print what is in the output folder and what to do next."""
    is_main, step = ranks.rank() == 0, run.progress.step
    if signal.received:
        signals.drop_unread_output()  # that of `tee`, which ends at Ctrl-C too
    signal.note("stopping once the model is written" if run.prompts else "the run ends once the model is written")
    if ranks.any_rank(signal.received is not None) or not is_complete(config, run):
        if is_main:
            asked = "control.toml" if control and control.has_stopped else signal.received
            print(console.stopped(folder, step, run.total_steps, asked, config.checkpoint.resume))
        return Result(folder, None, step, values, exit_code=STOPPED, signal=signal.received)
    if loggers:
        if num_skipped := run.progress.nonfinite_steps:
            warn(f"{num_skipped:,} of {step:,} steps were not finite and trained nothing")
        if run.progress.spikes.count:
            warn(describe_spikes(run.progress.spikes, step))
        if step < run.total_steps:
            print(console.stopped_early(step, run.best_metric, run.progress.best))
    if loggers or is_sharded(run.model):  # of sharded weights every rank has its rows
        if config.evaluate.load_best_model_at_end:
            load_best_model(run, folder)
        with evaluation_weights(run.optimizer):
            on_first_rank(run.model, partial(export_once, config, run, folder, bar))
            if run.prompts:
                try:
                    if not is_sharded(run.model):  # else the other ranks would wait for the rest of its passes
                        signal.end_at_once(signals.IN_SAMPLES)
                    values |= complete_prompts(config, run, folder, loggers)
                    signal.note("the run is done")
                except Stopped as stopped:
                    print(f"{stopped}")
                    return Result(folder, folder / "model", step, values, STOPPED, signal.received)
    if loggers:
        documents = next(iter(run.evals.values()), run.train).documents
        print(
            console.closing(
                folder,
                step=step,
                report_to=config.log.report_to,
                prompt=example_prompt(documents, run.tokenizer, run.prompting["prompt"]),
                longer=longer(config, stopped_early=step < run.total_steps),
                base=run.start.name if run.model.lora is not None else None,
            )
        )
        rows = read_metrics(folder / "metrics.jsonl")
        summary = console.summing_up(rows, bar.seconds(), bar.first_step, run.best_metric, run.progress.best)
        print("\n" + summary)
    return Result(folder, folder / "model", step, values, signal=signal.received)


def export_once(config: Config, run: Run, folder: Path, bar: console.ProgressBar) -> None:
    """Export the model, unless this start took no step and found it there: then only the samples are missing."""
    if bar.first_step < run.progress.step or not is_exported(run, folder):
        (folder / "samples.jsonl").unlink(missing_ok=True)
        export_model(config, run, folder)


def complete_prompts(config: Config, run: Run, folder: Path, loggers: Loggers | None) -> dict[str, float]:
    """Complete the held-out prompts; the first rank prints, logs and writes them. Returns their score."""
    section = config.evaluate
    samples = complete(
        run.model, run.tokenizer, run.prompts, max_new_tokens=section.max_new_tokens, precision=run.precision
    )
    if loggers is None:
        return {}
    print(console.sample_report(samples, section.generate_samples_shown))
    scores = {"eval_exact_match": sum(sample.correct for sample in samples) / len(samples)}
    loggers.log(run.progress.step, scores)
    console.write_samples(folder / "samples.jsonl", samples)  # the last act: its presence means that all is there
    return scores


def longer(config: Config, stopped_early: bool) -> str:
    """The options with which a finished run would take more steps."""
    # "never" would start over, and an older checkpoint would be taken again
    resumed = "" if config.checkpoint.resume == "auto" else " --resume auto"
    if stopped_early:
        return f"--early_stopping_patience {2 * config.evaluate.early_stopping_patience}{resumed}"
    if config.train.max_steps > 0:
        return f"--max_steps {2 * config.train.max_steps}{resumed}"
    return f"--num_train_epochs {2 * config.train.num_train_epochs:g}{resumed}"


def load_best_model(run: Run, folder: Path) -> None:
    """Put the weights of the best evaluation into the model. Prints a warning where its checkpoint is not whole."""
    chosen = run.progress.best
    path = step_folder(folder / "checkpoints", chosen.step)
    if chosen.step in (0, run.progress.step):
        return
    is_main = ranks.rank() == 0
    reason = on_first_rank(run.model, partial(verify_folder, path))
    if is_sharded(run.model):
        reason = ranks.from_first_rank(reason)
    if reason:
        if is_main:
            warn(f"the best checkpoint {path}: {reason}; the last model is exported")
        return
    load_checkpoint(path, run.model, run.optimizer, read_model)  # the moments too: some optimizers keep weights in them
    if is_main:
        print(f"exported   the model of step {chosen.step}, with the best {run.best_metric}, {chosen.value:.4g}")
