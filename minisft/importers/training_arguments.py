"""transformers' TrainingArguments, which TRL and LLaMA-Factory inherit: their keys, which are the same in both files."""

import math

from minisft.config.load import DEFAULTS
from minisft.config.sections import KEYS
from minisft.config.values import as_toml, choices
from minisft.importers.translation import (
    DIFFERENCE,
    TRANSLATED,
    Table,
    Translation,
    as_list,
    as_number,
    fitted_value,
    spread,
)
from minisft.schedule import SCHEDULES, wrong_option

TRACKERS = choices(KEYS["log.report_to"].type)
KEPT = (  # under the same name
    *("train.learning_rate", "train.lr_scheduler_type", "train.num_train_epochs", "train.max_steps"),
    *("train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.weight_decay"),
    *("train.adam_beta1", "train.adam_beta2", "train.adam_epsilon", "train.max_grad_norm", "train.seed"),
    *("train.neftune_noise_alpha", "train.optim", "evaluate.per_device_eval_batch_size", "evaluate.eval_on_start"),
    *("evaluate.eval_steps", "checkpoint.save_steps", "checkpoint.save_total_limit"),
    *("log.logging_steps", "log.run_name", "output_dir"),
)
SAME: Table = {key.rpartition(".")[2]: key for key in KEPT} | {
    "label_smoothing_factor": "train.label_smoothing",
    "full_determinism": "train.deterministic",
    "use_cpu": ("train.device", {True: "cpu", False: "auto"}),
    "disable_tqdm": ("log.progress_bar", {True: False, False: True}),
}

HARMLESS = spread(
    {
        "the kernels are chosen for the device by themselves": "use_liger_kernel liger_kernel_config attn_implementation "
        "use_cache torch_empty_cache_steps dataloader_pin_memory",
        "batches are cut from a memory-mapped cache, which takes no workers": "dataloader_num_workers dataset_num_proc "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "dataset_kwargs accelerator_config parallelism_config preprocessing_num_workers",
        "fields that no format names are never read": "remove_unused_columns label_names length_column_name",
        "about how things are logged": "logging_strategy logging_first_step log_on_each_node log_level log_level_replica "
        "include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics logging_dir project trackio_space_id "
        "trackio_bucket_id trackio_static_space_id debug logging_nan_inf_filter",
        "evaluation is a sum over all tokens, whatever the batches": "eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps prediction_loss_only include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval",
        "there are no pad tokens and no columns in a batch": "padding_free pad_to_multiple_of",
        "blocks are run again without reentrance": "gradient_checkpointing_kwargs.* gradient_checkpointing_kwargs "
        "activation_checkpointing_kwargs.* activation_checkpointing_kwargs",
        "about several devices": "ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend "
        "ddp_static_graph local_rank save_on_each_node fsdp_config fsdp_config.* num_machines",
        "only with push_to_hub": "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        "safetensors always": "save_safetensors",
        "a signal saves and stops a run, always": "enable_jit_checkpoint",
        "only with torch_compile": "torch_compile_backend torch_compile_mode",
        "this command trains": "do_train do_eval do_predict overwrite_output_dir",
    }
)
CHANGES = spread(
    {
        "all rows are shuffled anew every epoch; a short last batch is used": "dataloader_drop_last group_by_length",
        "other orders than random are not supported": "train_sampling_strategy",
        "the batch size is as written, never searched for; see train.on_oom": "auto_find_batch_size",
        "checkpoints hold everything that resuming needs": "save_only_model",
        "evaluation begins after eval_steps": "eval_delay",
        "fp32 products are not rounded to TF32": "tf32",
        "resuming continues at the exact row": "ignore_data_skip restore_callback_states_from_checkpoint",
        "one seed for everything: train.seed": "data_seed",
        'weights are sharded with parallel.strategy = "fsdp2" here, and these options are not translated': "deepspeed fsdp "
        "fsdp.* accelerate_config",
        "this optimizer does not exist here": "optim_target_modules",
        "mixtures of experts are not supported": "router_aux_loss_coef",
        "see optimizers.py for the options of each optimizer": "optim_args optim_args.*",
    }
)


def training_arguments(t: Translation, trainer_type: str, learning_rate: float | None = None) -> None:
    """Translate the keys that every trainer on top of transformers has. learning_rate: where the file has none, None = ours."""
    default = learning_rate or DEFAULTS[trainer_type].get("train.learning_rate", KEYS["train.learning_rate"].default)
    _schedule(t, as_number(t.get("learning_rate")) or default)
    _precision(t)
    _evaluation(t)
    if (devices := as_number(t.get("num_processes"))) and devices > 1:
        t.nothing(
            "num_processes", f"a step has as many rows with torchrun --nproc-per-node {devices:g} -m minisft.train"
        )
    elif "num_processes" in t.left:
        t.nothing("num_processes", "one process, as here", harmless=True)
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        if key in t.left:
            t.into(key, "model.gradient_checkpointing")
    if t.get("optim") == "adamw_anyprecision":
        t.nothing("optim", "adamw is used; stochastic rounding comes with weights_dtype = bf16")
    if "report_to" in t.left:
        wanted = as_list(t.get("report_to"))
        known = [name for name in wanted if name in TRACKERS]
        others = [name for name in wanted if name not in known and name not in ("none", "all")]
        if others or "all" in wanted:
            t.nothing("report_to", f"trackers here: {', '.join(TRACKERS)}")
        else:
            t.into("report_to", "log.report_to", known)
    if t.get("resume_from_checkpoint") is not None:
        if isinstance(resume := t.get("resume_from_checkpoint"), bool):
            t.into("resume_from_checkpoint", "checkpoint.resume", "auto" if resume else "never")
        else:
            t.nothing("resume_from_checkpoint", "checkpoints of another trainer cannot be resumed")
    if "average_tokens_across_devices" in t.left:
        asked = t.left["average_tokens_across_devices"] is not False
        why = "the mean is over all tokens of a step, on all devices" + ("" if asked else ", always")
        t.nothing("average_tokens_across_devices", why, harmless=asked)
    if "train_sampling_strategy" in t.left and t.get("train_sampling_strategy", "random") == "random":
        t.nothing("train_sampling_strategy", "as here", harmless=True)
    if t.get("data_seed") is not None and t.get("data_seed") == t.get("seed", KEYS["train.seed"].default):
        t.nothing("data_seed", "the same as seed", harmless=True)
    elif t.get("data_seed") is not None:
        t.nothing("data_seed", CHANGES["data_seed"])
    t.table({key: SAME[key] for key in SAME if key in t.left})
    if trainer_type == "sft" and t.values.get("train.neftune_noise_alpha"):
        t.difference("NEFTune's noise is scaled by the length of each document, there by that of the padded row")


def _schedule(t: Translation, peak: float) -> None:
    """The schedule's options and its warm-up. peak: the learning rate."""
    written = next((t.get(key) for key in ("lr_scheduler_type", "lr_scheduler") if t.get(key)), "linear")
    name = fitted_value("train.lr_scheduler_type", written)
    options = {key.partition(".")[2]: key for key in t.left if key.startswith("lr_scheduler_kwargs.")}
    kwargs: dict[str, object] = {}
    for option, key in options.items():
        value, number = t.left[key], as_number(t.left[key])
        if option in ("min_lr", "lr_end") and number is not None:
            t.into(key, "train.min_lr", number)
        elif option in ("min_lr_rate", "min_lr_ratio") and number is not None:
            t.into(key, "train.min_lr", number * peak)
        elif option == "num_decay_steps" and name == "warmup_stable_decay" and number is not None:
            _decay_steps(t, key, int(number), kwargs)
        elif (option, number) == ("num_cycles", 0.5) and name in ("cosine", "warmup_stable_decay"):
            t.nothing(key, "half a period, as here", harmless=True)
        elif name in SCHEDULES and option in SCHEDULES[name] and not wrong_option(name, option, _plain(value)):
            kwargs[option] = _plain(value)
            t.take(key, TRANSLATED, f"train.lr_scheduler_kwargs = {{{option} = {as_toml(kwargs[option])}}}")
        else:
            t.nothing(key, f"{name if name in SCHEDULES else written} has no such option; see schedule.py")
    if t.get("lr_scheduler_kwargs") is not None:
        t.nothing("lr_scheduler_kwargs", "see train.lr_scheduler_kwargs and schedule.py for the options of a schedule")
    if name == "polynomial":
        t.default("train.min_lr", 1e-7, "transformers' polynomial ends at lr_end = 1e-7")
    if name == "warmup_stable_decay":
        if "decay_type" not in kwargs and options.get("decay_type") is None:
            kwargs["decay_type"] = "cosine"
            t.difference(
                'train.lr_scheduler_kwargs: decay_type = "cosine", transformers\' default (default here: "linear")'
            )
    if kwargs:
        t.values["train.lr_scheduler_kwargs"], t.origins["train.lr_scheduler_kwargs"] = kwargs, "lr_scheduler_kwargs"
    _warmup(t, written)


def _plain(value: object) -> object:
    """A number that YAML read as text as a number; whole ones without a point."""
    number = as_number(value)
    return value if number is None else int(number) if float(number).is_integer() else number


def _decay_steps(t: Translation, key: str, steps: int, kwargs: dict[str, object]) -> None:
    """decay_ratio for a number of steps, if the file says how many steps there are."""
    total = as_number(t.get("max_steps"))
    if total and 0 < steps <= total:
        ratio = steps / total
        if math.ceil(total * ratio) != steps:  # rounded up
            ratio = (steps - 0.5) / total
        kwargs["decay_ratio"] = ratio
        t.take(key, TRANSLATED, f"train.lr_scheduler_kwargs = {{decay_ratio = {ratio:g}}}, of max_steps")
    else:
        why = "the decay is a part of all steps here, whose number is not known: write decay_ratio into train.lr_scheduler_kwargs"
        t.take(key, DIFFERENCE, why)


def _warmup(t: Translation, schedule: object) -> None:
    if schedule in ("constant", "reduce_lr_on_plateau"):  # constant_with_warmup has one
        for key in ("warmup_steps", "warmup_ratio"):
            if key in t.left:
                t.nothing(key, f"{schedule} has no warm-up there; none is written", harmless=True)
        return
    steps = as_number(t.get("warmup_steps"))
    if steps:  # a number below 1 is a part of all steps
        t.into("warmup_steps", "train.warmup_steps" if steps >= 1 else "train.warmup_ratio", steps)
        if "warmup_ratio" in t.left:
            t.nothing("warmup_ratio", "warmup_steps wins there too", harmless=True)
    else:
        if "warmup_ratio" in t.left:
            t.into("warmup_ratio", "train.warmup_ratio")
        if "warmup_steps" in t.left:
            t.nothing("warmup_steps", "no warm-up by steps", harmless=True)


def _precision(t: Translation) -> None:
    for key in ("bf16", "fp16"):
        if key in t.left and not t.on(key):
            t.nothing(key, "off", harmless=True)
    if "bf16" in t.left:
        t.into("bf16", "train.precision", "bf16")
    if "fp16" in t.left:
        t.into("fp16", "train.precision", "fp16")
    if (mixed := t.get("mixed_precision")) is not None:  # of accelerate, which the switches override
        if "train.precision" in t.values or mixed in ("no", False):
            t.nothing("mixed_precision", "bf16 and fp16 decide" if mixed not in ("no", False) else "off", harmless=True)
        else:
            t.into("mixed_precision", "train.precision")


def best_model(t: Translation, patience: str = "early_stopping_patience") -> None:
    """The keys of the best model and of early stopping; after all others, because they need data to evaluate on.

    patience: the key of early stopping.
    """
    has_data = "data.eval_data" in t.values or t.values.get("data.eval_fraction")
    switches = {
        "load_best_model_at_end": "evaluate.load_best_model_at_end",
        patience: "evaluate.early_stopping_patience",
    }
    wanted = [key for key in switches if t.on(key)]
    for key in [key for key in switches if key in t.left]:
        if key not in wanted:
            t.nothing(key, "off, as here", harmless=True)
        elif not has_data:
            t.nothing(key, "there is nothing to evaluate on: set data.eval_data or data.eval_fraction")
        else:
            t.into(key, switches[key])
    for key in [key for key in ("metric_for_best_model", "greater_is_better") if key in t.left]:
        if wanted and has_data and t.left[key] is not None:
            t.into(key, f"evaluate.{key}")
            continue
        used = wanted or t.given.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
        usual = t.left[key] in (None, "loss", "eval_loss", False)
        why = "the loss decides, as here" if usual else "the loss decides"
        t.nothing(key, why if used else "only with load_best_model_at_end", harmless=usual or not used)


def _evaluation(t: Translation) -> None:
    """Evaluation and saving, by steps or by epochs."""
    for key in ("evaluation_strategy", "eval_strategy"):
        if key in t.left:
            if (strategy := t.get(key, "no")) == "epoch":
                t.into(key, "evaluate.eval_steps", "epoch")
                if "eval_steps" in t.left:
                    t.nothing("eval_steps", "an evaluation comes after every epoch", harmless=True)
            else:
                t.nothing(
                    key,
                    "evaluation is every eval_steps steps wherever there is data for it",
                    harmless=strategy != "best",
                )
    if "save_strategy" in t.left:
        strategy = t.get("save_strategy", "no")
        if strategy == "steps":
            t.nothing("save_strategy", "as here", harmless=True)
        else:  # the best checkpoint is saved beside these
            t.into("save_strategy", "checkpoint.save_steps", "epoch" if strategy == "epoch" else "never")
            if "save_steps" in t.left:
                t.nothing("save_steps", f"only with save_strategy = steps, and it is {strategy}", harmless=True)
    for key, ours in (("eval_steps", "evaluate.eval_steps"), ("save_steps", "checkpoint.save_steps"),
                      ("logging_steps", "log.logging_steps")):  # fmt: skip
        value = as_number(t.get(key))
        if value is not None and 0 < value < 1:
            t.nothing(key, f"a part of all steps; {ours} is a number of steps")
        elif value is not None:
            t.into(key, ours, value)
