"""LLaMA-Factory: the YAML of `llamafactory-cli train`, with the defaults of its hparams (August 2026).

Its `dataset` names entries of a dataset_info.json, which is read too if it is found.
"""

from dataclasses import MISSING
from pathlib import Path

from minisft.errors import UserError
from minisft.importers.llamafactory_data import DATA_INFO, dataset_info, described_source
from minisft.importers.training_arguments import CHANGES, HARMLESS, best_model, training_arguments
from minisft.importers.translation import (
    TRANSLATED,
    FirstRow,
    Table,
    Translation,
    as_list,
    as_number,
    fitted_value,
    spread,
)
from minisft.importers.trl import AFTER_THE_END, common_differences, weights_in_bf16

NAME = "LLaMA-Factory"
WHOLE = ("rope_scaling",)
SAME: Table = {
    "model_name_or_path": "model.model_name_or_path",
    "val_size": "data.eval_fraction",
    "cutoff_len": "data.max_length",
    "mask_history": "data.train_on_last_turn_only",
    "ref_model": "dpo.ref_model_name_or_path",
    "pref_beta": "dpo.beta",
    "dpo_label_smoothing": "train.label_smoothing",
    "simpo_gamma": "dpo.simpo_gamma",
    "kto_chosen_weight": "dpo.desirable_weight",
    "kto_rejected_weight": "dpo.undesirable_weight",
    "ld_alpha": "dpo.ld_alpha",
    "disable_shuffling": ("data.shuffle", {True: False, False: True}),
}
OF_LORA: Table = {
    "lora_rank": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "loraplus_lr_ratio": "lora.loraplus_lr_ratio",
}
DEFAULTS: dict[str, object] = {  # theirs, where they are not ours
    "data.max_length": 2048,
    "train.learning_rate": 5e-5,
    "model.gradient_checkpointing": True,
    "log.report_to": (),
}
LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
ONLY_IN = {  # the stages in which a key has an effect
    **dict.fromkeys(("pref_beta", "ref_model"), ("dpo", "kto")),
    **dict.fromkeys(("dpo_label_smoothing", "simpo_gamma", "ld_alpha"), ("dpo",)),
    **dict.fromkeys(("kto_chosen_weight", "kto_rejected_weight"), ("kto",)),
}
EASY = HARMLESS | spread(
    {
        "tokens are kept in a cache beside the output folder, keyed by everything that shaped them": "overwrite_cache "
        "preprocessing_batch_size data_shared_file_system cache_dir buffer_size media_dir",
        "where the descriptions of the data are": "dataset_dir",
        "the kernels are chosen for the device by themselves": "flash_attn enable_liger_kernel "
        "use_unsloth_gc low_cpu_mem_usage "
        "use_reentrant_gc block_diag_attn use_v1_kernels use_kv_cache use_unsloth",
        "the tokenizer's own files say what it is": "use_fast_tokenizer",
        "no effect on what is trained": "plot_loss print_param_status hf_hub_token ms_hub_token om_hub_token "
        "include_effective_tokens_per_second compute_accuracy infer_backend infer_dtype offload_folder pissa_convert "
        "predict_with_generate enable_torch_profiler swanlab_project swanlab_run_name swanlab_mode ray_run_name "
        "ray_num_workers resources_per_worker.* placement_strategy master_addr master_port",
        "this command trains; see `minisft export`": "export_size export_device "
        "export_legacy_format export_hub_model_id",
        "about images": "video_fps video_maxlen image_max_pixels "
        "image_min_pixels video_max_pixels video_min_pixels freeze_vision_tower "
        "freeze_multi_modal_projector",
    }
)
HARD = CHANGES | spread(
    {
        "code from a model repository never runs here": "trust_remote_code",
        "to start from an adapter, name its folder as model.model_name_or_path": "adapter_name_or_path adapter_folder "
        "create_new_adapter",
        "tokens that are there are trained there; here the rows of the data set are": "tokenized_path",
        "sampling rows of several sources: see `weight` of a source": "interleave_probs",
        "write it into the rows as a system message": "default_system",
        "tools are rendered by the chat template": "tool_format",
        "rows are read from files": "streaming",
        "see evaluate.generate_data for sampled answers": "eval_num_beams max_new_tokens top_p temperature",
        "control tokens in a text: see data.control_tokens": "split_special_tokens",
        "not supported": "shift_attn mixture_of_depths rope_scaling "
        "moe_aux_loss_coef upcast_layernorm upcast_lmhead_output train_from_scratch freeze_trainable_layers "
        "freeze_trainable_modules freeze_extra_modules use_llama_pro use_adam_mini use_galore use_apollo use_badam "
        "use_dft_loss use_asft_loss use_eaft_loss pref_bco_weight loraplus_lr_embedding ref_model_adapters "
        "ref_model_quantization_bit quantization_device_map use_mca use_hyper_parallel use_swanlab fp8 use_megatron_bridge "
        "reward_model oft_block_size kt_config.* kt_cpu_activation tensor_model_parallel_size fp8_backend "
        "fp8_enable_fsdp_float8_all_gather model_max_length freeze_language_model preserve_thinking use_kt export_dir "
        "oft_rank oft_target eval_on_each_dataset resize_vocab init_special_tokens new_special_tokens_config "
        "disable_gradient_checkpointing",
    }
)


def read(
    table: dict, trainer_type: str | None = None, first_row: FirstRow = lambda source: None, folder: Path = Path()
) -> Translation:
    """LLaMA-Factory's table -> our values and notes. folder: of the file. Raises UserError for other tasks than fine-tuning."""
    stage, method = table.get("stage") or "sft", table.get("finetuning_type") or "lora"
    if stage not in ("pt", "sft", "dpo", "kto"):
        raise UserError(f"stage = {stage} is not supported here", hint="stages here: pt, sft, dpo, kto")
    t = Translation(table, WHOLE)
    trainer_type = "dpo" if stage in ("dpo", "kto") else "sft"
    t.values["trainer_type"], t.origins["trainer_type"] = trainer_type, f"stage = {stage}"
    if "stage" in t.left:
        t.take("stage", TRANSLATED, f'trainer_type = "{trainer_type}"')
    if t.on("use_muon"):
        t.into("use_muon", "train.optim", "muon")
    _method(t, method)
    _data(t, stage, folder, first_row)
    _losses(t, stage)
    if "ignore_pad_token_for_loss" in t.left:
        ignored = t.left["ignore_pad_token_for_loss"] is not False
        t.nothing("ignore_pad_token_for_loss", "there are no pad tokens to train", harmless=ignored)
    if t.get("do_train") is False:
        t.nothing("do_train", "this command trains")
    if t.on("disable_gradient_checkpointing"):
        t.into("disable_gradient_checkpointing", "model.gradient_checkpointing", False)
    if t.get("model_revision", "main") == "main" and "model_revision" in t.left:
        t.nothing("model_revision", "the repository's main branch, as here", harmless=True)
    tokens = {key: list(map(str, as_list(t.get(key)))) for key in ("add_tokens", "add_special_tokens")}
    if new := [token for key in tokens for token in tokens[key]]:
        t.values["model.new_special_tokens"], t.origins["model.new_special_tokens"] = tuple(new), "add_special_tokens"
    for key in tokens:
        if tokens[key]:
            t.take(key, TRANSLATED, "model.new_special_tokens")
        elif key in t.left:
            t.nothing(key, "empty", harmless=True)
    t.table({key: OF_LORA[key] for key in OF_LORA if "lora.r" in t.values})
    t.table({"optim": "train.optim"})
    _precision(t)
    training_arguments(t, trainer_type, learning_rate=5e-5)
    t.table(SAME)
    best_model(t, "early_stopping_steps")
    t.finish(EASY, HARD, [*SAME, *OF_LORA, "dataset", "template", "finetuning_type"])
    for ours, value in DEFAULTS.items():
        t.default(ours, value, "LLaMA-Factory's default")
    t.difference(
        "truncation cuts the end of a document; there question and answer are shortened in proportion to their lengths"
    )
    if stage != "pt":
        t.difference(f"{AFTER_THE_END}; most of LLaMA-Factory's templates train it")
    common_differences(t)
    return t


def _method(t: Translation, method: str) -> None:
    if method != "lora":
        for key in (*OF_LORA, "lora_target", "additional_target", "pissa_init", "pissa_iter", "quantization_bit"):
            if key in t.left:
                t.nothing(key, "finetuning_type is not lora", harmless=key != "quantization_bit")
        if method == "full" and "finetuning_type" in t.left:
            t.take("finetuning_type", TRANSLATED, "all weights train: no [lora]")
        elif "finetuning_type" in t.left:
            t.nothing("finetuning_type", "lora and full exist here: all weights train")
        return
    if "finetuning_type" in t.left:
        t.take("finetuning_type", TRANSLATED, "lora.r")
    rank = fitted_value("lora.r", t.get("lora_rank"))
    rank = 8 if rank in (None, MISSING) else rank  # `into` reports an invalid rank
    if "lora_rank" in t.left:
        t.into("lora_rank", "lora.r")
    else:
        t.default("lora.r", rank, "LLaMA-Factory's default")
    if t.get("lora_alpha") is None:
        t.default("lora.lora_alpha", 2 * rank, "LLaMA-Factory's default, twice the rank")
    modules = as_list(t.get("lora_target"))
    if modules and modules != ["all"]:
        t.into("lora_target", "lora.target_modules", modules)
    elif "lora_target" in t.left:
        t.into("lora_target", "lora.target_modules", "all-linear")
    if "additional_target" in t.left:
        t.into("additional_target", "lora.modules_to_save", as_list(t.get("additional_target")))
    if t.on("pissa_init"):
        names: dict[float | None, str] = {-1: "pissa", 4: "pissa_niter_4"}
        name = names.get(as_number(t.get("pissa_iter", 16)), "pissa_niter_16")
        t.into("pissa_init", "lora.init_lora_weights", name)
    for key in ("pissa_init", "pissa_iter"):
        if key in t.left:
            t.nothing(key, "part of init_lora_weights" if key == "pissa_iter" else "off", harmless=True)
    bits, how = as_number(t.get("quantization_bit")), t.get("quantization_method", "bnb")
    if bits in (4, 8) and how in ("bnb", "bitsandbytes"):
        t.into("quantization_bit", f"model.load_in_{int(bits)}bit", True)
    elif bits is not None:
        t.nothing("quantization_bit", f"{how} with {bits:g} bits does not exist here: the base is not quantised")
    if "quantization_method" in t.left:
        t.nothing(
            "quantization_method", "4 and 8 bits are bitsandbytes' formats", harmless=how in ("bnb", "bitsandbytes")
        )
    for key, ours in (
        ("quantization_type", "model.bnb_4bit_quant_type"),
        ("double_quantization", "model.bnb_4bit_use_double_quant"),
    ):
        if key in t.left and t.values.get("model.load_in_4bit"):
            t.into(key, ours)
        elif key in t.left:
            t.nothing(key, "nothing is kept in 4 bits", harmless=True)


def _precision(t: Translation) -> None:
    if t.on("pure_bf16"):
        weights_in_bf16(t, "pure_bf16", "pure_bf16")
    elif "pure_bf16" in t.left:
        t.nothing("pure_bf16", "off", harmless=True)
    if "lora.r" in t.values:
        if t.on("bf16") and "train.weights_dtype" not in t.values:
            t.default("train.weights_dtype", "bf16", "LLaMA-Factory keeps the frozen weights in bf16")
    elif not (t.on("bf16") or t.on("fp16") or "train.weights_dtype" in t.values):
        t.default("train.precision", "fp32", "LLaMA-Factory without bf16 or fp16 trains in fp32")


def _data(t: Translation, stage: str, folder: Path, first_row: FirstRow) -> None:
    directory = str(t.get("dataset_dir", "data"))
    limit = as_number(t.get("max_samples"))
    info, where = dataset_info(directory, folder)
    for key, ours in (("dataset", "data.train_data"), ("eval_dataset", "data.eval_data")):
        names, sources, unknown = list(map(str, as_list(t.get(key)))), [], []
        for name in names:
            if info is not None and isinstance(info.get(name), dict):
                sources.append(
                    described_source(t, name, info[name], where, int(limit) if limit else None, stage, first_row)
                )
            else:
                unknown.append(name)
        if sources and not unknown:
            t.values[ours] = sources if len(sources) > 1 else sources[0]
            t.origins[ours] = f"{key} = {', '.join(names)}"
            t.take(key, TRANSLATED, ours)
        elif names:
            what = (
                f"{DATA_INFO} was not found in {directory}"
                if info is None
                else f"not in {DATA_INFO}: {', '.join(unknown)}"
            )
            t.nothing(key, f"{what}; name the rows as {ours}")
    if "max_samples" in t.left:
        if limit and ("data.train_data" in t.values or "data.eval_data" in t.values):
            t.take("max_samples", TRANSLATED, f"a slice of every source, [:{int(limit)}]")
        else:
            t.nothing("max_samples", "write it as a slice, as in rows.jsonl[:1000]", harmless=not limit)
    if "mix_strategy" in t.left:
        same = t.get("mix_strategy", "concat") == "concat"
        t.nothing("mix_strategy", "as here" if same else "see `weight` of a source", harmless=same)
    t.prompts_too("train_on_prompt")
    plain, neat = t.get("packing"), t.on("neat_packing")
    packs = stage in ("pt", "sft") and (bool(plain) or neat or plain is None and stage == "pt")
    if packs:
        t.values["data.packing"], t.origins["data.packing"] = True, "neat_packing" if neat else "packing"
        if not neat:
            t.difference("packing: attention stays inside each document; there, without neat_packing, it crosses them")
    for key in ("packing", "neat_packing"):
        if key in t.left and stage in ("pt", "sft"):
            t.take(key, TRANSLATED, f"data.packing = {'true' if packs else 'false'}")
        elif key in t.left:
            t.nothing(key, "preference data is not packed there", harmless=True)
    _template(t, stage)


def _template(t: Translation, stage: str) -> None:
    """How turns are written. LLaMA-Factory has templates of its own, by name."""
    template = t.get("template")
    if stage == "pt":
        if "template" in t.left:
            t.nothing("template", "rows of plain text have no turns, and end with the tokenizer's EOS")
    elif template == "chatml":
        t.into("template", "model.chat_template")
    elif "template" in t.left:
        t.nothing("template", "the tokenizer's own chat template is used; compare the two with `minisft audit`")
    if "enable_thinking" in t.left:
        if isinstance(t.left["enable_thinking"], bool):
            t.into("enable_thinking", "model.chat_template_kwargs", {"enable_thinking": t.left["enable_thinking"]})
        else:
            t.nothing("enable_thinking", "the rows decide", harmless=True)
    elif isinstance(template, str) and template in ("qwen3", "deepseekr1", "hunyuan", "glm4_moe"):
        t.difference("answers without reasoning get an empty <think> block there; here they are as in the rows")
    if stage != "pt":
        t.difference(
            "prompts: LLaMA-Factory writes turns, BOS, EOS and a default system prompt by its own code; here the chat template "
            "does" + (", around prompts and answers that are text too" if "data.prompt_format" in t.values else "")
        )


def _losses(t: Translation, stage: str) -> None:
    weight = t.number("pref_ftx", "dpo.loss_weights") or 0.0
    if stage == "dpo":
        loss = t.get("pref_loss", "sigmoid")
        ours = LOSSES.get(str(loss))
        losses = [ours or "sigmoid", *(["sft"] if weight else [])]
        t.values["dpo.loss_type"], t.origins["dpo.loss_type"] = tuple(losses), f"pref_loss = {loss}"
        if weight:
            t.values["dpo.loss_weights"], t.origins["dpo.loss_weights"] = (1.0, weight), f"pref_ftx = {weight:g}"
        if "pref_loss" in t.left and ours:
            t.take("pref_loss", TRANSLATED, f'dpo.loss_type = ["{ours}"]')
        elif "pref_loss" in t.left:
            t.nothing("pref_loss", "this loss of pairs does not exist here: sigmoid is written")
        if "pref_ftx" in t.left:
            t.take("pref_ftx", TRANSLATED, "dpo.loss_weights: sft is added" if weight else "no sft is added")
        if weight:
            t.difference("sft in the mixture is a mean over tokens; there it is a mean of the pairs' means")
    elif stage == "kto":
        t.values["dpo.loss_type"], t.origins["dpo.loss_type"] = ("kto",), "stage = kto"
        if weight:
            t.nothing("pref_ftx", "kto is not mixed with sft here")
    for key in [key for key in ("pref_loss", "pref_ftx") if key in t.left]:
        t.nothing(key, "no effect in this stage", harmless=True)
    for key, stages in ONLY_IN.items():
        if key in t.left and stage not in stages:
            t.nothing(key, f"only in stage {' and '.join(stages)}", harmless=True)
