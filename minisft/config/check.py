"""Checks of the configuration as a whole: missing keys, keys that contradict each other and, before a run, packages that are not
installed."""

import importlib.util
import re
from collections.abc import Callable

from minisft.config.choices import ADAMW, wrong_optimizer_option
from minisft.config.sections import KEYS, Config, LoraSection, config_to_dict, eval_sets
from minisft.config.values import as_toml
from minisft.data.packing_strategies import STRATEGIES
from minisft.errors import UserError, shortened
from minisft.model.lora_options import ALL_LINEAR
from minisft.preference.losses import ACROSS_THE_BATCH, WITH_DIVERGENCE, WITH_LABEL_SMOOTHING, WITHOUT_REFERENCE
from minisft.schedule import HAVE_NO_FLOOR, wrong_option

OF_THE_BEST = ("metric_for_best_model", "greater_is_better", "load_best_model_at_end", "early_stopping_patience")
PATTERNS = ("train.trainable", "train.frozen", "train.unfreeze", "train.learning_rates", "train.weight_decays")
PATTERNS += ("lora.rank_pattern", "lora.alpha_pattern", "lora.target_modules")  # the last one if it is no list
Refuse = Callable[[str, str, str], None]  # keys with spaces between them, the problem, a hint: raises UserError


def check_config(config: Config, origins: dict[str, str], where: str) -> None:
    """Raises UserError. where: the configuration came from; origins: each of its values."""
    refuse = _refuse(config, origins)
    require_sources(config, where)
    check_model(config, refuse)
    check_data(config, refuse)
    check_schedule(config, refuse)
    check_optimizer(config, refuse)
    check_trained(config, refuse, has_rank=origins["lora.r"] != "default")
    check_parallel(config, refuse)
    check_patterns(config, refuse)
    check_evaluation(config, refuse)
    if config.trainer_type == "dpo":
        check_dpo(config, refuse)
    else:
        refuse_dpo_keys(config, refuse)


def _refuse(config: Config, origins: dict[str, str]) -> Refuse:
    values = config_to_dict(config)

    def refuse(keys: str, problem: str, hint: str) -> None:
        written = " and ".join(
            f"{key} = {shortened(as_toml(values[key]), 200)} ({origins[key]})" for key in keys.split()
        )
        raise UserError(f"{written}: {problem}", hint=hint)

    return refuse


def require_sources(config: Config, where: str) -> None:
    """A model, a tokenizer and data are named."""
    model, data = config.model, config.data
    if model.model_name_or_path is None and model.config is None:
        hint = "name a local folder or a Hugging Face repository, or give a [model.config] to train from random weights"
        raise UserError(f"{where}: model.model_name_or_path is not set", hint=hint)
    if model.config is not None and model.model_name_or_path is None and model.tokenizer_name_or_path is None:
        hint = "model.config brings no tokenizer: name the folder or repository of one"
        raise UserError(f"{where}: model.tokenizer_name_or_path is not set", hint=hint)
    if not data.train_data:
        hint = 'name a file of rows, as in train_data = "train.jsonl"'
        raise UserError(f"{where}: data.train_data is not set", hint=hint)


def check_model(config: Config, refuse: Refuse) -> None:
    model, values = config.model, config_to_dict(config)
    if model.model_name_or_path is not None and model.config is not None:
        keys = "model.model_name_or_path model.config"
        refuse(keys, "the model can come from one of them only", 'set the other one to "none"')
    if model.config is not None and config.lora.r is not None:
        refuse("lora.r", "an adapter belongs to a trained model, not to random weights", "set model_name_or_path")
    if model.load_in_4bit and model.load_in_8bit:
        refuse("model.load_in_4bit model.load_in_8bit", "the weights have one of these widths", "choose one")
    for key, asked in (("model.load_in_4bit", model.load_in_4bit), ("model.load_in_8bit", model.load_in_8bit)):
        if asked and config.lora.r is None:
            refuse(key, "quantised weights cannot be trained, adapters beside them can", "set lora.r, as in r = 16")
    for key in ("model.bnb_4bit_quant_type", "model.bnb_4bit_use_double_quant"):
        if values[key] != KEYS[key].default and not model.load_in_4bit:
            refuse(key, "nothing is kept in 4 bits", "set model.load_in_4bit = true")
    for key, on in (
        ("gradient_checkpointing_every", model.gradient_checkpointing_every > 1),
        ("offload_activations", model.offload_activations),
    ):
        if on and model.gradient_checkpointing is not True:
            problem = "it concerns the blocks that are run again in the backward"
            refuse(f"model.{key} model.gradient_checkpointing", problem, "set gradient_checkpointing = true")


def check_data(config: Config, refuse: Refuse) -> None:
    data = config.data
    if data.eval_data and data.eval_fraction:
        refuse("data.eval_data data.eval_fraction", "evaluation rows come from one of them", "set eval_fraction = 0")
    for key, packs in (("data.packing", data.packing), ("data.eval_packing", data.eval_packing)):
        if packs and data.max_length is None:
            refuse(f"{key} data.max_length", "a pack needs a length", "set max_length to a number")
    if data.truncation == "turns" and data.max_length is None:
        refuse("data.truncation data.max_length", "nothing is too long without a length", "set max_length to a number")
    if data.share_turns is True and config.trainer_type == "dpo":
        refuse("data.share_turns trainer_type", "each answer of a pair is one document", "see dpo.share_prompt")
    if data.share_turns is True and config.train.neftune_noise_alpha:
        problem = "a token that several documents share would have the noise of one"
        refuse("data.share_turns train.neftune_noise_alpha", problem, 'leave it out, or set share_turns = "auto"')
    if data.share_turns is True and data.packing and STRATEGIES[data.packing_strategy].cut == "stream":
        problem = f"{data.packing_strategy} cuts documents anywhere"
        refuse("data.share_turns data.packing_strategy", problem, 'use "bfd", or set share_turns = "auto"')
    if data.stream:
        check_stream(config, refuse)
    else:
        for key in ("stream_rows", "stream_mix"):
            if getattr(data, key) != KEYS[f"data.{key}"].default:
                refuse(f"data.{key} data.stream", "the data is not streamed", "set data.stream = true")
    if data.instruction_marker and not data.response_marker:
        refuse("data.instruction_marker", "it closes the turn that response_marker opens", "set response_marker too")


def check_stream(config: Config, refuse: Refuse) -> None:
    """What needs to know all rows before the first step."""
    train, data = config.train, config.data
    if train.max_steps < 1:
        refuse("data.stream train.max_steps", "nobody knows where a pass over a stream ends", "set max_steps")
    if config.dpo.precompute_ref_log_probs:
        problem = "only the first chunk is there before the first step, and each row comes once a pass: nothing would be saved"
        refuse(
            "data.stream dpo.precompute_ref_log_probs", problem, "leave it out: the reference is asked in every step"
        )
    if data.eval_fraction:
        problem = "the rows that are held out would be drawn from all rows"
        refuse("data.stream data.eval_fraction", problem, "name them in eval_data, and set eval_fraction = 0")
    intervals = {
        "evaluate.eval_steps": config.evaluate.eval_steps,
        "checkpoint.save_steps": config.checkpoint.save_steps,
    }
    for key, value in intervals.items():
        if value == "epoch":
            refuse(f"data.stream {key}", "nobody knows where an epoch ends", "set a number of steps")


def check_schedule(config: Config, refuse: Refuse) -> None:
    data, train = config.data, config.train
    if train.warmup_steps and train.warmup_ratio:
        refuse("train.warmup_steps train.warmup_ratio", "two lengths of one warm-up", "set one of them to 0")
    if train.min_lr > train.learning_rate:
        refuse("train.min_lr train.learning_rate", "the end is above the peak", "lower min_lr")
    if train.min_lr and train.lr_scheduler_type in HAVE_NO_FLOOR:
        keys = "train.min_lr train.lr_scheduler_type"
        refuse(keys, f"{train.lr_scheduler_type} does not fall to an end", "use linear or cosine")
    if train.optim == "schedule_free_adamw" and train.lr_scheduler_type != "constant":
        keys = "train.optim train.lr_scheduler_type"
        refuse(keys, "it averages the weights instead of lowering the rate", "set lr_scheduler_type to constant")
    if train.optim == "schedule_free_adamw" and train.adam_beta1 == 0:
        keys = "train.optim train.adam_beta1"
        refuse(keys, "the average of the weights could not be found from what is kept", "set adam_beta1 above 0")
    is_evaluated = (data.eval_data or data.eval_fraction) and config.evaluate.eval_steps != "never"
    if train.lr_scheduler_type == "reduce_on_plateau" and not is_evaluated:
        refuse("train.lr_scheduler_type", "there is nothing to evaluate", "set data.eval_data or data.eval_fraction")
    for key, value in train.lr_scheduler_kwargs.items():
        if expected := wrong_option(train.lr_scheduler_type, key, value):
            refuse("train.lr_scheduler_kwargs", f"{key} = {as_toml(value)}", expected)
    if train.max_steps == 0:
        refuse("train.max_steps", "no step trains nothing", "-1 = as num_train_epochs says; otherwise at least 1")


def check_optimizer(config: Config, refuse: Refuse) -> None:
    train = config.train
    if train.optim not in ADAMW and train.offload_optimizer:
        refuse("train.offload_optimizer train.optim", f"{train.optim} has no offloaded form", f"use {ADAMW[0]}")
    if train.weights_dtype == "bf16":
        all_adapters = config.lora.r is not None and not config.lora.modules_to_save  # these are fp32
        if train.optim not in ADAMW and not all_adapters:
            keys = "train.weights_dtype train.optim"
            refuse(keys, f"{train.optim} would keep its state in bf16 too", f"use one of {', '.join(ADAMW)}")
        if train.precision not in ("bf16", "auto"):
            keys = "train.weights_dtype train.precision"
            refuse(keys, "weights in bf16 are multiplied in bf16", "set precision to bf16, or weights_dtype to fp32")
    if train.on_oom == "split" and train.loss_normalization == "micro_batch":
        problem = "smaller micro-batches would have other means"
        refuse("train.on_oom train.loss_normalization", problem, 'set on_oom to "stop"')
    if train.optimizer_in_backward:
        for key, wanted, problem in (
            ("gradient_accumulation_steps", 1, "there is an update for every micro-batch"),
            ("max_grad_norm", None, "the norm is known when all weights are updated already, too late to clip"),
            ("on_nonfinite", "stop", "an update in the backward pass cannot be left out"),
            ("on_oom", "stop", "an update in the backward pass cannot be made again"),
            ("on_spike", "warn", "an update in the backward pass cannot be left out"),
        ):
            if getattr(train, key) != wanted:
                refuse(f"train.optimizer_in_backward train.{key}", problem, f"set {key} = {as_toml(wanted)}")
        if train.precision == "fp16":
            keys = "train.optimizer_in_backward train.precision"
            refuse(keys, "steps that overflow could not be left out", "set precision to bf16 or fp32")
    if train.on_spike == "rewind" and config.checkpoint.save_steps == "never":
        keys = "train.on_spike checkpoint.save_steps"
        refuse(keys, "there is no checkpoint to go back to", "set save_steps to a number")
    for key, value in train.optim_args.items():
        if expected := wrong_optimizer_option(train.optim, key, value):
            refuse("train.optim_args", f"{key} = {as_toml(value)}", expected)


def check_trained(config: Config, refuse: Refuse, has_rank: bool) -> None:
    """The choice of the parameters that train. has_rank: lora.r is given; it may be "none", to train all weights this time."""
    values, lora = config_to_dict(config), config.lora
    for name, default in vars(LoraSection()).items():
        if not has_rank and getattr(lora, name) != default:
            problem = "without lora.r there are no adapters, and all weights would train"
            refuse(f"lora.{name}", problem, 'set lora.r, as in r = 16, or r = "none" if they should')
    by_expression = isinstance(lora.target_modules, str) and lora.target_modules != ALL_LINEAR
    if by_expression and lora.layers_to_transform is not None:
        problem = "a regular expression is of whole names, in which the layers are"
        refuse("lora.target_modules lora.layers_to_transform", problem, 'use a list of names, or "all-linear"')
    for key in ("train.trainable", "train.frozen"):
        if config.lora.r is not None and values[key]:
            hint = "choose adapters by lora.target_modules, and whole modules by lora.modules_to_save"
            refuse(f"{key} lora.r", "with [lora] the adapters train, and the model is frozen", hint)


def check_parallel(config: Config, refuse: Refuse) -> None:
    """What sharded weights and split documents do not do yet."""
    values, train, strategy = config_to_dict(config), config.train, config.parallel.strategy
    is_sharded = strategy in ("fsdp2", "hsdp")
    options = {"replicas": strategy == "hsdp", "reshard_after_forward": is_sharded, "cpu_offload": is_sharded}
    for key, belongs in options.items():
        if values[f"parallel.{key}"] != KEYS[f"parallel.{key}"].default and not belongs:
            refuse(f"parallel.{key} parallel.strategy", "no weights are sharded so", "leave it out")
    if config.parallel.context_parallel > 1:
        for key, is_used, problem, hint in (
            ("train.neftune_noise_alpha", train.neftune_noise_alpha, "noise is as long as a document", "leave it out"),
            (
                "train.loss_normalization",
                train.loss_normalization != "tokens",
                "a rank has a part of a micro-batch",
                'use "tokens"',
            ),
            ("train.cuda_graph", train.cuda_graph is True, "ranks exchange keys and values in the pass", 'use "auto"'),
            (
                "train.on_oom",
                train.on_oom == "split",
                "the other ranks are in the middle of a pass",
                'set on_oom = "stop"',
            ),
            ("dpo.ld_alpha", config.dpo.ld_alpha is not None, "it counts the tokens of an answer", "leave it out"),
        ):
            if is_used:
                refuse(f"parallel.context_parallel {key}", f"documents are split over ranks: {problem}", hint)
    if not is_sharded:
        return
    for key, is_used, problem, hint in (
        ("train.on_oom", train.on_oom == "split", "the other ranks are in the middle of a pass", 'set on_oom = "stop"'),
        ("train.cuda_graph", train.cuda_graph is True, "weights are gathered for each block", 'use "auto"'),
    ):
        if is_used:
            refuse(f"parallel.strategy {key}", problem, hint)
    if config.parallel.cpu_offload and train.optim == "muon":
        problem = "a CPU would take longer for its products of whole matrices than a GPU for the step"
        refuse("parallel.cpu_offload train.optim", problem, "use another optimizer, or leave cpu_offload out")
    if train.optimizer_in_backward:
        keys = "train.optimizer_in_backward parallel.strategy"
        if config.lora.r is not None:
            problem = "every rank has all adapters, whose gradients are summed after the backward"
            refuse(f"{keys} lora.r", problem, "leave optimizer_in_backward out: it would save nothing")
        if train.optim == "muon":
            problem = "one matrix after the other, so one rank would make all orthogonal ones while the others wait"
            refuse(f"{keys} train.optim", problem, "use another optimizer, or leave optimizer_in_backward out")


def check_patterns(config: Config, refuse: Refuse) -> None:
    """The regular expressions of names of parameters and modules."""
    values = config_to_dict(config)
    for key in PATTERNS:
        expressions = [values[key]] if isinstance(values[key], str) else values[key]
        for expression in expressions if key != "lora.target_modules" or isinstance(values[key], str) else ():
            try:
                re.compile(expression)
            except (re.error, OverflowError, RecursionError) as error:
                shown = shortened(as_toml(expression), 100)
                refuse(key, f"{shown} is not a regular expression: {error}", "see docs.python.org/3/library/re.html")


def check_evaluation(config: Config, refuse: Refuse) -> None:
    data, evaluate, values = config.data, config.evaluate, config_to_dict(config)
    for key in OF_THE_BEST:
        if values[f"evaluate.{key}"] != KEYS[f"evaluate.{key}"].default:
            if not (data.eval_data or data.eval_fraction):
                refuse(f"evaluate.{key}", "there is nothing to evaluate", "set data.eval_data or data.eval_fraction")
            if evaluate.eval_steps == "never":
                refuse(f"evaluate.{key} evaluate.eval_steps", "nothing is evaluated", "set eval_steps to a number")
    if evaluate.early_stopping_threshold and evaluate.early_stopping_patience is None:
        refuse("evaluate.early_stopping_threshold", "nothing stops early", "set early_stopping_patience too")
    if evaluate.generate_group_field and not evaluate.generate_data:
        refuse("evaluate.generate_group_field", "there is nothing to group", "set generate_data to a file of rows")
    for name in eval_sets(data.eval_data):
        if not all(letter.isalnum() or letter in "_-." for letter in name):
            refuse(
                "data.eval_data", f"{as_toml(name)} names metrics", "name evaluation sets with letters, digits, _ - ."
            )


def refuse_dpo_keys(config: Config, refuse: Refuse) -> None:
    """The keys of [dpo] are those of another trainer."""
    values = config_to_dict(config)
    for key, f in KEYS.items():
        if key.startswith("dpo.") and values[key] != f.default:
            refuse(f"{key} trainer_type", "it belongs to preference tuning", 'set trainer_type = "dpo"')


def require_packages(config: Config, origins: dict[str, str]) -> None:
    """Everything that a run of this configuration needs is installed. Commands that only read it do without, as on a machine to
    which a run was copied. Raises UserError."""
    refuse, model = _refuse(config, origins), config.model
    if model.kernels == "triton" and importlib.util.find_spec("triton") is None:
        refuse("model.kernels", "Triton is not installed", 'pip install triton, or kernels = "auto"')
    for tracker in config.log.report_to:
        if importlib.util.find_spec(tracker) is None:
            refuse("log.report_to", f"{tracker} is not installed", f"pip install {tracker}, or leave it out")


def check_dpo(config: Config, refuse: Refuse) -> None:
    """What preference tuning cannot do, and which of its options exclude each other."""
    check_losses(config, refuse)
    check_options_of_losses(config, refuse)
    check_dpo_data(config, refuse)


def check_losses(config: Config, refuse: Refuse) -> None:
    """The losses go together, and with the weights of pairs and tokens."""
    dpo, e = config.dpo, config.train.label_smoothing
    losses = dpo.loss_type
    if not losses or len(set(losses)) < len(losses):
        refuse("dpo.loss_type", "a mixture names each of its losses once", 'as in ["sigmoid", "sft"]')
    if dpo.loss_weights and len(dpo.loss_weights) != len(losses):
        keys = "dpo.loss_weights dpo.loss_type"
        refuse(keys, f"{len(dpo.loss_weights)} weights for {len(losses)} losses", "give one weight for each loss")
    if dpo.loss_weights and not any(dpo.loss_weights):
        refuse("dpo.loss_weights", "all losses are left out", "give one of them a weight above 0")
    if "kto" in losses and len(losses) > 1:
        refuse("dpo.loss_type", "kto takes single answers, the others take pairs", "use one or the other")
    if "robust" in losses and e >= 0.5:
        refuse(
            "train.label_smoothing dpo.loss_type", "with half of the pairs swapped nothing can be learnt", "below 0.5"
        )
    if "exo_pair" in losses and e == 0:
        keys = "train.label_smoothing dpo.loss_type"
        refuse(keys, "exo_pair compares with (1 - e, e), e above 0", "set label_smoothing = 1e-3")
    for key, on in (("use_weighting", dpo.use_weighting), ("ld_alpha", dpo.ld_alpha is not None)):
        if on and "kto" in losses:
            refuse(f"dpo.{key} dpo.loss_type", "it compares the answers of a pair", f"leave out {key}")
    if dpo.use_weighting and {"aot", "aot_unpaired"} & set(losses):
        refuse(
            "dpo.use_weighting dpo.loss_type", "aot sorts, so that no loss belongs to one pair", "choose one of them"
        )
    across = [name for name in losses if name in (*ACROSS_THE_BATCH, "kto")]
    if config.train.on_oom == "split" and across:
        problem = f"a pair's {across[0]} depends on the others of its micro-batch"
        refuse("train.on_oom dpo.loss_type", problem, 'set on_oom to "stop"')
    if not dpo.desirable_weight and not dpo.undesirable_weight:
        refuse("dpo.desirable_weight dpo.undesirable_weight", "nothing would train", "set one of them above 0")


def check_options_of_losses(config: Config, refuse: Refuse) -> None:
    """Options of losses that were not chosen, and of references that are not there."""
    dpo, values = config.dpo, config_to_dict(config)
    losses = dpo.loss_type
    for key, belongs, to in (
        (
            "train.label_smoothing",
            set(losses) & set(WITH_LABEL_SMOOTHING),
            f"loss_type {', '.join(WITH_LABEL_SMOOTHING)}",
        ),
        ("dpo.f_divergence_type", set(losses) & set(WITH_DIVERGENCE), f"loss_type {', '.join(WITH_DIVERGENCE)}"),
        ("dpo.f_alpha_divergence_coef", dpo.f_divergence_type == "alpha_divergence", "alpha_divergence"),
        ("dpo.discopop_tau", "discopop" in losses, "loss_type discopop"),
        ("dpo.simpo_gamma", "simpo" in losses, "loss_type simpo"),
        ("dpo.desirable_weight", "kto" in losses, "loss_type kto"),
        ("dpo.undesirable_weight", "kto" in losses, "loss_type kto"),
        ("dpo.precompute_ref_batch_size", dpo.precompute_ref_log_probs, "precompute_ref_log_probs = true"),
        ("dpo.ref_model_mixup_alpha", dpo.sync_ref_model, "sync_ref_model = true"),
        ("dpo.ref_model_sync_steps", dpo.sync_ref_model, "sync_ref_model = true"),
    ):
        if values[key] != KEYS[key].default and not belongs:
            refuse(key, f"it belongs to {to}", "leave it out, or set that")
    if set(losses) <= set(WITHOUT_REFERENCE):
        for key in ("precompute_ref_log_probs", "sync_ref_model", "ref_model_name_or_path"):
            if getattr(dpo, key):
                refuse(f"dpo.{key} dpo.loss_type", "these losses look at the policy only", f"leave out {key}")
    for key in ("precompute_ref_log_probs", "ref_model_name_or_path"):
        if dpo.sync_ref_model and getattr(dpo, key):
            problem = "a reference that follows the policy is a copy of it, and changes"
            refuse(f"dpo.sync_ref_model dpo.{key}", problem, "choose one of them")


def check_dpo_data(config: Config, refuse: Refuse) -> None:
    """Options of the data and of SFT that pairs do not allow."""
    data, train = config.data, config.train
    if data.packing and STRATEGIES[data.packing_strategy].cut != "front":
        refuse("data.packing_strategy trainer_type", "a pair cannot be cut", 'use "bfd"')
    if data.truncation == "turns":
        problem = "it would cut the prompts of both answers differently"
        refuse("data.truncation trainer_type", problem, 'use "right", "left" or "drop"')
    if data.format not in ("auto", "preference", "labelled"):
        hint = "rows need chosen and rejected; for loss_type kto also an answer with a label"
        refuse("data.format trainer_type", "these rows have no preference", hint)
    for key in ("completion_only_loss", "assistant_only_loss"):
        if getattr(data, key) is False:
            refuse(f"data.{key} trainer_type", "only answers are compared", f"leave out {key}")
    if train.neftune_noise_alpha:
        problem = "noise in the policy would look like a difference from the reference"
        refuse("train.neftune_noise_alpha trainer_type", problem, "leave it out")
    if train.z_loss:
        refuse("train.z_loss trainer_type", "it belongs to the loss of SFT", "leave it out")
