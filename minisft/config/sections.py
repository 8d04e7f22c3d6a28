"""The configuration: one frozen dataclass for each section of the TOML file.

Every key is one line below: its name and type, its default, and the sentence that `--help` prints. The names are those
of Hugging Face and TRL; other trainers' names for the same thing are translated by aliases.py.

load.py reads a file and the command line into a `Config`; values.py checks one value, check.py all of them together. No part
of the engine below the loop sees the whole `Config`: a component takes plain arguments or its own section.
"""

from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from minisft.config.choices import OPTIMIZERS
from minisft.data.formats import FORMATS
from minisft.data.packing_strategies import STRATEGIES
from minisft.data.row_format import CHOICES, ON_BAD_ROW, TRUNCATIONS
from minisft.model.lora_options import INITS
from minisft.preference.losses import DIVERGENCES, LOSSES
from minisft.schedule import SCHEDULES
from minisft.trackers import TRACKERS

# The largest numbers that make sense. Arrays and loops of the engine are of these sizes.
MAX_LENGTH, MAX_LAYERS, MAX_RANK, MAX_BATCH = 2**24, 10_000, 2**16, 2**16
MAX_STEPS, MAX_EPOCHS, MAX_FACTOR = 10**9, 10**6, 1e6

# A Literal of a table's names, as in Literal[tuple(SCHEDULES)], is exact at run time and unknown to a type checker.
# pyright: reportInvalidTypeForm=false


def option(default: Any, help: str, **limits: Any) -> Any:
    """One key: default, line of --help, and limits: above, at_least, below, at_most, of all numbers in it (values.py has those of
    keys that name none); of = the type of a table's values; is_path = "data" | "model" | "folder"."""
    metadata = {"help": help, **limits}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


Sources = str | list | dict | None  # a path, a table with the fields of data/sources.py's Source, or a list of these
PairLoss = Literal[*LOSSES, "kto"]


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model and its tokenizer."""

    model_name_or_path: str | None = option(
        None, "a local folder, a GGUF file or a Hugging Face repository", is_path="model"
    )
    revision: str | None = option(None, "branch, tag or commit of that repository")
    config: dict | None = option(None, "a Hugging Face config as a table: train from random weights instead")
    tokenizer_name_or_path: str | None = option(None, "folder or repository; none = the model's", is_path="model")
    chat_template: str | None = option(
        None, '"chatml", a .jinja file or the name of one of the tokenizer\'s; none = its default', is_path="data"
    )
    chat_template_kwargs: dict = option({}, "variables for the template, as in {enable_thinking = false}")
    template_date: str | None = option(None, "the date that templates see, as in 2026-01-31; none = today")
    eos_token: str | None = option(None, "another end-of-sequence token than the tokenizer's")
    pad_token: str | None = option(None, "another pad token; saved with the tokenizer, batches here have no padding")
    new_special_tokens: tuple[str, ...] = option((), "added to the tokenizer; their embeddings start at the mean")
    local_files_only: bool = option(False, "take hub repositories from the local cache, never from the network")
    kernels: Literal["auto", "triton", "torch", "reference"] = option(
        "auto", "auto = Triton on a GPU that has the kernel, torch elsewhere; reference = the naive formulas"
    )
    load_in_4bit: bool = option(False, "QLoRA: keep the frozen matrices of the layers in 4 bits; needs lora.r")
    load_in_8bit: bool = option(False, "the same in 8 bits, with one scale a row")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "the 16 values of 4 bits: normal quantiles, or a float")
    bnb_4bit_use_double_quant: bool = option(True, "keep the scales in 8 bits too: 0.516 bytes a parameter, not 0.563")
    gradient_checkpointing: bool | Literal["selective"] = option(
        False,
        "run each block again in the backward: least memory, 15 to 35 % slower; selective = only gated units and layer norms: "
        "a fifth of that saving, a few percent slower",
    )
    gradient_checkpointing_every: int = option(1, "with true: only every n-th block", at_least=1, at_most=MAX_LAYERS)
    offload_activations: bool = option(
        False, "with true: keep the blocks' inputs in CPU memory; only useful on a GPU that is too small otherwise"
    )


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Train thin matrices beside the frozen ones instead of the weights themselves; on if r is set."""

    r: int | None = option(None, "rank of the adapters; none = train all weights", at_least=1, at_most=MAX_RANK)
    lora_alpha: float = option(32.0, "adapters are scaled by lora_alpha / r", above=0, at_most=MAX_FACTOR)
    lora_dropout: float = option(0.0, "dropout on the adapters' input", at_least=0, below=1)
    target_modules: str | tuple[str, ...] = option(
        "all-linear", "ends of module names, as in the model's files; or one regular expression of whole names"
    )
    layers_to_transform: tuple[int, ...] | None = option(
        None, "numbers of the layers with adapters; none = all", at_least=0, at_most=MAX_LAYERS
    )
    rank_pattern: dict = option(
        {}, "other ranks, as in {down_proj = 4}; the keys are regular expressions", of=int, at_least=1, at_most=MAX_RANK
    )
    alpha_pattern: dict = option({}, "other lora_alpha, likewise", of=float, above=0, at_most=MAX_FACTOR)
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) (rank-stabilised LoRA)")
    use_dora: bool = option(False, "train the length of each row of a weight apart (DoRA)")
    init_lora_weights: Literal[INITS] = option(
        "kaiming",
        "how A starts, with B at zero; pissa = both start at the matrix's largest singular directions; niter = approximately, "
        "and fast",
    )
    loraplus_lr_ratio: float = option(
        1.0, "learning rate of B over that of A (LoRA+; 16 is usual)", above=0, at_most=MAX_FACTOR
    )
    modules_to_save: tuple[str, ...] = option((), 'trained whole and saved with the adapter, as in ["lm_head"]')
    trainable_token_indices: tuple[int, ...] = option(
        (),
        "ids of tokens whose rows are trained, in the embedding and in the head; those of new_special_tokens always are",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The rows, which of their tokens are trained, and how they are packed."""

    train_data: Sources = option(
        None,
        "file or glob (.jsonl .json .csv .tsv .txt .parquet, also .gz and .zst), with a slice as in rows.jsonl[:10%]; or a "
        "hub repository, as owner/name; or a table {path, name, weight, split, format, field_map, ignore, revision, "
        "data_dir, data_files}; or a list of these",
        is_path="data",
    )
    eval_data: Sources = option(
        None, "the same for evaluation; or a table that gives each evaluation set a name", is_path="data"
    )
    eval_fraction: float = option(0.0, "part of the training rows held out for evaluation", at_least=0, below=1)
    format: Literal[("auto", *FORMATS)] = option("auto", "what a row looks like; auto = found out from its fields")
    field_map: dict = option({}, "your field = our field, as in {query = 'prompt', reply = 'completion'}", of=str)
    dataset_text_field: str = option("text", "field of plain text rows")
    prompt_format: Literal[CHOICES["prompt_format"]] = option(
        "auto", "prompt and answer through the chat template, or as plain text; auto = chat if there is a template"
    )
    response_marker: str | None = option(None, "plain text with turns inside: the marker that opens a trained turn")
    instruction_marker: str | None = option(None, "the marker that closes it")
    completion_only_loss: bool | None = option(None, "train the answer only; none = yes for rows with a prompt")
    assistant_only_loss: bool | None = option(None, "train the assistant's turns only; none = yes for conversations")
    train_on_last_turn_only: bool = option(False, "of a conversation, train the last answer only")
    multi_turn: Literal[CHOICES["multi_turn"]] = option(
        "auto",
        "joint = one document a conversation, refused where the template renders a turn differently than at inference; "
        "per_turn = one document an answer; auto = joint where exact, else per_turn",
    )
    reasoning: Literal[CHOICES["reasoning"]] = option(
        "train", "the reasoning in an answer: trained, shown but not trained, or removed"
    )
    control_tokens: Literal[CHOICES["control_tokens"]] = option(
        "error", "special tokens written inside a message: refuse the row, encode as plain text, or let them be tokens"
    )
    add_eos: bool = option(True, "end plain text with the EOS token")
    add_special_tokens: bool = option(True, "let the tokenizer add its own special tokens (BOS) to plain text")
    on_bad_row: Literal[ON_BAD_ROW] = option("error", "stop at a malformed row, or count and skip it")
    max_length: int | None = option(
        1024,
        "tokens of a document and of a pack; dpo: of a prompt with one answer; none = no limit",
        at_least=2,
        at_most=MAX_LENGTH,
    )
    truncation: Literal[TRUNCATIONS] = option(
        "right", "longer documents: the side that is cut off (and counted); turns = the oldest turns; or drop, or error"
    )
    packing: bool = option(False, "fill packs of max_length tokens with whole documents")
    packing_strategy: Literal[tuple(name for name in STRATEGIES if name != "none")] = option(
        "bfd", "best-fit or first-fit decreasing; bfd_split cuts long documents in pieces; wrapped cuts anywhere"
    )
    share_turns: bool | Literal["auto"] = option(
        "auto",
        "documents of one conversation (see multi_turn) have one copy of their common beginning: the same loss and gradients "
        "from fewer tokens; auto = where the model can",
    )
    eval_packing: bool | None = option(None, "packing for evaluation; none = as packing")
    shuffle: bool = option(True, "deal the rows anew every epoch")
    stream: bool = option(
        False,
        "never read the data as a whole: tokenise and train stream_rows rows at a time, while another process prepares the next "
        "ones; .jsonl and .parquet, local or of the hub; needs max_steps",
    )
    stream_mix: bool = option(
        False,
        "with stream: take rows from all sources at once, in proportion to their weights, and begin a source again where it "
        "ends; else one source comes after the other",
    )
    stream_rows: int = option(
        100_000, "with stream: rows of a chunk, in which they are shuffled and packed", at_least=1, at_most=MAX_STEPS
    )
    cache_dir: str | None = option(
        None, "folder of the token cache; none = token_cache beside output_dir", is_path="folder"
    )


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The optimizer, the schedule and the arithmetic of a step."""

    learning_rate: float = option(2e-5, "peak learning rate", above=0)
    lr_scheduler_type: Literal[*SCHEDULES] = option("linear", "learning rate after the warm-up; see schedule.py")
    lr_scheduler_kwargs: dict = option(
        {},
        "options of the schedule, as in {num_cycles = 3} or {decay_ratio = 0.2}",
        of=int | float | str | None,
        at_least=0,
    )
    min_lr: float = option(0.0, "learning rate at the end; inverse_sqrt and constant have no end", at_least=0)
    warmup_steps: int = option(0, "steps from 0 to the peak", at_least=0, at_most=MAX_STEPS)
    warmup_ratio: float = option(0.0, "the same as a part of all steps", at_least=0, at_most=1)
    num_train_epochs: float = option(3.0, "passes over the training data", above=0, at_most=MAX_EPOCHS)
    max_steps: int = option(
        -1, "number of optimizer steps; -1 = as num_train_epochs says", at_least=-1, at_most=MAX_STEPS
    )
    per_device_train_batch_size: int = option(8, "rows, or packs, of a micro-batch", at_least=1, at_most=MAX_BATCH)
    gradient_accumulation_steps: int = option(1, "micro-batches of an optimizer step", at_least=1, at_most=MAX_BATCH)
    optim: Literal[*OPTIMIZERS] = option(
        "adamw",
        "optimizer; optimizers.py has the update rule of each. adamw = torch's fused one; adamw_minisft = that of "
        "kernels/adamw.py, clipping included; adamw_8bit = the same with moments of 8 bits",
    )
    optim_args: dict = option({}, "options of the optimizer, as in {momentum = 0.9} for sgd and muon", of=float)
    trainable: tuple[str, ...] = option((), "train these parameters only: regular expressions of names; [] = all")
    frozen: tuple[str, ...] = option((), "do not train these; wins over trainable")
    unfreeze: dict = option(
        {},
        'not in the first steps, as in {"embed_tokens" = 100}: expression of a name -> how many',
        of=int,
        at_least=0,
        at_most=MAX_STEPS,
    )
    offload_optimizer: bool = option(
        False, "moments of adamw and adamw_8bit in CPU memory: less on the GPU, slower steps"
    )
    optimizer_in_backward: bool = option(
        False,
        "update each weight as soon as its gradient is there, and free that: gradients are never in memory together. No "
        "accumulation, no clipping; a gradient that is not finite stops the run, and the steps since the last save are lost",
    )
    cuda_graph: bool | Literal["auto"] = option(
        "auto",
        "on a GPU start all kernels of a micro-batch at once, as a CUDA graph, which matters for small models and short "
        "micro-batches; auto = where they can be recorded",
    )
    learning_rates: dict = option(
        {}, 'peaks of their own, as in {"embed_tokens|lm_head" = 1e-5}: name -> rate', of=float, at_least=0
    )
    weight_decay: float = option(0.0, "for matrices; biases and norms do not decay", at_least=0)
    weight_decays: dict = option({}, "weight decays of their own, likewise", of=float, at_least=0)
    adam_beta1: float = option(0.9, "decay of the mean of the gradients", at_least=0, below=1)
    adam_beta2: float = option(0.999, "decay of the mean of their squares", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "added to the denominator", above=0)
    max_grad_norm: float | None = option(1.0, "clip the gradient to this norm; none = measure, do not clip", above=0)
    precision: Literal["bf16", "fp32", "fp16", "auto"] = option(
        "bf16",
        "of the matrix products; master weights are fp32; auto = bf16 where the device computes in it, else fp32",
    )
    weights_dtype: Literal["fp32", "bf16"] = option(
        "fp32",
        "bf16 = no master weights: weights, the residual stream and gradients in bf16; micro-batches and ranks still add "
        "up in fp32. Needs adamw, adamw_minisft or adamw_8bit. With [lora] any optimizer: the adapters stay fp32, only the "
        "frozen base is bf16",
    )
    stochastic_rounding: bool = option(
        True, "round weights of bf16 up or down by chance, so that small updates add up; false = to the nearest"
    )
    loss_normalization: Literal["tokens", "micro_batch"] = option(
        "tokens", "mean over the trained tokens of the whole step, or mean of the micro-batches' means (classic)"
    )
    label_smoothing: float = option(
        0.0,
        "part of the target spread over the vocabulary; dpo: part of the pairs whose order is wrong",
        at_least=0,
        below=1,
    )
    z_loss: float = option(0.0, "weight of log(Z)^2", at_least=0)
    neftune_noise_alpha: float | None = option(None, "NEFTune: noise on the embeddings; 5 is usual", above=0)
    on_nonfinite: Literal["stop", "skip"] = option("stop", "a step with a NaN or inf gradient: stop, or count and skip")
    on_spike: Literal["warn", "skip", "stop", "rewind"] = option(
        "warn",
        "a step whose loss or gradient norm is far above those of the last steps: warn and count; skip = make no update; stop; "
        "rewind = go back to a checkpoint, and leave the rows of that step out from then on",
    )
    spike_threshold: float = option(8.0, "how far above, as a robust z-score; see spikes.py", above=0)
    rewind_steps: int = option(
        0, "rewind: to the newest checkpoint that is at least so many steps back", at_least=0, at_most=MAX_STEPS
    )
    max_rewinds: int = option(3, "rewind: after so many the next spike stops the run", at_least=1)
    max_skips_in_a_row: int = option(10, "more skipped steps in a row, not finite or spikes, stop the run", at_least=1)
    max_skips_share: float = option(
        0.1, "so does a larger part of all steps, once there are max_skips_in_a_row of them", above=0, at_most=1
    )
    on_oom: Literal["stop", "split"] = option(
        "stop",
        "out of memory: stop after a save of the step before; or split = halve the micro-batches and accumulate twice as many, "
        "for the rest of the run, which is the same step up to rounding (dropout and NEFTune draw other numbers)",
    )
    memory_check: bool | Literal["auto"] = option(
        "auto",
        "try the largest micro-batch before the first step; auto = on a GPU, and on a CPU where it is clearly larger than those "
        "of the first step",
    )
    seed: int = option(42, "of weights, order, dropout and held-out rows", at_least=0, at_most=2**32 - 1)
    deterministic: bool = option(False, "bitwise repeatable on a GPU too (always so on a CPU), slower")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto = the GPU if there is one")


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Several ranks (torchrun): whether each has the whole model or a part of it. See docs/scaling.md."""

    strategy: Literal["auto", "ddp", "fsdp2", "hsdp"] = option(
        "auto",
        "ddp = every rank has the whole model, and gradients are summed once a step; fsdp2 = every rank keeps a part of all "
        "matrices, their gradients and moments; hsdp = the same inside each of `replicas` groups; auto = ddp",
    )
    replicas: int = option(2, "hsdp: groups of ranks that each have the whole model", at_least=2, at_most=MAX_BATCH)
    reshard_after_forward: bool = option(
        True, "fsdp2, hsdp: free a block's whole weights after its forward; false = more memory, fewer messages"
    )
    cpu_offload: bool = option(
        False,
        "fsdp2, hsdp: this rank's rows of the matrices, their gradients and moments are in the memory of the CPU, where they are "
        "updated too; blocks are copied to the GPU for their passes. For models that do not fit otherwise: steps are much slower",
    )
    context_parallel: int = option(
        1,
        "ranks that share each micro-batch: every one of them has a part of the tokens of its documents; for documents whose "
        "activations do not fit on one device",
        at_least=1,
        at_most=MAX_BATCH,
    )


@dataclass(frozen=True, kw_only=True)
class DpoSection:
    """Preference tuning, for trainer_type = "dpo": the loss and the reference."""

    loss_type: tuple[PairLoss, ...] = option(
        ("sigmoid",), "loss of a pair, or several that are added up; preference/losses.py has the equations. kto takes "
        "single answers with a label, or the answers of pairs one by one"
    )  # fmt: skip
    loss_weights: tuple[float, ...] = option((), "weights of the losses of a mixture; [] = 1 each", at_least=0)
    beta: float = option(0.1, "how far the policy may move from the reference: less = further", above=0)
    f_divergence_type: Literal[*DIVERGENCES] = option("reverse_kl", "the distance to the reference that is held small")
    f_alpha_divergence_coef: float = option(0.5, "alpha of the alpha_divergence")
    discopop_tau: float = option(0.05, "temperature of discopop", above=0)
    simpo_gamma: float = option(0.5, "target margin of simpo", at_least=0)
    ld_alpha: float | None = option(
        None,
        "LD-DPO: weight of an answer's tokens beyond the length of the shorter answer; none = 1 (plain DPO)",
        at_least=0,
        at_most=1,
    )
    use_weighting: bool = option(False, "WPO: pairs that are unlikely under the policy count less")
    desirable_weight: float = option(1.0, "kto: weight of the good answers", at_least=0)
    undesirable_weight: float = option(1.0, "kto: weight of the bad answers", at_least=0)
    ref_model_name_or_path: str | None = option(
        None, "another model as the reference; none = the policy as it starts", is_path="model"
    )
    precompute_ref_log_probs: bool = option(
        False,
        "compute the reference's log-probabilities once, before the first step, and keep them on disk: no reference in memory",
    )
    precompute_ref_batch_size: int | None = option(
        None,
        "rows, or packs, at once for that; none = evaluate.per_device_eval_batch_size",
        at_least=1,
        at_most=MAX_BATCH,
    )
    sync_ref_model: bool = option(False, "TR-DPO: let the reference follow the policy")
    ref_model_mixup_alpha: float = option(
        0.6, "TR-DPO: the part of the policy in the new reference", above=0, at_most=1
    )
    ref_model_sync_steps: int = option(512, "TR-DPO: every so many steps", at_least=1, at_most=MAX_STEPS)
    share_prompt: bool = option(
        False, "both answers of a pair follow one copy of the prompt: the same numbers from fewer tokens"
    )
    disable_dropout: bool = option(True, "train without dropout, so that policy and reference differ by weights alone")


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """Loss on held-out rows, and sampled answers."""

    eval_steps: int | Literal["epoch", "never"] = option(
        500, "evaluate every so many steps, or after every epoch, and at the end", at_least=1, at_most=MAX_STEPS
    )
    eval_on_start: bool = option(False, "evaluate before the first step too")
    metric_for_best_model: str | None = option(
        None,
        "save a checkpoint whenever this metric of the evaluations is better than ever, and never rotate the best one away; "
        'as in "eval_loss", which none means where one of the next keys is set',
    )
    greater_is_better: bool | None = option(None, "none = as the name of that metric says")
    load_best_model_at_end: bool = option(False, "export the best evaluated model, not the last one")
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations in a row that are not better", at_least=1
    )
    early_stopping_threshold: float = option(0.0, "by how much they must be better", at_least=0)
    per_device_eval_batch_size: int = option(8, "rows, or packs, of an evaluation batch", at_least=1, at_most=MAX_BATCH)
    generate_data: str | None = option(
        None, "prompt/completion rows to answer by sampling, scored by exact match", is_path="data"
    )
    generate_group_field: str | None = option(None, "report the exact match for each value of this field")
    max_new_tokens: int = option(64, "length limit of a sampled answer", at_least=1, at_most=2**20)
    generate_samples_shown: int = option(5, "answers printed, and sampled every sample_steps", at_least=0)
    sample_steps: int | Literal["epoch", "never"] = option(
        "never",
        "complete a few prompts before the first step and every so many steps, and show the answers in the trackers and in "
        "step_samples.jsonl; the prompts are of generate_data, else of the evaluation data, else of the training data",
        at_least=1,
        at_most=MAX_STEPS,
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """What is saved, and where a run starts again."""

    save_steps: int | Literal["epoch", "never"] = option(
        500, "save every so many steps, or after every epoch, and at the end", at_least=1, at_most=MAX_STEPS
    )
    save_total_limit: int = option(
        3, "verified checkpoints kept, besides the best one and those with a file `keep` in their folder", at_least=1
    )
    save_async: bool = option(
        False, "write checkpoints in the background while steps go on; takes memory of the size of a checkpoint"
    )
    resume: str = option(
        "auto", '"auto" = the newest checkpoint that verifies; "never"; or a checkpoint folder', is_path="folder"
    )
    save_dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None, "of the final model folder; none = weights_dtype. Checkpoints are exact"
    )


@dataclass(frozen=True, kw_only=True)
class AuditSection:
    """Largest share of documents with each problem, 1 = any. `minisft audit` checks all, runs all but the last four."""

    max_no_label: float = option(0.05, "documents with nothing to train", at_least=0, at_most=1)
    max_lost_answer: float = option(0.05, "nothing left to train after the cut at max_length", at_least=0, at_most=1)
    max_cut_answer: float = option(0.5, "a part of the trained tokens is lost to that cut", at_least=0, at_most=1)
    max_too_long: float = option(1.0, "longer than max_length", at_least=0, at_most=1)
    max_untrained_end: float = option(0.01, "an answer whose end is not trained", at_least=0, at_most=1)
    max_double_bos: float = option(0.0, "two BOS tokens at the beginning", at_least=0, at_most=1)
    max_control_token: float = option(1.0, "rows with a control token in a message", at_least=0, at_most=1)
    max_straddling: float = option(1.0, "trained tokens that are only in part trained text", at_least=0, at_most=1)
    max_round_trip: float = option(1.0, "text that is encoded to other tokens", at_least=0, at_most=1)
    max_duplicate: float = option(0.5, "a copy of an earlier document", at_least=0, at_most=1)
    max_eval_overlap: float = option(0.0, "evaluation documents that are trained on too", at_least=0, at_most=1)
    max_eval_prompt_overlap: float = option(1.0, "the same, of their prompts only", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class LogSection:
    """The console and the trackers; metrics always go to output_dir as JSONL."""

    logging_steps: int = option(10, "log every so many steps", at_least=1, at_most=MAX_STEPS)
    zero_update_fraction: bool | None = option(
        None, "log the share of the weights that a step's update did not change; none = only for bf16 weights"
    )
    report_to: tuple[Literal[tuple(TRACKERS)], ...] = option(("tensorboard",), "trackers; [] = none")
    run_name: str | None = option(None, "name of the run in the trackers; none = the output folder's")
    progress_bar: bool = option(True, "one tqdm bar")
    ledger: bool = option(
        False, "write down the loss of every document in every step, 8 bytes each; `minisft ledger` reads it"
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The run as a whole."""

    trainer_type: Literal["sft", "dpo"] = option(
        "sft", "objective: supervised fine-tuning, or preference tuning (then learning_rate is 1e-6 unless set)"
    )
    output_dir: str = option("output", "folder of the run, relative to the working directory", is_path="folder")
    verbose: bool = option(False, "show the first example with its trained tokens marked, and more")
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    dpo: DpoSection = field(default_factory=DpoSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    audit: AuditSection = field(default_factory=AuditSection)
    log: LogSection = field(default_factory=LogSection)


SECTIONS: dict[str, type] = {
    f.name: f.type for f in fields(Config) if isinstance(f.type, type) and is_dataclass(f.type)
}

# Every key under its full name: "output_dir", "train.learning_rate", ...
KEYS: dict[str, Field] = {f.name: f for f in fields(Config) if f.name not in SECTIONS}
KEYS |= {f"{name}.{f.name}": f for name, section in SECTIONS.items() for f in fields(section)}


def source_list(value: Sources) -> list[str | dict]:
    """`data.train_data` as a list of sources, whichever way it was written."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def eval_sets(value: Sources) -> dict[str, list[str | dict]]:
    """`data.eval_data` as {name of the evaluation set: its sources}; the name is "" where none was given."""
    if isinstance(value, dict) and "path" not in value:
        return {name: source_list(sources) for name, sources in value.items()}
    return {"": source_list(value)} if value else {}


def config_to_dict(config: Config) -> dict[str, Any]:
    """{full name: value} of every key, for comparing two runs key by key."""
    sections = {name: getattr(config, name) for name in SECTIONS}
    return {key: getattr(sections.get(key.rpartition(".")[0], config), f.name) for key, f in KEYS.items()}
