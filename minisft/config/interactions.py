"""Which keys of the configuration act on each other, and how: what `minisft explain` and docs/configuration.md say beside the
sentence of each key in sections.py. A test compares the table with the rules of check.py: keys that can contradict each other
are in a line here.
"""

TOGETHER: tuple[tuple[str, str], ...] = (  # (keys, what they do to each other)
    ("model.model_name_or_path model.config", "a trained model, or random weights in this shape: one of them"),
    ("model.model_name_or_path model.revision", "the commit of a repository; of a local folder nothing"),
    ("model.model_name_or_path model.tokenizer_name_or_path", "the tokenizer is the model's unless it is named"),
    ("model.load_in_4bit model.load_in_8bit lora.r", "quantised weights cannot train, so an adapter must"),
    ("model.load_in_4bit model.bnb_4bit_quant_type model.bnb_4bit_use_double_quant", "how the 4 bits are coded"),
    (
        "model.gradient_checkpointing model.gradient_checkpointing_every model.offload_activations",
        "the last two concern the blocks that are run again, so they need true",
    ),
    ("model.kernels train.precision", "the backend computes in this precision; the reference formulas do so too"),
    ("lora.r lora.lora_alpha lora.use_rslora", "an adapter is scaled by lora_alpha / r, or by lora_alpha / sqrt(r)"),
    ("lora.r train.learning_rate", "adapters want about ten times the rate of full fine-tuning, 1e-4 to 2e-4"),
    ("lora.r train.trainable train.frozen", "with adapters the model is frozen: they and modules_to_save train"),
    ("lora.r lora.target_modules lora.rank_pattern lora.layers_to_transform", "where adapters are, and of what rank"),
    ("data.train_data data.format data.field_map", "a source may name its own format and fields, which come first"),
    ("data.eval_data data.eval_fraction", "evaluation rows come from one of them"),
    ("data.max_length data.truncation", "what is longer is cut on this side, dropped or refused"),
    ("data.max_length data.packing data.eval_packing", "the length of a pack, so packing needs one"),
    (
        "data.packing train.per_device_train_batch_size train.learning_rate",
        "a micro-batch then has so many packs, each of many rows: fewer and larger steps, which may want a higher rate",
    ),
    ("data.packing data.packing_strategy", "which documents share a pack; only bfd and ffd leave all of them whole"),
    ("data.share_turns data.multi_turn data.packing_strategy", "documents of one conversation, whole, in one pack"),
    ("data.share_turns train.neftune_noise_alpha", "a shared token would have the noise of one document"),
    ("data.share_turns trainer_type", "in preference tuning answers share their prompt by dpo.share_prompt"),
    ("data.stream data.stream_rows", "rows of a chunk, which are shuffled and packed together"),
    (
        "data.stream data.stream_mix data.train_data",
        "rows of all sources at once, with their weights for shares of the rows",
    ),
    ("data.stream dpo.precompute_ref_log_probs", "before the first step only the first chunk is there"),
    (
        "data.stream train.max_steps data.eval_fraction evaluate.eval_steps checkpoint.save_steps",
        "all rows are never known: steps are counted, evaluation rows named, intervals numbers",
    ),
    ("data.instruction_marker data.response_marker", "the one closes the turn that the other opens"),
    (
        "train.per_device_train_batch_size train.gradient_accumulation_steps",
        "rows of a step = rows x micro-batches x ranks: the loss does not depend on the split, memory does",
    ),
    ("train.num_train_epochs train.max_steps", "the number of steps; max_steps wins"),
    ("train.learning_rate train.min_lr train.lr_scheduler_type", "from the peak to the end"),
    ("train.warmup_steps train.warmup_ratio", "one warm-up, as steps or as a part of all: one of them"),
    ("train.lr_scheduler_type train.lr_scheduler_kwargs", "the options of that schedule"),
    ("train.optim train.optim_args", "the options of that optimizer"),
    ("train.optim train.lr_scheduler_type", "schedule_free_adamw averages instead of lowering the rate: constant"),
    ("train.optim train.adam_beta1 train.adam_beta2 train.adam_epsilon", "decays of its moments"),
    ("train.optim train.offload_optimizer train.weights_dtype", "both need adamw, adamw_minisft or adamw_8bit"),
    ("train.weights_dtype train.precision train.stochastic_rounding", "weights in bf16 are multiplied in bf16"),
    (
        "train.optimizer_in_backward train.gradient_accumulation_steps train.max_grad_norm train.precision "
        "train.on_nonfinite train.on_spike train.on_oom",
        "an update inside the backward cannot be summed, clipped, left out or made again",
    ),
    ("train.on_oom train.loss_normalization", "smaller micro-batches have other means of means"),
    ("train.on_oom dpo.loss_type", "so have losses that compare the pairs of a micro-batch"),
    ("train.on_spike checkpoint.save_steps", "rewind needs a checkpoint to go back to"),
    (
        "parallel.strategy train.on_oom train.cuda_graph",
        "with sharded weights no micro-batch is split, and no step is a CUDA graph",
    ),
    (
        "parallel.strategy train.optimizer_in_backward lora.r train.optim",
        "on several ranks updates inside the backward need sharded weights: no adapters, which are whole, and no muon",
    ),
    (
        "parallel.context_parallel train.neftune_noise_alpha train.loss_normalization train.cuda_graph train.on_oom "
        "dpo.ld_alpha",
        "what needs a whole document on one rank is refused where documents are split",
    ),
    ("parallel.strategy parallel.replicas parallel.reshard_after_forward parallel.cpu_offload", "options of sharding"),
    ("parallel.cpu_offload train.optim", "a CPU is too slow for muon's products"),
    (
        "parallel.cpu_offload train.offload_optimizer",
        "with both the moments of vectors and adapters, which stay on the GPU, are in the memory of the CPU too",
    ),
    ("trainer_type train.learning_rate", "preference tuning starts from 1e-6 unless a rate is set"),
    (
        "trainer_type data.packing_strategy data.truncation data.format data.completion_only_loss "
        "data.assistant_only_loss train.neftune_noise_alpha train.z_loss",
        "a pair is never cut in pieces, only its answers count, and noise or another loss would not cancel",
    ),
    ("dpo.loss_type dpo.loss_weights", "a weight for each loss of a mixture"),
    ("dpo.loss_type train.label_smoothing", "robust wants less than 0.5, exo_pair more than 0"),
    (
        "dpo.loss_type dpo.use_weighting dpo.ld_alpha",
        "both compare the answers of a pair, which kto and aot do not have",
    ),
    ("dpo.loss_type dpo.f_divergence_type dpo.f_alpha_divergence_coef", "of losses that are made of a divergence"),
    (
        "dpo.loss_type dpo.precompute_ref_log_probs dpo.sync_ref_model dpo.ref_model_name_or_path",
        "sft, simpo and orpo have no reference",
    ),
    ("dpo.sync_ref_model dpo.ref_model_mixup_alpha dpo.ref_model_sync_steps", "how the reference follows"),
    ("dpo.sync_ref_model dpo.precompute_ref_log_probs", "a reference that moves cannot be computed before"),
    ("dpo.sync_ref_model dpo.ref_model_name_or_path", "a reference that follows is a copy of the policy"),
    ("dpo.desirable_weight dpo.undesirable_weight", "one of them above 0"),
    ("dpo.beta dpo.loss_type", "how far the policy may move; without a reference it scales the mean of a token"),
    ("evaluate.eval_steps data.eval_data data.eval_fraction", "there must be rows to evaluate"),
    (
        "evaluate.eval_steps evaluate.metric_for_best_model evaluate.greater_is_better evaluate.load_best_model_at_end "
        "evaluate.early_stopping_patience",
        "the best is found among evaluations, so there must be some",
    ),
    ("evaluate.early_stopping_patience evaluate.early_stopping_threshold", "by how much better counts as better"),
    ("evaluate.generate_data evaluate.generate_group_field evaluate.max_new_tokens", "answers at the end"),
    ("checkpoint.save_steps checkpoint.save_total_limit", "the newest are kept, besides the best and pinned ones"),
    (
        "checkpoint.save_steps checkpoint.save_async",
        "a save that takes longer than the steps up to the next one is waited for",
    ),
    ("checkpoint.resume output_dir", "the same folder and auto: the same command goes on where it was"),
    ("checkpoint.save_dtype train.weights_dtype", "the dtype of the exported model, which is that of the weights"),
    ("log.report_to log.run_name", "trackers and the name of the run in them"),
)


def of_key(key: str) -> list[tuple[list[str], str]]:
    """[(the other keys, what they do to each other)]"""
    lines = ((keys.split(), text) for keys, text in TOGETHER)
    return [([other for other in keys if other != key], text) for keys, text in lines if key in keys]
