"""TRL: the YAML that `trl sft --config` and `trl dpo --config` read, with the defaults of TRL 1.16.

Its defaults are ours except for those below; test_importers.py compares every one with the installed TRL.
"""

from minisft.config.aliases import ALIASES
from minisft.config.choices import ADAMW
from minisft.importers.training_arguments import CHANGES, HARMLESS, best_model, training_arguments
from minisft.importers.translation import (
    TRANSLATED,
    FirstRow,
    Table,
    Translation,
    as_list,
    as_number,
    columns_left_out,
    spread,
)
from minisft.importers.trl_data import sources

NAME = "TRL"
AFTER_THE_END = (
    "what the chat template writes after the token that ends an answer (ChatML's newline) is context here (GSM8K on SmolLM2: "
    "loss 1.511, and 1.497 if it is trained)"
)
ORPO_PROMPT = (
    "orpo: the likelihood of the chosen answer counts the tokens of its prompt there, and only the answer's here"
)
WHOLE = ("chat_template_kwargs",)
SAME: Table = {
    "model_name_or_path": "model.model_name_or_path",
    "eos_token": "model.eos_token",
    "pad_token": "model.pad_token",
    "chat_template_path": "model.chat_template",
    "chat_template_kwargs": "model.chat_template_kwargs",
    "activation_offloading": "model.offload_activations",
    "load_in_4bit": "model.load_in_4bit",
    "load_in_8bit": "model.load_in_8bit",
    "dataset_text_field": "data.dataset_text_field",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "truncation_mode": "data.truncation",
    "test_split_size": "data.eval_fraction",
    "validation_split": "data.eval_fraction",  # of launchers
}
OF_LORA: Table = {
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
}
OF_4BIT: Table = {
    "bnb_4bit_quant_type": "model.bnb_4bit_quant_type",
    "use_bnb_nested_quant": "model.bnb_4bit_use_double_quant",
}
OF_SFT: Table = {
    "packing": "data.packing",
    "packing_strategy": "data.packing_strategy",
    "eval_packing": "data.eval_packing",
    "completion_only_loss": "data.completion_only_loss",
    "assistant_only_loss": "data.assistant_only_loss",
}
OF_DPO: Table = {
    "loss_type": "dpo.loss_type",
    "loss_weights": "dpo.loss_weights",
    "beta": "dpo.beta",
    "f_divergence_type": "dpo.f_divergence_type",
    "f_alpha_divergence_coef": "dpo.f_alpha_divergence_coef",
    "discopop_tau": "dpo.discopop_tau",
    "simpo_gamma": "dpo.simpo_gamma",
    "ld_alpha": "dpo.ld_alpha",
    "use_weighting": "dpo.use_weighting",
    "desirable_weight": "dpo.desirable_weight",
    "undesirable_weight": "dpo.undesirable_weight",
    "precompute_ref_log_probs": "dpo.precompute_ref_log_probs",
    "precompute_ref_batch_size": "dpo.precompute_ref_batch_size",
    "sync_ref_model": "dpo.sync_ref_model",
    "ref_model_mixup_alpha": "dpo.ref_model_mixup_alpha",
    "ref_model_sync_steps": "dpo.ref_model_sync_steps",
    "disable_dropout": "dpo.disable_dropout",
    "label_smoothing": "train.label_smoothing",
}
# TRL's defaults where they are not ours: their key -> (our key, its value).
DEFAULTS: dict[str, tuple[str, object]] = {
    "gradient_checkpointing": ("model.gradient_checkpointing", True),
    "report_to": ("log.report_to", ()),
}
LORA_DEFAULTS: dict[str, tuple[str, object]] = {
    "lora_r": ("lora.r", 16),
    "lora_dropout": ("lora.lora_dropout", 0.05),
}
# PEFT's choice where no modules are named: these for all families except those of ATTENTION_MODULES.
USUAL_MODULES = ("q_proj", "v_proj")
ATTENTION_MODULES = {"gpt2": ("c_attn",), "gpt_neox": ("query_key_value",), "phi": ("q_proj", "v_proj", "fc1", "fc2")}
FOR_DPO = {"rpo_alpha", "max_prompt_length", "max_completion_length", "reference_free"} | set(OF_DPO) - {"loss_type"}
FOR_SFT = ("nll", "chunked_nll", "dft")
ONLY_HARMLESS = HARMLESS | spread(
    {
        "quantised weights are stored as bytes": "bnb_4bit_quant_storage",
        "kept in fp32 as they are": "ignore_bias_buffers",
        "rows are read as a stream and kept in a memory-mapped cache": "dataset_batch_size",
        "the length of prompt and answer together is limited": "use_logits_to_keep label_pad_token_id is_encoder_decoder",
    }
)
ONLY_CHANGES = CHANGES | spread(
    {
        "code from a model repository never runs here": "trust_remote_code",
        "read from the model's own files": "model_init_kwargs model_init_kwargs.*",
        "adapters on single parameters do not exist here": "lora_target_parameters",
        "biases are not trained beside adapters": "lora_bias",
        "adapters here are for causal language models": "lora_task_type",
        "a stream is trained in the order of its rows there; data.shuffle = false does that": "dataset_streaming streaming",
        "set environment variables in the shell": "env.*",
        "quantised weights are multiplied in train.precision": "bnb_4bit_compute_dtype",
        "prompt and answer are limited together, by data.max_length": "max_prompt_length max_completion_length",
        "TR-DPO and mixtures aside, the reference is the policy as it starts": "reference_free force_use_ref_model",
        "see evaluate.generate_data for sampled answers": "generate_during_eval",
    }
)


def read(
    table: dict,
    trainer_type: str | None = None,
    first_row: FirstRow = lambda source: None,
    *,
    loss: str | None = None,
    lora_by_rank: bool = False,
) -> Translation:
    """TRL's table -> our values and notes. trainer_type: "sft" or "dpo"; None = detected from the keys.

    first_row: reads the first row of a source, on which depends what TRL trains. loss: of pairs, where the file names none.
    lora_by_rank: lora_r switches adapters on, without use_peft.
    """
    t = Translation(table, WHOLE)
    trainer_type = trainer_type or ("dpo" if is_dpo(table) else "sft")
    t.values["trainer_type"], t.origins["trainer_type"] = trainer_type, "the keys of the file"
    if t.get("truncation_mode") == "keep_end":
        what = "a document" if trainer_type == "sft" else "prompt and answer"
        t.difference(f"truncation keeps the end of {what}, the first tokens (and a BOS) are lost, as there")
    if "max_length" in t.left and t.left["max_length"] is None:
        t.left["max_length"] = "none"
    sources(t)
    t.table({key: "data.train_data" for key in t.left if ALIASES.get(key) == "data.train_data"})
    training_arguments(t, trainer_type)
    row = first_row(t.values["data.train_data"]) if "data.train_data" in t.values else None
    for ours in ("data.train_data", "data.eval_data"):
        if ours in t.values:
            t.values[ours] = _without_other_columns(t, t.values[ours], first_row)
    _model(t, lora_by_rank)
    if trainer_type == "sft":
        _sft(t, row)
    else:
        _dpo(t, row, loss)
    t.table(SAME)
    known = {*SAME, *OF_SFT, *OF_DPO, *OF_LORA, *OF_4BIT, "dataset_name", "use_peft"}
    best_model(t)
    t.finish(ONLY_HARMLESS, ONLY_CHANGES, known)
    for ours, value in DEFAULTS.values():
        t.default(ours, value, "TRL's default")
    if t.values.get("data.packing"):
        t.difference("packing: all data is packed anew every epoch, there once and within windows of 1000 rows")
        wrapped = t.values.get("data.packing_strategy") == "wrapped"
        t.difference(
            "packing: attention stays inside each document, with any kernel" + ("; there it crosses" if wrapped else "")
        )
    if trainer_type == "dpo" or _has_answers(t, row):
        t.difference(f"{AFTER_THE_END}; TRL trains it")
    common_differences(t)
    return t


def _without_other_columns(t: Translation, data: list | dict | str, first_row: FirstRow) -> list | dict | str:
    """The sources, without the columns that TRL does not read."""
    found = []
    for one in data if isinstance(data, list) else [data]:
        entries = {"path": one} if isinstance(one, str) else one
        row = first_row(one)
        names = ("messages", "conversations") if t.values["trainer_type"] == "sft" else ()
        turns = next((name for name in names if name in (row or {})), "prompt")
        ignored = columns_left_out(t, row, (turns, "tools", "chat_template_kwargs"))
        found.append({**entries, "ignore": ignored} if ignored else one)
    return found if isinstance(data, list) else found[0]


def _has_answers(t: Translation, row: dict | None) -> bool:
    """Whether a chat template may end trained answers: not in plain text, nor where all turns are trained."""
    if row is None:
        return True
    if "messages" in row or "conversations" in row:
        return bool(t.values.get("data.assistant_only_loss"))
    return isinstance(row.get("completion"), list) and t.values.get("data.completion_only_loss") is not False


def is_dpo(table: dict) -> bool:
    losses = as_list(table.get("loss_type"))
    return bool(FOR_DPO & set(table)) or bool(losses) and not any(loss in FOR_SFT for loss in losses)


def common_differences(t: Translation) -> None:
    """The differences from every trainer on top of transformers' Trainer."""
    modules = t.values.get("lora.modules_to_save", ())
    if "lora.r" not in t.values or any("embed" in module for module in modules):
        t.difference(
            "the embedding of the pad token is trained here; there it is frozen if config.json names a pad_token_id, which in "
            "some models, as SmolLM2, is that of EOS"
        )
    if t.values.get("lora.use_dora") and t.values.get("train.weight_decay"):
        t.difference("DoRA's magnitudes do not decay; there weight_decay shrinks them too")
    if "checkpoint.save_total_limit" not in t.values:
        t.difference("checkpoint.save_total_limit: there every checkpoint is kept, here the newest 3 that verify")
    if "checkpoint.resume" not in t.values:
        t.difference(
            'checkpoint.resume = "auto": a run whose output_dir has a checkpoint resumes from it; there it starts anew'
        )
    if "data.eval_data" in t.values or t.values.get("data.eval_fraction"):
        t.difference(
            "eval_loss is the mean over all tokens; there it is a mean over batches, and depends on their size"
        )
    t.difference("seed: the same number gives another order of rows and other dropout")
    if t.values["trainer_type"] == "dpo":
        losses = t.values.get("dpo.loss_type", ())
        rows = "answers" if "kto" in losses else "pairs"
        if "kto" in losses:
            t.difference(
                "KTO: the answers that are set beside the prompts of other rows, for the KL term, are other ones"
            )
        t.difference(
            f"the loss is the mean over the {rows} of a whole step; there a short last micro-batch counts as much as others"
        )
        if t.values.get("lora.lora_dropout"):
            t.difference("dpo.disable_dropout is on, as there: lora_dropout has no effect")


def weights_in_bf16(t: Translation, key: str, why: str) -> None:
    """Weights without fp32 masters, rounded to the nearest, as theirs are, if the optimizer can do that here."""
    full_and_unable = "lora.r" not in t.values and t.values.get("train.optim", "adamw") not in ADAMW
    if full_and_unable:
        t.difference(f"{why}; here {t.values['train.optim']} keeps fp32 master weights")
        if key:
            t.nothing(key, 'train.weights_dtype = "bf16" goes with adamw only')
        return
    if key:
        t.into(key, "train.weights_dtype", "bf16")
    else:
        t.default("train.weights_dtype", "bf16", why)
    if "lora.r" not in t.values:
        t.default("train.stochastic_rounding", False, "theirs rounds weights to the nearest; small updates are lost")


def _model(t: Translation, lora_by_rank: bool) -> None:
    for key in ("chat_template", "chat_template_path"):
        template = t.get(key)
        if isinstance(template, str) and not template.endswith((".jinja", ".jinja2", ".j2")) and template != "chatml":
            t.nothing(key, "put the template into a .jinja file, and name that as model.chat_template")
    if t.get("model_revision") == "main":
        t.nothing("model_revision", "the repository's main branch, as here", harmless=True)
    rank = as_number(t.get("lora_r", t.get("lora_rank")))
    has_switch = "use_peft" in t.left
    uses_lora = t.on("use_peft") or lora_by_rank and not has_switch and bool(rank)
    without = "lora_r is not set" if lora_by_rank else "as in TRL without use_peft"
    for key in ("use_peft", *OF_LORA, "lora_rank"):
        if key in t.left and not uses_lora:
            t.nothing(
                key,
                "use_peft is off" if has_switch else f"all weights train, {without}",
                harmless=has_switch or not t.on(key),  # without the switch, a rank may be meant as one
            )
    if uses_lora:
        if has_switch:
            t.take("use_peft", TRANSLATED, "lora.r")
        t.table(OF_LORA | {"lora_rank": "lora.r"})
        for ours, value in LORA_DEFAULTS.values():
            t.default(ours, value, "TRL's default")
        if "lora.target_modules" not in t.values and not lora_by_rank:  # else ours, all-linear
            model = str(t.get("model_name_or_path", "")).lower().replace("-", "_")
            modules = next((m for name, m in ATTENTION_MODULES.items() if name in model), USUAL_MODULES)
            t.default("lora.target_modules", modules, "PEFT's default for this family; all-linear trains more")
    for key in ("load_in_4bit", "load_in_8bit", "use_4bit", "use_8bit"):
        if key in t.left and not uses_lora:
            t.nothing(key, "quantised weights need adapters: use_peft is off", harmless=not t.on(key))
    if t.get("lora_task_type") == "CAUSAL_LM":
        t.nothing("lora_task_type", "as here", harmless=True)
    in_4bit = t.on("load_in_4bit") or t.on("use_4bit")
    for key in (*OF_4BIT, "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
        if key in t.left and not in_4bit:
            t.nothing(key, "load_in_4bit is off", harmless=True)
    if in_4bit and not {"use_bnb_nested_quant", "bnb_4bit_use_double_quant"} & set(t.left):
        t.default("model.bnb_4bit_use_double_quant", False, "TRL's default")
    t.table(OF_4BIT)
    for key in ("dtype", "torch_dtype", "model_init_kwargs.dtype", "model_init_kwargs.torch_dtype"):
        if (dtype := t.get(key)) in ("bfloat16", "bf16"):
            weights_in_bf16(t, key, "TRL loads the weights in bf16")
        elif dtype in ("float32", "fp32"):
            t.nothing(key, "as here", harmless=True)
        elif key in t.left and dtype in (None, "auto"):
            t.nothing(
                key,
                'weights stay as they are stored there, mostly bf16: train.weights_dtype = "bf16"; here fp32 is usual',
            )
        elif key in t.left:
            t.nothing(key, "train.weights_dtype is fp32 or bf16")
    if t.on("activation_offloading"):
        t.default("model.gradient_checkpointing", True, "TRL's default")


def _sft(t: Translation, row: dict | None) -> None:
    if "loss_type" in t.left:
        if t.get("loss_type", "nll") in ("nll", "chunked_nll"):
            t.nothing("loss_type", "the same loss; it is always computed in pieces", harmless=True)
        else:
            t.nothing("loss_type", "this loss does not exist here: plain cross-entropy trains")
    if t.get("completion_only_loss") is None and "completion_only_loss" in t.left:
        t.nothing("completion_only_loss", "detected from the rows, as here", harmless=True)
    given = {name for name in ("completion_only_loss", "assistant_only_loss") if name in t.left}
    t.table(OF_SFT)
    for key in FOR_DPO & set(t.left):
        t.nothing(key, "preference tuning only")
    turns = row is not None and ("messages" in row or "conversations" in row)
    if row is None and "data.dataset_text_field" not in t.values and "dataset_text_field" not in t.left:
        if "assistant_only_loss" not in given and "completion_only_loss" not in given:
            t.default("data.completion_only_loss", True, "TRL trains the completion of rows with a prompt")
            t.default("data.assistant_only_loss", False, "TRL trains every turn of a conversation")
            t.difference("where rows are plain text, remove completion_only_loss and assistant_only_loss")
    elif turns and "assistant_only_loss" not in given:
        t.default("data.assistant_only_loss", False, "TRL trains every turn of a conversation")
    if t.values.get("data.assistant_only_loss"):
        t.difference(
            "assistant turns are found by rendering the conversation, there by {% generation %} marks of the template; what ends "
            "a turn is always trained"
        )


def _dpo(t: Translation, row: dict | None, loss: str | None) -> None:
    t.default("data.prompt_format", "plain", "TRL takes prompts and answers that are text as they are")
    for key in set(OF_SFT) & set(t.left):
        if key == "packing":
            t.into(key, "data.packing")
        else:
            t.nothing(key, "supervised fine-tuning only", harmless=not t.on(key))
    weight = t.number("rpo_alpha", "dpo.loss_weights")
    if weight is not None:  # an older name of a mixture
        losses = as_list(t.get("loss_type", "sigmoid"))
        t.take("rpo_alpha", TRANSLATED, "dpo.loss_type and dpo.loss_weights: sft is added")
        if "loss_type" in t.left:
            t.into("loss_type", "dpo.loss_type", [*losses, "sft"])
        t.values["dpo.loss_type"] = (*losses, "sft")
        t.values["dpo.loss_weights"] = (*(1.0 for _ in losses), weight)
        t.origins |= {"dpo.loss_type": "rpo_alpha", "dpo.loss_weights": "rpo_alpha"}
    t.table(OF_DPO)
    if loss and "dpo.loss_type" not in t.values:
        t.default("dpo.loss_type", (loss,), "the name of the stage")
    if "orpo" in t.values.get("dpo.loss_type", ()):
        t.difference(ORPO_PROMPT)
