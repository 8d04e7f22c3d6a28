"""What a block keeps for its backward pass, in bytes a token: the tensors that autograd saves, each counted once.

    D residual stream, w bytes a number      E = w, or 2 where bf16 autocast makes the products narrower
    Q, K features of all queries, all keys   F features of the MLP
    H heads of queries and keys together

    Llama              two norms: 2 E D for what they hand to the products, 8 for rstd
                       attention: E (Q + 2 K) q and k turned and v, E Q the output; on a GPU 4 bytes a query head
                       MLP: 3 E F gate, up and their product

Weights are no part of it: autograd saves their copies, which memory.py counts. Nor is what all layers share: the tables of the
rotary embedding, `start` and `end`.

tests/test_plan.py counts what autograd saves (torch.autograd.graph.saved_tensors_hooks) for every family, precision and kind of
recomputation on a CPU, and for the Triton kernels on the GPU that exists on paper (benchmarks/paper_gpu.py).
"""

from dataclasses import dataclass

from minisft.model.model_config import ModelConfig


@dataclass(frozen=True)
class Precision:
    """Bytes of a number."""

    stream: int  # of the residual stream: that of the weights, 4 or 2
    product: int  # of the matrix products

    @property
    def casts(self) -> bool:
        """Whether products run in another dtype than the weights have."""
        return self.product != self.stream


@dataclass(frozen=True)
class Site:
    """A linear layer with an adapter, for what it keeps besides a plain one."""

    module: str  # "mlp.down_proj"
    num_inputs: int
    num_outputs: int
    rank: int  # PiSSA's counts twice
    dropout: bool
    dora: bool
    pissa: bool


def kept_by_block(
    c: ModelConfig,
    layer: int,
    p: Precision,
    *,
    is_gpu: bool,
    selective: bool = False,
    sites: list[Site] | None = None,
    quantised: bool = False,
) -> float:
    """Bytes a token that layer keeps. sites: of its adapters; None = it has none. quantised: whether its matrices are."""
    mixer = c.mixers[layer]
    block = c.block if mixer == "attention" else "pre"
    mixers = {"attention": _attention, "delta": _delta, "conv": _conv}
    is_joint = is_gpu and not quantised and all(map(_is_one_op, sites or []))  # q, k and v are one product
    total = _norms_of_block(c, block, p, selective)
    total += mixers[mixer](c, layer, p, is_gpu, selective, is_joint)
    total += _mlp(c, p, is_gpu, selective)
    for rate, size in ((c.attention_output_dropout, c.hidden_size), (c.mlp_output_dropout, c.hidden_size)):
        if rate and block in ("pre", "parallel"):
            total += size * (1 if is_gpu else p.product)  # the mask: a CPU's is scaled, in the dtype of its input
    return total + sum(_site(site, c, p, is_gpu, selective) for site in sites or [])


def kept_outside(c: ModelConfig, p: Precision, *, is_gpu: bool) -> float:
    """Bytes a token that the last norm keeps, and what it hands to the loss."""
    D = c.hidden_size
    embedding = D * (1 if is_gpu else p.stream) if c.embedding_dropout else 0
    return embedding + _norm_before_products(c, p, selective=False)


def input_of_block(c: ModelConfig, p: Precision) -> float:
    """Bytes a token of what a block reads: all that gradient checkpointing keeps of it."""
    return p.stream * c.hidden_size


def shared_by_layers(c: ModelConfig, p: Precision) -> float:
    """Bytes a token that are there once: cos and sin of every rotary embedding, and a factor of the queries."""
    total, width = 0, 4 if c.rope_in_fp32 else p.stream
    for rope in {rope for rope in c.ropes if rope is not None}:
        total += rope.dim * width + (width if rope.query_beta and not p.casts else 0)
    return total


# ---- the parts ----------------------------------------------------------------------------------------------------


def _numbers_of_norm(c: ModelConfig) -> int:
    """Bytes a row: rstd in fp32, LayerNorm's mean too."""
    return 8 if c.norm == "layer" else 4


def _norms_of_block(c: ModelConfig, block: str, p: Precision, selective: bool) -> float:
    """The norms of a block, and what they hand to the products. Norms that read a branch keep it in the dtype of products."""
    D, before = c.hidden_size, _norm_before_products(c, p, selective)
    branch = p.product * D + _numbers_of_norm(c)
    if block in ("pre", "scaled"):
        return 2 * before
    if block == "sandwich":
        return 2 * before + 2 * branch
    if block == "post":  # the products read the stream itself, or a cast of it
        return 2 * branch + 2 * p.product * D
    if not c.mlp_has_norm:
        return before
    return 2 * before - (p.stream * D if c.norm == "layer" else 0)  # parallel: the two norms read one x


def _norm_before_products(c: ModelConfig, p: Precision, selective: bool) -> float:
    """RMSNorm keeps its output, which the products keep as well. LayerNorm keeps its input too, or with selective only that."""
    handed, numbers = p.product * c.hidden_size, _numbers_of_norm(c)
    if c.norm == "layer":
        return p.stream * c.hidden_size + numbers + (0 if selective else handed)
    return handed + numbers


def _attention(c: ModelConfig, layer: int, p: Precision, is_gpu: bool, selective: bool, is_joint: bool) -> float:
    e, rope = p.product, c.ropes[layer]
    Q, K, H = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_heads + c.num_kv_heads
    projected = Q * (1 + c.attention_gate)  # a gate lies beside each head of q, in one tensor
    # What attention reads: q and k as they are turned, v; its output; and on a GPU the log-sum-exp of every row.
    total = e * (2 * Q + 2 * K) + (4 * c.num_heads if is_gpu else 0)
    if c.attention_gate:
        total += e * 2 * Q  # the output before its gate, and the gate's sigmoid
    # Forms of q, k and v before that one: in front of a clamp, and of a norm.
    before = 0
    if c.clip_qkv is not None:
        before += projected + 2 * K
    after_rope = c.qk_norm_after_rope and rope is not None and c.qk_norm == "head"
    if c.qk_norm in ("head", "full", "layer"):
        before += (Q if after_rope else projected) + K
    elif c.qk_norm != "none":  # a weight for each head: in fp32, before and after
        total += 2 * 4 * (Q + K)
    elif rope is None:
        before += projected - Q
    is_fused = is_gpu and rope is not None and c.qk_norm == "head" and not after_rope  # computes the norm again
    total += {"none": 0, "full": 2 * 4, "head": 0 if is_fused else 4 * H}.get(c.qk_norm, 8 * H)
    if rope is not None and rope.query_beta and p.casts:
        total += e  # the factor of the queries
    # On a GPU q, k and v are parts of one product's output, as their weights or copies of these lie side by side. v keeps all
    # of it, unless the parts of q and k are kept anyway, as they are or turned in place. Norms of heads copy them first.
    is_left = rope is None or not (rope.query_beta or c.attention_gate)  # to attention, which turns them in place
    are_parts = is_fused or c.qk_norm == "full" or (c.qk_norm == "none" and is_left)
    if is_joint and c.clip_qkv is None and not are_parts:
        before += projected + K
    return total + e * before


def _delta(c: ModelConfig, layer: int, p: Precision, is_gpu: bool, selective: bool, is_joint: bool) -> float:
    e, heads = p.product, c.delta_num_value_heads
    K, V = c.delta_num_key_heads * c.delta_key_dim, heads * c.delta_value_dim
    convolved = 2 * e * (2 * K + V)  # q, k and v before and after the convolution
    numbers = heads * (4 + e + e + 4 + 4)  # a, sigmoid(b), beta, softplus, g
    if is_joint:
        numbers += heads * 2 * e  # a and b before these, which lie in one tensor with q, k and v
    unit = 3 * e * V + 4 * heads  # out, gate, the normed out; rstd
    gated = 0 if selective else e * V
    return convolved + numbers + unit + gated


def _conv(c: ModelConfig, layer: int, p: Precision, is_gpu: bool, selective: bool, is_joint: bool) -> float:
    return (
        p.product * c.hidden_size * (3 + 1 + 1 + 1)
    )  # before, after, h; before h; its convolution; what out_proj reads


def _mlp(c: ModelConfig, p: Precision, is_gpu: bool, selective: bool) -> float:
    y = 0 if selective else 1
    if c.mlp == "plain":
        return p.product * c.intermediate_size * (1 + y)
    one_op = is_gpu or c.activation == "silu"  # keeps gate and up; op by op also act(gate)
    return p.product * c.intermediate_size * ((2 if one_op else 3) + y)


def _site(site: Site, c: ModelConfig, p: Precision, is_gpu: bool, selective: bool) -> float:
    e = p.product
    is_one_op, total = _is_one_op(site), e * site.rank
    if site.dropout:  # the mask, and what is left of the input; nobody may keep the input itself then
        total += site.num_inputs * (1 if is_gpu else e)
        total += 0 if is_one_op and _is_only_reader(site, c, is_gpu, selective) else e * site.num_inputs
    if site.dora:
        total += e * site.num_outputs * (1 if is_one_op else 2)
    return total


def _is_one_op(site: Site) -> bool:
    """Whether layer and adapter are one (kernels/lora.py), with their neighbours."""
    return not site.pissa and not (site.dora and site.dropout)


def _is_only_reader(site: Site, c: ModelConfig, is_gpu: bool, selective: bool) -> bool:
    """Whether the input of a plain layer here is counted above because the layer keeps it, and for no other reason."""
    if site.module == "self_attn.o_proj":
        return c.attention_gate or not is_gpu  # a GPU's attention keeps its output
    return site.module == "conv.out_proj" or site.module in ("mlp.down_proj", "linear_attn.o_proj") and not selective
