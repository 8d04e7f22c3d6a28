"""transformers' TrainingArguments, which TRL and LLaMA-Factory inherit: their keys, which are the same in both files."""

from minisft.config.sections import KEYS
from minisft.config.values import choices
from minisft.importers.translation import Table, Translation, as_list, as_number, spread

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
        "use_cache tf32 torch_empty_cache_steps dataloader_pin_memory",
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
        "ddp_static_graph local_rank save_on_each_node fsdp_config fsdp_config.* num_machines mixed_precision",
        "only with push_to_hub": "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        "safetensors always": "save_safetensors",
        "a signal saves and stops a run, always": "enable_jit_checkpoint",
        "only with torch_compile": "torch_compile_backend torch_compile_mode",
        "this command trains": "do_train do_eval do_predict overwrite_output_dir",
        "only with load_best_model_at_end": "metric_for_best_model greater_is_better",
    }
)
CHANGES = spread(
    {
        "all rows are shuffled anew every epoch; a short last batch is used": "dataloader_drop_last group_by_length",
        "other orders than random are not supported": "train_sampling_strategy",
        "the batch size is as written, never searched for": "auto_find_batch_size",
        "the last weights are exported; every verified checkpoint stays in the output folder": "load_best_model_at_end",
        "checkpoints hold everything that resuming needs": "save_only_model",
        "evaluation begins after eval_steps": "eval_delay",
        "resuming continues at the exact row": "ignore_data_skip restore_callback_states_from_checkpoint",
        "one seed for everything: train.seed": "data_seed",
        "sharding does not exist here: with torchrun each device holds the whole model": "deepspeed fsdp fsdp.* "
        "accelerate_config",
        "this optimizer does not exist here": "optim_target_modules",
        "mixtures of experts are not supported": "router_aux_loss_coef",
        "see optimizers.py for the options of each optimizer": "optim_args optim_args.*",
    }
)


def training_arguments(t: Translation, trainer_type: str) -> None:
    """Translate the keys that every trainer on top of transformers has."""
    _schedule(t)
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
    t.table({key: SAME[key] for key in SAME if key in t.left})
    if trainer_type == "sft" and t.values.get("train.neftune_noise_alpha"):
        t.difference("NEFTune's noise is scaled by the length of each document, there by that of the padded row")


def _schedule(t: Translation) -> None:
    kwargs = {key: t.left[key] for key in t.left if key.startswith("lr_scheduler_kwargs.")}
    peak = as_number(t.get("learning_rate"))
    for key, value in kwargs.items():
        name, number = key.partition(".")[2], as_number(value)
        if name == "min_lr" and number is not None:
            t.into(key, "train.min_lr", number)
        elif name == "min_lr_rate" and number is not None and peak:
            t.into(key, "train.min_lr", number * peak)
        else:
            t.nothing(key, "see train.lr_scheduler_kwargs and schedule.py for the options of a schedule")
    if t.get("lr_scheduler_kwargs") is not None:
        t.nothing("lr_scheduler_kwargs", "see train.lr_scheduler_kwargs and schedule.py for the options of a schedule")
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


def _evaluation(t: Translation) -> None:
    """Evaluation and saving: by steps here. Fractions and epochs have no counterpart."""
    old = "evaluation_strategy"
    for key in (old, "eval_strategy"):
        if key in t.left:
            if (strategy := t.get(key, "no")) == "epoch":
                t.nothing(key, "evaluation is every evaluate.eval_steps (500) steps, and at the end")
            else:
                t.nothing(
                    key,
                    "evaluation is every eval_steps steps wherever there is data for it",
                    harmless=strategy != "best",
                )
    if "save_strategy" in t.left:
        by_steps = t.get("save_strategy", "no") == "steps"
        t.nothing(
            "save_strategy",
            "as here" if by_steps else "saved every checkpoint.save_steps (500) steps, and at the end",
            by_steps,
        )
    for key, ours in (("eval_steps", "evaluate.eval_steps"), ("save_steps", "checkpoint.save_steps"),
                      ("logging_steps", "log.logging_steps")):  # fmt: skip
        value = as_number(t.get(key))
        if value is not None and 0 < value < 1:
            t.nothing(key, f"a part of all steps; {ours} is a number of steps")
        elif value is not None:
            t.into(key, ours, value)
