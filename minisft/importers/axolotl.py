"""Axolotl: its one YAML, with the defaults of its schemas (July 2026)."""

import re

from minisft.errors import UserError
from minisft.importers.axolotl_data import datasets
from minisft.importers.training_arguments import CHANGES, HARMLESS, TRACKERS, best_model, training_arguments
from minisft.importers.translation import TRANSLATED, FirstRow, Table, Translation, as_list, as_number, spread
from minisft.importers.trl import ORPO_PROMPT, common_differences, weights_in_bf16

NAME = "Axolotl"
WHOLE = ("chat_template_kwargs", "lora_rank_pattern", "lora_alpha_pattern", "message_property_mappings", "roles")
SAME: Table = {
    "base_model": "model.model_name_or_path",
    "revision_of_model": "model.revision",
    "tokenizer_config": "model.tokenizer_name_or_path",
    "chat_template_kwargs": "model.chat_template_kwargs",
    "special_tokens.eos_token": "model.eos_token",
    "special_tokens.pad_token": "model.pad_token",
    "val_set_size": "data.eval_fraction",
    "sequence_len": "data.max_length",
    "excess_length_strategy": ("data.truncation", {"truncate": "right", "raise": "error"}),
    "sample_packing": "data.packing",
    "eval_sample_packing": "data.eval_packing",
    "micro_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "evaluate.per_device_eval_batch_size",
    "num_epochs": "train.num_train_epochs",
    "optimizer": "train.optim",
    "lr_scheduler": "train.lr_scheduler_type",
    "unfrozen_parameters": "train.trainable",
    "wandb_name": "log.run_name",
    "dpo_label_smoothing": "train.label_smoothing",
    "precompute_ref_log_probs": "dpo.precompute_ref_log_probs",
    "dpo_use_weighting": "dpo.use_weighting",
    "dpo_loss_type": "dpo.loss_type",
    "dpo_loss_weights": "dpo.loss_weights",
    "simpo_gamma": "dpo.simpo_gamma",
    "kto_desirable_weight": "dpo.desirable_weight",
    "kto_undesirable_weight": "dpo.undesirable_weight",
    "trl.sync_ref_model": "dpo.sync_ref_model",
    "trl.ref_model_mixup_alpha": "dpo.ref_model_mixup_alpha",
    "trl.ref_model_sync_steps": "dpo.ref_model_sync_steps",
}
OF_LORA: Table = {
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_rank_pattern": "lora.rank_pattern",
    "lora_alpha_pattern": "lora.alpha_pattern",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "peft_init_lora_weights": ("lora.init_lora_weights", {True: "kaiming"}),
    "peft_trainable_token_indices": "lora.trainable_token_indices",
    "loraplus_lr_ratio": "lora.loraplus_lr_ratio",
    "bnb_config_kwargs.bnb_4bit_quant_type": "model.bnb_4bit_quant_type",
    "bnb_config_kwargs.bnb_4bit_use_double_quant": "model.bnb_4bit_use_double_quant",
}
DEFAULTS: dict[str, object] = {  # theirs, where they are not ours
    "data.max_length": 512,
    "data.truncation": "drop",
    "train.lr_scheduler_type": "cosine",
    "train.warmup_ratio": 0.03,  # and at most 100 steps
    "train.num_train_epochs": 1.0,
    "train.per_device_train_batch_size": 1,
    "log.report_to": (),
}
LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "simpo": "simpo", "orpo": "orpo", "kto": "kto"}
# Keys of one loss or another: the values of rl with which they have an effect.
ONLY_WITH = {
    **dict.fromkeys(("dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing"), ("dpo",)),
    **dict.fromkeys(("dpo_use_weighting", "precompute_ref_log_probs"), ("dpo", "ipo")),
    **dict.fromkeys(("simpo_gamma", "cpo_alpha"), ("simpo",)),
    **dict.fromkeys(("kto_desirable_weight", "kto_undesirable_weight"), ("kto",)),
    **dict.fromkeys(("rl_beta", "dpo_beta", "orpo_alpha", "rpo_alpha", "trl.beta"), tuple(LOSSES)),
}
TRACKER_KEYS = {"use_wandb": "wandb", "wandb_project": "wandb", "use_mlflow": "mlflow", "mlflow_experiment_name": "mlflow",
            "use_tensorboard": "tensorboard", "use_trackio": "trackio", "trackio_project_name": "trackio"}  # fmt: skip
EASY = HARMLESS | spread(
    {
        "the model's and the tokenizer's own files say what they are": "model_type tokenizer_type tokenizer_use_fast "
        "tokenizer_legacy processor_type base_model_config is_llama_derived_model is_mistral_derived_model "
        "is_qwen_derived_model is_falcon_derived_model tokenizer_save_jinja_files",
        "the kernels are chosen for the device by themselves": "flash_attention sdp_attention xformers_attention "
        "flex_attention eager_attention sage_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp "
        "sdpa_varlen lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel chunked_cross_entropy fused_attn_kernel "
        "chunked_cross_entropy_num_chunks liger_rope liger_rms_norm liger_glu_activation liger_layer_norm liger_swiglu "
        "liger_fused_linear_cross_entropy liger_cross_entropy cut_cross_entropy unsloth_cross_entropy_loss tiled_mlp "
        "use_kernels dpo_use_liger_kernel torch_compile_backend dpo_padding_free",
        "there is no padding in a batch": "pad_to_sequence_len batch_flattening multipack_real_batches "
        "sample_packing_bin_size sample_packing_group_size sample_packing_eff_est total_num_tokens",
        "tokens are kept in a cache beside the output folder, keyed by everything that shaped them": "dataset_prepared_path "
        "dataset_processes dataset_keep_in_memory num_dataset_shards_to_save "
        "push_dataset_to_hub hf_use_auth_token preprocess_iterable",
        "rows are shuffled anew every epoch, with a seed": "shuffle_merged_datasets shuffle_before_merging_datasets",
        "about several devices or the loading of the model": "device_map max_memory gpu_memory_limit low_cpu_mem_usage "
        "lora_on_cpu qlora_sharded_model_loading fsdp_version fsdp_final_state_dict_type dp_shard_size dp_replicate_size "
        "device world_size ddp",
        "no effect on what is trained": "strict wandb_entity wandb_watch wandb_log_model wandb_run_id wandb_mode "
        "mlflow_tracking_uri gc_steps gc_collect_steps "
        "profiler_steps profiler_steps_start include_tkps axolotl_config_path "
        "save_first_step eval_table_size eval_max_new_tokens mlflow_run_name hf_mlflow_log_artifacts",
        "about images and experts of other models": "freeze_mm_modules image_size image_resize_algorithm",
        "loading, not training": "experimental_skip_move_to_device flex_attn_compile_kwargs.* liger_rms_norm_gated "
        "streaming_multipack_buffer_size merge_lora merge_method gptq_disable_exllama",
        "the model's own files say how its matrices are stored": "lora_fan_in_fan_out",
    }
)
HARD = CHANGES | spread(
    {
        "code from a model repository never runs here": "trust_remote_code",
        "to start from an adapter, name its folder as model.model_name_or_path": "lora_model_dir",
        "evaluation is every evaluate.eval_steps (500) steps or every epoch, and at the end": "evals_per_epoch",
        "saved every checkpoint.save_steps steps (500) or every epoch, and at the end": "saves_per_epoch",
        "see train.on_spike and train.on_nonfinite for what stops a run": "loss_watchdog_threshold loss_watchdog_patience",
        "plugins change the model or the loss": "plugins",
        "the tokenizer's own": "special_tokens.bos_token special_tokens.unk_token added_tokens_overrides.* "
        "default_system_message eot_tokens",
        "shards and streams of rows are not supported: a slice as in rows.jsonl[:10%] is": "dataset_shard_num "
        "dataset_shard_idx streaming",
        "rows are always prepared here, and those that are too long are cut or dropped": "skip_prepare_dataset",
        "tokens are those of the tokenizer's own files": "tokenizer_use_mistral_common",
        "modules_to_save are trained apart, tied or not": "peft_ensure_weight_tying",
        "`minisft audit` reports duplicates; they are not removed": "dataset_exact_deduplication",
        "embeddings of new tokens start at the mean of the others": "fix_untrained_tokens "
        "resize_token_embeddings_to_32x "
        "mean_resizing_embeddings shrink_embeddings embeddings_skip_upcast",
        "mixtures of experts are not supported": "quantize_moe_experts use_scattermoe "
        "use_sonicmoe experts_implementation "
        "expert_parallel_size llama4_linearized_experts",
        f"trackers here: {', '.join(TRACKERS)}": "use_swanlab use_comet comet_project_name",
        "not supported": "qat.* quantization.* diffusion.* model_config.* model_quantization_config use_onebitllms "
        "model_quantization_config_kwargs.* relora relora_steps relora_prune_ratio "
        "lisa_n_layers spectrum_top_fraction fp8 qat quantization "
        "torch_compile context_parallel_size sequence_parallel_degree "
        "tensor_parallel_size use_pose use_eaft eaft_alpha "
        "sample_packing_sequentially min_sample_len "
        "eval_sequence_len overrides_of_model_config overrides_of_model_kwargs "
        "rope_scaling reinit_weights gptq lora_target_parameters loftq peft_layer_replication peft_layers_pattern "
        "loraplus_lr_embedding lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor adam_beta3 adam_epsilon2 "
        "embedding_lr_scale deepcompile layer_offloading activation_offloading selective_checkpointing "
        "generate_samples do_causal_lm_eval do_bench_eval trainer_cls "
        "max_prompt_len fp32_norms s2_attention batch_size",
    }
)


def read(table: dict, trainer_type: str | None = None, first_row: FirstRow = lambda source: None) -> Translation:
    """Axolotl's table -> our values and notes. Raises UserError for other tasks than fine-tuning."""
    rl = table.get("rl")
    if rl and rl not in list(LOSSES) or table.get("reward_model") or table.get("process_reward_model"):
        raise UserError(f"rl = {rl} is not supported here", hint=f"sft, and rl: {', '.join(LOSSES)}")
    t = Translation(table, WHOLE)
    trainer_type = "dpo" if rl else "sft"
    t.values["trainer_type"], t.origins["trainer_type"] = trainer_type, f"rl = {rl}" if rl else "no rl"
    if "optimizer" in t.left:
        t.into("optimizer", "train.optim")
    _adapter(t)
    datasets(t, "datasets", "data.train_data", rl, first_row)
    datasets(t, "pretraining_dataset", "data.train_data", rl, first_row)
    datasets(t, "test_datasets", "data.eval_data", rl, first_row)
    if "data.eval_data" in t.values and "val_set_size" in t.left:
        t.nothing("val_set_size", "test_datasets are given", harmless=True)
    _model(t)
    _loss(t, rl)
    _rates(t)
    _trackers(t)
    _resume_and_order(t)
    training_arguments(t, trainer_type)
    t.table(SAME)
    if not t.values.get("data.packing"):
        t.values.pop("data.packing_strategy", None)
    for key, ours in (("evals_per_epoch", "evaluate.eval_steps"), ("saves_per_epoch", "checkpoint.save_steps")):
        if t.left.get(key) == 1:
            t.into(key, ours, "epoch")
    best_model(t)
    t.finish(EASY, HARD, [*SAME, *OF_LORA, "datasets", "rl", "adapter"])
    for ours, value in DEFAULTS.items():
        has_warmup = "train.warmup_steps" not in t.values and t.given.get("lr_scheduler") != "constant"
        if ours != "train.warmup_ratio" or has_warmup:
            most = ", there at most 100 steps" if ours == "train.warmup_ratio" else ""
            t.default(ours, value, f"Axolotl's default{most}")
    if "checkpoint.save_steps" not in t.values and "saves_per_epoch" not in t.given:
        t.default("checkpoint.save_steps", "epoch", "Axolotl's default")
    if t.values.get("data.packing"):
        t.default("data.packing_strategy", "ffd", "Axolotl packs first-fit decreasing, in groups of rows")
        t.difference("packing: attention stays inside each document, with any kernel")
    common_differences(t)
    return t


def _adapter(t: Translation) -> None:
    adapter = t.get("adapter")
    used = adapter in ("lora", "qlora")
    if used:
        t.take("adapter", TRANSLATED, "lora.r" + (" and model.load_in_4bit" if adapter == "qlora" else ""))
        linear = t.on("lora_target_linear")
        if linear and t.get("lora_target_modules"):
            modules = as_list(t.get("lora_target_modules"))
            more = [module for module in map(str, modules) if "embed" in module or "head" in module]
            t.nothing(
                "lora_target_modules",
                f"lora_target_linear is on: no adapters on {', '.join(more)}"
                if more
                else "lora_target_linear names all of them",
                harmless=not more,
            )
        if linear:
            t.into("lora_target_linear", "lora.target_modules", "all-linear")
        t.table(OF_LORA)
        t.default("lora.r", 8, "PEFT's default")
        t.default("lora.lora_alpha", 8, "PEFT's default")
        if "lora.target_modules" not in t.values:
            t.default("lora.target_modules", ("q_proj", "v_proj"), "PEFT's default for most families")
    elif adapter is not None:
        t.nothing("adapter", "only lora and qlora exist here: all weights train")
    if used and t.left.get("peft_autocast_adapter_dtype") is False:
        t.nothing("peft_autocast_adapter_dtype", "adapters here keep fp32")
    elif "peft_autocast_adapter_dtype" in t.left:
        t.nothing("peft_autocast_adapter_dtype", "adapters in fp32, as here" if used else "no adapters", harmless=True)
    for key in ("load_in_4bit", "load_in_8bit"):
        if key in t.left and used:
            t.into(key, f"model.{key}")
        elif key in t.left:
            t.nothing(key, "quantised weights need adapters", harmless=not t.on(key))
    if adapter == "qlora" and not t.values.get("model.load_in_8bit"):
        t.values["model.load_in_4bit"] = True
        t.origins.setdefault("model.load_in_4bit", "adapter = qlora")
    for key in [*OF_LORA, "lora_target_linear", *(k for k in t.left if k.startswith("bnb_config_kwargs."))]:
        if key in t.left:
            t.nothing(key, "off" if used else "adapter is not lora or qlora", harmless=not used or not t.on(key))


def _model(t: Translation) -> None:
    template, jinja = t.get("chat_template"), t.get("chat_template_jinja")
    types = [str(value) for key, value in t.given.items() if key.endswith("].type")]
    if "model.chat_template" in t.values:  # of types that write their turns themselves
        is_used = any(kind.startswith("chat_template") for kind in types)
        same = template == t.values["model.chat_template"] and jinja is None
        if is_used and not same:
            t.difference("model.chat_template is that of one data set, and is used for all; there each has its own")
        for key in ("chat_template", "chat_template_jinja"):
            if key in t.left:
                t.nothing(key, "the types of the data sets say how turns are written", harmless=same or not is_used)
        template = jinja = None
    if isinstance(jinja, str) and jinja.endswith((".jinja", ".jinja2", ".j2")):
        t.into("chat_template_jinja", "model.chat_template")
    elif jinja is not None:
        t.nothing("chat_template_jinja", "put it into a .jinja file and name that as model.chat_template")
    if template == "chatml" and jinja is None:
        t.into("chat_template", "model.chat_template")
    elif template is not None and "model.chat_template" in t.values:
        t.nothing("chat_template", "the type of a data set says how its turns are written there too", harmless=True)
    elif template in ("tokenizer_default", "jinja"):
        t.nothing(
            "chat_template", "the tokenizer's own" if template != "jinja" else "see chat_template_jinja", harmless=True
        )
    elif template is not None:
        t.nothing("chat_template", "the tokenizer's own template is used; compare the two with `minisft audit`")
    names = ("tokens", "special_tokens.additional_special_tokens")
    if new := [token for name in names for token in as_list(t.get(name))]:
        t.values["model.new_special_tokens"], t.origins["model.new_special_tokens"] = tuple(map(str, new)), "tokens"
        for name in names:
            if name in t.left:
                t.take(name, TRANSLATED, "model.new_special_tokens")
    bf16, why = t.get("bf16"), "Axolotl keeps the weights in bf16"
    half = t.on("fp16") or t.on("float16")
    key = next((key for key in ("bfloat16", "bf16") if t.on(key)), "")
    if t.on("float16"):
        t.into("float16", "train.precision", "fp16")
    if bf16 in ("auto", "full"):
        t.into("bf16", "train.precision", "bf16")
    if not half and (key or bf16 in ("auto", "full") or "bf16" not in t.given):
        if "bfloat16" in t.left:
            t.take("bfloat16", TRANSLATED, 'train.weights_dtype = "bf16"')
        weights_in_bf16(t, "", why)
    for key in ("bfloat16", "float16", "float32"):
        if key in t.left:
            t.nothing(key, "off" if not t.on(key) else "the other switches decide", harmless=True)
    if (value := t.get("gradient_checkpointing")) in ("offload", "offload_disk", "unsloth"):
        t.into("gradient_checkpointing", "model.gradient_checkpointing", True)
        t.values["model.offload_activations"] = True
        t.origins["model.offload_activations"] = f"gradient_checkpointing = {value}"


def _loss(t: Translation, rl: str | None) -> None:
    for key, values in ONLY_WITH.items():
        if key in t.left and rl not in values:
            t.nothing(key, f"only with rl: {', '.join(values)}", harmless=True)
    if rl:
        loss = LOSSES[rl]
        t.take("rl", TRANSLATED, f'trainer_type = "dpo", dpo.loss_type = ["{loss}"]')
        losses, weights = [loss], [1.0]
        extra = "cpo_alpha" if rl == "simpo" else "rpo_alpha"
        weight = t.number(extra, "dpo.loss_weights")
        if rl == "simpo" and weight is None:
            weight = 1.0
            t.difference(
                "simpo: TRL's trainer adds the mean log-likelihood of the chosen answer with weight 1 (cpo_alpha)"
            )
        if weight:
            losses, weights = [*losses, "sft"], [*weights, weight]
        if extra in t.left:
            t.take(extra, TRANSLATED, "dpo.loss_weights: sft is added" if weight else "no sft is added")
        if "dpo_loss_type" not in t.left:
            t.values["dpo.loss_type"], t.origins["dpo.loss_type"] = tuple(losses), f"rl = {rl}"
            if len(losses) > 1:
                t.values["dpo.loss_weights"], t.origins["dpo.loss_weights"] = tuple(weights), extra
        if rl == "orpo":
            t.difference(ORPO_PROMPT)
        for key in ("trl.beta", "rl_beta", "dpo_beta", "orpo_alpha"):  # the first one wins
            if t.get(key) is not None and "dpo.beta" in t.values:
                t.nothing(key, "another key says beta there too", harmless=True)
            elif key in t.left:
                t.into(key, "dpo.beta")
    elif "rl" in t.left:
        t.nothing("rl", "supervised fine-tuning", harmless=True)
    t.prompts_too("train_on_inputs")


def _rates(t: Translation) -> None:
    peak = as_number(t.get("learning_rate"))
    ratio = as_number(t.get("cosine_min_lr_ratio"))
    if ratio is not None and peak:
        t.into("cosine_min_lr_ratio", "train.min_lr", ratio * peak)
    rates = {}
    if (rate := t.number("embedding_lr", "train.learning_rates")) is not None:
        rates["embed_tokens|lm_head"] = rate
        t.take("embedding_lr", TRANSLATED, "train.learning_rates")
    i = 0
    while f"lr_groups[{i}].lr" in t.left:
        keys = {name: f"lr_groups[{i}].{name}" for name in ("name", "modules", "lr")}
        rate = t.number(keys["lr"], "train.learning_rates")
        modules = as_list(t.get(keys["modules"]))
        if rate is not None and modules:
            rates["|".join(re.escape(str(module)) for module in modules)] = rate
        for key in keys.values():
            if key in t.left and rate is not None and modules:
                t.take(key, TRANSLATED, "train.learning_rates")
            elif key in t.left:
                t.nothing(key, "train.learning_rates needs the modules of the group and a rate")
        i += 1
    if rates:
        t.values["train.learning_rates"], t.origins["train.learning_rates"] = rates, "embedding_lr, lr_groups"


def _trackers(t: Translation) -> None:
    trackers = [tracker for key, tracker in TRACKER_KEYS.items() if t.get(key) and t.on(key)]
    if trackers:
        t.values["log.report_to"] = tuple(dict.fromkeys(trackers))
        t.origins["log.report_to"] = ", ".join(key for key in TRACKER_KEYS if t.get(key) and t.on(key))
    for key in TRACKER_KEYS:
        if key in t.left and t.on(key):
            t.take(
                key, TRANSLATED, f"log.report_to has {TRACKER_KEYS[key]}; its own settings come from its environment"
            )
        elif key in t.left:
            t.nothing(key, "off", harmless=True)


def _resume_and_order(t: Translation) -> None:
    if "auto_resume_from_checkpoints" in t.left:
        auto = t.on("auto_resume_from_checkpoints")
        t.into("auto_resume_from_checkpoints", "checkpoint.resume", "auto" if auto else "never")
    if t.on("curriculum_sampling"):
        t.into("curriculum_sampling", "data.shuffle", False)
    elif "curriculum_sampling" in t.left:
        t.nothing("curriculum_sampling", "off", harmless=True)
