"""What a decoder can be: one program with switches.

A model family is a setting of these switches. The defaults are Llama's, so a family only says where it differs
(families.py). The decoder reads nothing else and never asks which family it is.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Rope:
    """One table of rotary position embeddings: the base frequency, and how it is stretched for longer contexts.

    rope.py has the formulas. Nothing here depends on a batch: what transformers decides per batch (dynamic, longrope)
    is decided once, when the config is read.
    """

    dim: int  # features of a head that turn, an even number; the others pass through
    theta: float = 10000.0
    kind: str = "default"  # "default" | "linear" | "dynamic" | "llama3" | "yarn" | "longrope"
    factor: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin, and so the products of queries and keys by its square
    original_max_position_embeddings: int = 8192  # llama3, yarn: the context that the model was first trained with
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    query_beta: float = 0.0  # queries are multiplied by 1 + beta log(1 + floor(position / original context))
    pair_factors: tuple[float, ...] = ()  # longrope: one a pair, the short or the long list
    note: str = field(default="", compare=False)  # what was decided, in words


# qk_norm with a LayerNorm of each head: one weight and bias for all heads; a weight for each head, all in one tensor;
# a weight for each head, in a tensor of its own.
QK_LAYER_NORMS = ("layer", "layer_by_head", "layer_apart")


@dataclass(frozen=True)
class ModelConfig:
    """The switches of the decoder. `hf` is config.json as it was read, so that saving keeps every key."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int

    # ---- norms
    norm_eps: float
    norm: str = "rms"  # "rms" | "layer"
    norm_weight: bool = True
    norm_bias: bool = False
    norm_offset: float = 0.0  # 1: the files hold weight - 1
    norm_in_fp32: bool = False  # RMSNorm multiplies by the weight before it rounds, not after

    # ---- blocks (decoder.py and blocks.py)
    block: str = "pre"  # "pre" | "scaled" | "post" | "sandwich" | "parallel"
    residual_multiplier: float = 1.0  # scaled: multiplies the output of each sublayer
    mlp_has_norm: bool = False  # parallel: the MLP has a norm of its own, else it reads what attention reads
    sum_branches_first: bool = False  # parallel: (attention + mlp) + x, else (x + attention) + mlp; rounds differently

    # ---- what mixes the tokens, per layer: "attention" | "delta" (gated_delta_net.py) | "conv" (short_convolution.py)
    mixers: tuple[str, ...] = ()
    delta_num_key_heads: int = 0
    delta_num_value_heads: int = 0
    delta_key_dim: int = 0  # features of a head
    delta_value_dim: int = 0
    delta_beta_scale: float = 1.0  # 2: the memory may be reflected, not only be overwritten
    delta_norm_eps: float = 1e-6
    conv_size: int = 0  # tokens that a convolution sees, of "delta" and "conv"
    conv_bias: bool = False

    # ---- attention
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = "none"  # "none" | "head": RMSNorm of each head | "full": of all heads together | see QK_LAYER_NORMS
    qk_norm_after_rope: bool = False  # "head" only
    clip_qkv: float | None = None  # q, k and v are clamped to +-clip_qkv
    attention_scale: float = 1.0  # the factor of q.k before the softmax
    attention_scale_by_layer: bool = False  # divide it by (layer + 1) as well
    attention_gate: bool = False  # the output times the sigmoid of a projection, which q_proj has beside each head of q
    attention_softcap: float | None = None  # scores become c tanh(score / c)
    windows: tuple[int | None, ...] = ()  # per layer: how many of the newest tokens a query sees; None: all

    # ---- positions
    ropes: tuple[Rope | None, ...] = ()  # per layer; None: the layer has no rotary embedding
    rope_interleaved: bool = False  # pairs are neighbours (2i, 2i + 1), else (i, i + dim / 2)
    rope_in_fp32: bool = False  # else cos and sin are rounded to the dtype of the residual stream
    learned_positions: bool = False  # an embedding of the position is added to that of the token

    # ---- MLP
    mlp: str = "glu"  # "glu": down(act(gate) * up) | "plain": down(act(up))
    activation: str = "silu"  # "silu" (glu only) | "gelu" | "gelu_tanh" | "relu2": squared ReLU (plain only)
    mlp_bias: bool = False

    # ---- embedding and head: logits = softcap(logit_scale * (W h + bias))
    embedding_multiplier: float = 1.0  # rounded to the dtype of the embedding
    tie_word_embeddings: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    # ---- training
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0  # of the probabilities
    attention_output_dropout: float = 0.0
    mlp_output_dropout: float = 0.0
    initializer_range: float = 0.02
    depth_scaled_init: bool = False  # the projections into the residual stream start at 1 / sqrt(2 num_layers)

    stored_vocab_size: int = field(default=0, compare=False)  # embedding rows in the files that it is loaded from
    notes: tuple[str, ...] = field(default=(), compare=False)  # decisions that from_hf made and a user should see
    hf: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def has_states(self) -> bool:
        """Whether a layer remembers one past only, so that documents cannot share a prefix."""
        return any(mixer != "attention" for mixer in self.mixers)


def longest_tree(config: ModelConfig) -> int | None:
    """The most tokens of documents that share their beginnings (data/shared_turns.py): None = no limit, 0 = none share it.

    Attention can tell the documents apart, and a window sees a shorter tree as a whole. A layer whose state is carried along
    the stream has one past for all that follows.
    """
    if config.has_states:
        return 0
    return min((window for window in config.windows if window is not None), default=None)


def with_vocab_size(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """The same model with more embedding rows than its files have; load_weights fills the new rows with the mean of
    the old ones, in the embedding and in the head."""
    assert vocab_size >= config.vocab_size, f"{vocab_size} rows would cut off some of {config.vocab_size}"
    return replace(config, vocab_size=vocab_size)


def without_dropout(config: ModelConfig) -> ModelConfig:
    """The same model without dropout in training; its saved config.json keeps the original rates."""
    names = ("attention_dropout", "attention_output_dropout", "mlp_output_dropout", "embedding_dropout")
    return replace(config, **dict.fromkeys(names, 0.0))
