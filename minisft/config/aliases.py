"""Other trainers' keys and values: their names here, and those that are not needed or not supported."""

from typing import Any

ATTENTION = {
    "flash_attention_2": "auto",
    "flash_attn2": "auto",
    "sdpa": "torch",
    "vanilla": "torch",
    "eager": "reference",
}

# Other trainers' names. "theirs": "ours", or ("ours", {their value: our value}) where the values differ; None as our value
# means that theirs has no effect.
ALIASES: dict[str, str | tuple[str, dict]] = {
    "model_name": "model.model_name_or_path",
    "repo_id": "model.model_name_or_path",
    "base_model": "model.model_name_or_path",
    "model_revision": "model.revision",
    "tokenizer_name": "model.tokenizer_name_or_path",
    "chat_template_path": "model.chat_template",
    "add_tokens": "model.new_special_tokens",
    "mask_history": "data.train_on_last_turn_only",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_4bit": "model.load_in_4bit",
    "use_8bit": "model.load_in_8bit",
    "quantization_type": "model.bnb_4bit_quant_type",
    "use_bnb_nested_quant": "model.bnb_4bit_use_double_quant",
    "double_quantization": "model.bnb_4bit_use_double_quant",
    "use_gradient_checkpointing": "model.gradient_checkpointing",
    "activation_checkpointing": "model.gradient_checkpointing",
    "activation_offloading": "model.offload_activations",
    "enable_activation_offloading": "model.offload_activations",
    "use_flash_attention": ("model.kernels", {True: "auto", False: "torch"}),
    "use_liger_kernel": ("model.kernels", {True: "auto", False: "torch"}),
    "attn_mechanism": ("model.kernels", ATTENTION),
    "attn_implementation": ("model.kernels", ATTENTION),
    "train_file": "data.train_data",
    "train_dataset": "data.train_data",
    "dataset_name": "data.train_data",
    "dataset_path": "data.train_data",
    "dataset_name_or_path": "data.train_data",
    "dataset_split": "data.train_data.split",
    "dataset_train_split": "data.train_data.split",
    "dataset_config": "data.train_data.name",
    "dataset_config_name": "data.train_data.name",
    "data_dir": "data.train_data.data_dir",
    "validation_file": "data.eval_data",
    "eval_file": "data.eval_data",
    "eval_dataset": "data.eval_data",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "max_seq_length": "data.max_length",
    "max_sequence_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "truncation_mode": "data.truncation",
    "sample_packing": "data.packing",
    "train_on_inputs": ("data.completion_only_loss", {True: False, False: True}),
    "unfrozen_parameters": "train.trainable",
    "lr": "train.learning_rate",
    "learning_rate_end": "train.min_lr",
    "scheduler": "train.lr_scheduler_type",
    "lr_scheduler": "train.lr_scheduler_type",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "max_iters": "train.max_steps",
    "batch_size": "train.per_device_train_batch_size",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "total_batch_size": "train.gradient_accumulation_steps",  # divided by the rows of a micro-batch: see config/load.py
    "optimizer": "train.optim",
    "pure_bf16": ("train.weights_dtype", {True: "bf16", False: "fp32"}),
    "optimizer_in_bwd": "train.optimizer_in_backward",
    "beta1": "train.adam_beta1",
    "beta2": "train.adam_beta2",
    "eps": "train.adam_epsilon",
    "grad_clip": "train.max_grad_norm",
    "bf16": ("train.precision", {True: "bf16", False: "fp32"}),
    "fp16": ("train.precision", {True: "fp16", False: None}),  # false says nothing about which other precision
    "label_smoothing_factor": "train.label_smoothing",
    "data_seed": "train.seed",
    "eval_strategy": ("evaluate.eval_steps", {"epoch": "epoch", "no": "never", "steps": None}),
    "evaluation_strategy": ("evaluate.eval_steps", {"epoch": "epoch", "no": "never", "steps": None}),
    "save_strategy": ("checkpoint.save_steps", {"epoch": "epoch", "no": "never", "best": "never", "steps": None}),
    "save_directory": "output_dir",
    "eval_batch_size": "evaluate.per_device_eval_batch_size",
    "resume_from_checkpoint": ("checkpoint.resume", {True: "auto", False: "never"}),
    "enable_tracking": ("log.report_to", {True: ["trackio"], False: []}),
    "use_wandb": ("log.report_to", {True: ["wandb"], False: None}),
    "experiment_name": "log.run_name",
    "disable_tqdm": ("log.progress_bar", {True: False, False: True}),
}

# Other trainers' values of our own keys.
VALUE_ALIASES: dict[str, dict[str, Any]] = {
    "data.packing_strategy": {"bfd-requeue": "bfd_split"},
    "data.truncation": {"keep_start": "right", "keep_end": "left"},
    "train.lr_scheduler_type": {
        "cosine_with_min_lr": "cosine",
        "constant_with_warmup": "constant",
        "wsd": "warmup_stable_decay",
        "reduce_lr_on_plateau": "reduce_on_plateau",
    },
    "train.optim": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw8bit": "adamw_8bit",
        "adamw_torch_8bit": "adamw_8bit",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "adamw",
        "paged_adamw_32bit": "adamw",
        "paged_adamw_8bit": "adamw_8bit",
    },
    "dpo.loss_type": {"nll": None},  # TRL's name for the loss of SFT
    "log.report_to": {"none": []},
}

# Notes that are printed with values whose translation says only a part.
VALUE_NOTES: dict[str, str] = dict.fromkeys(
    ("paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"),
    "train.offload_optimizer = true keeps its moments in CPU memory",
)

# Keys that nothing here needs: accepted with a notice that says why.
NOT_NEEDED: dict[str, str] = {
    "dataset_num_proc": "the tokenizer uses every core by itself",
    "dataloader_num_workers": "batches are cut from a memory-mapped cache, which takes no workers",
    "bnb_4bit_compute_dtype": "quantised weights are multiplied in train.precision like all others",
    "shuffle_dataset": "rows are dealt anew every epoch, as TRL does too without it; data.shuffle = false keeps their order",
    "remove_unused_columns": "fields that no format names are never read",
    "do_last_save": "the last step is always saved",
    "num_of_sequences": "packing plans the whole data set at once; with data.stream = true the buffer is data.stream_rows",
    "chars_per_token": "packing counts the tokens and does not estimate them",
    "dataset_batch_size": "the tokenizer takes rows in batches of its own size",
    "group_by_length": "there is no padding, so rows of one length need not be together",
    "tf32": "matrix products are computed in train.precision, and those of fp32 in full fp32",
    "stage_name": "a stage is named after its file",
}

# Keys of things that minisft does not do: refused, unless they are false.
UNSUPPORTED: dict[str, str] = {
    "use_peft": "adapters are switched on by a rank: lora.r = 16",
    "trackio_url": 'with report_to = "trackio" the environment names the server: TRACKIO_SERVER_URL',
    "deepspeed": 'parallel.strategy = "fsdp2" shards weights over the ranks of torchrun; these options are not read',
    "fsdp": 'parallel.strategy = "fsdp2" shards weights over the ranks of torchrun; these options are not read',
    "torch_compile": "torch.compile is not used; the kernels are compiled already",
    "dataset_kwargs": "use data.add_special_tokens and data.add_eos; rows that are token ids already need no option",
    "hub_model_id": "a run uploads nothing; afterwards: minisft export RUN OUT --push owner/name",
    "push_to_hub": "a run uploads nothing; afterwards: minisft export RUN OUT --push owner/name",
    "trust_remote_code": "code from a model repository never runs here",
}
