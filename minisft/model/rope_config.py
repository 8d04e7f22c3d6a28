"""The rotary position embeddings of a config.json, in both dialects.

transformers 4 writes `rope_theta` at the top level, and `rope_scaling` where the context was stretched. transformers 5
writes one table, `rope_parameters`, with everything in it, or one such table for each kind of layer. A value in the table
wins over one at the top level, which wins over the default of the family's class.

Two kinds depend on the batch in transformers: `dynamic` raises theta once a batch is longer than the context, and
`longrope` has a list of factors for batches within the original context and one for longer ones. Whether documents are
packed would then change what the model computes. Here it is decided once, by the `max_length` of the run.
"""

import math

from minisft.model.config_keys import flag, is_number, number, optional_number, require, size
from minisft.model.model_config import Rope

ORIGINAL, SHARE = "original_max_position_embeddings", "partial_rotary_factor"
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
TABLE_KEYS = {
    *("rope_type", "rope_theta", SHARE, "factor", "attention_factor", ORIGINAL),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("short_factor", "long_factor", "finetuned"),  # the last says where a model comes from
}


def read_rope(
    values: dict,
    head_dim: int,
    max_length: int | None,
    *,
    theta_key: str = "rope_theta",
    partial_key: str | None = None,
    aliases: dict[str, str] | None = None,
    more_keys: tuple[str, ...] = (),
) -> Rope:
    """The rotary embedding of a model whose layers all share one.

    values: config.json with the class defaults. theta_key, partial_key: its keys for theta and for the share of a head that
    turns (None: this family always turns whole heads). aliases: other names of rope types. more_keys: keys that only the table
    of this family may have (Qwen 3.5's say how the positions of an image are split; those of text are one).
    """
    table = _agreed(*(_table(values, name, more_keys) for name in ("rope_scaling", "rope_parameters")))
    if aliases and table.get("rope_type") in list(aliases):
        table["rope_type"] = aliases[table["rope_type"]]
    table = {"rope_theta": values[theta_key], SHARE: values[partial_key] if partial_key else 1.0} | table
    fits = partial_key is not None or table[SHARE] == 1
    require(fits, f"{SHARE} = {table[SHARE]} is not implemented for {values['model_type']}")
    return _rope(table, values, values.get(ORIGINAL), head_dim, max_length)


def read_rope_by_kind(values: dict, head_dim: int, max_length: int | None, theta_keys: dict[str, str]) -> dict:
    """{"full_attention": Rope, "sliding_attention": Rope}, for models with one table for each kind of layer.

    theta_keys: for each kind, the key of the top level that has its theta. A `rope_scaling` stretches the full layers
    only, because sliding ones never see far.
    """
    nested = values.get("rope_parameters", {})
    require(
        isinstance(nested, dict) and nested.keys() <= theta_keys.keys(),
        f"rope_parameters of {values['model_type']} must have one table for each of {', '.join(theta_keys)}",
    )
    ropes = {}
    for kind, theta_key in theta_keys.items():
        old = _table(values, "rope_scaling") if kind == "full_attention" else {}
        table = {"rope_theta": values[theta_key], SHARE: 1.0} | _agreed(old, _table(nested, kind))
        require(table[SHARE] == 1, f"{SHARE} = {table[SHARE]} is not implemented for {values['model_type']}")
        ropes[kind] = _rope(table, values, None, head_dim, max_length)
    return ropes


def _table(values: dict, name: str, more_keys: tuple[str, ...] = ()) -> dict:
    """A table of rope keys without nulls; its type is in `rope_type`, as in newer files."""
    table = {} if values.get(name) is None else values[name]
    require(isinstance(table, dict), f"{name} = {str(table)[:40]!r} must be an object")
    table = {key: value for key, value in table.items() if value is not None}
    kind = table.pop("type", None)
    table = ({} if kind is None else {"rope_type": kind}) | table
    unknown = sorted(map(str, table.keys() - TABLE_KEYS - set(more_keys)))
    require(not unknown, f"{name} with {', '.join(unknown[:10])} is not implemented")
    return table


def _agreed(old: dict, new: dict) -> dict:
    """The tables of the older and of the newer dialect as one; if a file has both, they must not contradict each other."""
    wrong = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    require(not wrong, f"rope_scaling and rope_parameters differ in {', '.join(wrong)}")
    return old | new


def _rope(table: dict, values: dict, original: int | None, head_dim: int, max_length: int | None) -> Rope:
    """original: the original context if it is outside the table; it wins over one inside."""
    kind, theta = table.get("rope_type", "default"), number(table, "rope_theta")
    require(kind in ROPE_TYPES, f"rope type {kind!r} is not implemented; implemented: {', '.join(ROPE_TYPES)}")
    share = number(table, SHARE)
    dim = int(head_dim * share)
    require(share <= 1, f"{SHARE} = {share} is more than a whole head")
    require(
        dim > 0 and dim % 2 == 0,
        f"rotary embeddings turn pairs, but {dim} of the {head_dim} features of a head (head_dim) is no even number",
    )
    if kind == "default":
        return Rope(dim, theta)
    if kind == "linear":
        return Rope(dim, theta, kind, number(table, "factor"))

    length = size(values, "max_position_embeddings")
    if kind == "dynamic":
        require(dim > 2, f"dynamic rope needs more than {dim} features of a head")
        if "alpha" in table:  # Hunyuan's: stretched by a fixed amount
            return Rope(dim, theta * number(table, "alpha") ** (dim / (dim - 2)))
        factor, longest = number(table, "factor"), max(max_length or 0, length)
        stretched = theta * (factor * longest / length - (factor - 1)) ** (dim / (dim - 2))
        return Rope(dim, stretched, kind, factor, note=f"dynamic rope: for {longest:,} tokens, theta {stretched:,.0f}")

    outside = {} if original is None else {ORIGINAL: original}
    original = size({ORIGINAL: length} | table | outside, ORIGINAL)
    if kind == "llama3":
        low, high = number(table, "low_freq_factor"), number(table, "high_freq_factor")
        require(low < high, f"rope: low_freq_factor {low} must be less than high_freq_factor {high}")
        stretch = {"low_freq_factor": low, "high_freq_factor": high, ORIGINAL: original}
        return Rope(dim, theta, kind, number(table, "factor"), **stretch)

    factor = number({"factor": length / original} | table, "factor")
    require(theta > 1 and original > 1, f"rope: theta {theta} and {ORIGINAL} {original} must be more than 1")
    if kind == "yarn":
        attention_factor = number(
            {"attention_factor": _yarn_attention_factor(table, factor)} | table, "attention_factor"
        )
        fast, slow = (number({key: value} | table, key) for key, value in (("beta_fast", 32), ("beta_slow", 1)))
        require(slow <= fast, f"rope: beta_slow {slow} must not be more than beta_fast {fast}")
        ramp = {"beta_fast": fast, "beta_slow": slow, "truncate": flag({"truncate": True} | table, "truncate")}
        query_beta = _number_or_zero(table, "llama_4_scaling_beta") or 0.0
        return Rope(dim, theta, kind, factor, attention_factor, original, query_beta=query_beta, **ramp)

    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention_factor = number({"attention_factor": attention_factor} | table, "attention_factor")
    is_long = max_length is not None and max_length > original
    for name in ("short_factor", "long_factor"):
        factors = table.get(name)
        fits = isinstance(factors, list) and len(factors) == dim // 2 and all(is_number(f) and f > 0 for f in factors)
        require(fits, f"rope: {name} must be a list of {dim // 2} positive numbers")
    pair_factors = tuple(map(float, table["long_factor" if is_long else "short_factor"]))
    note = f"longrope: the factors for texts {'of more than' if is_long else 'of up to'} {original:,} tokens"
    return Rope(dim, theta, kind, factor, attention_factor, original, pair_factors=pair_factors, note=note)


def _yarn_attention_factor(table: dict, factor: float) -> float:
    def growth(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = (_number_or_zero(table, key) for key in ("mscale", "mscale_all_dim"))
    return growth(above) / growth(below) if above and below else growth(1.0)


def _number_or_zero(table: dict, key: str) -> float | None:
    return 0.0 if is_number(table.get(key)) and table[key] == 0 else optional_number(table, key)
