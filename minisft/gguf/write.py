"""A model as a GGUF file, for llama.cpp, Ollama, LM Studio and the others that read the format.

Tensors are written one after the other, so that one of them is in memory beside the model. The library `gguf` has the names of
the tensors, the keys and the quantisations. What llama.cpp takes for granted about an architecture (a scale, a pattern of
windows) is checked here: a model that differs is refused by name, since it would run and compute something else.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from minisft.errors import MODEL, UserError
from minisft.gguf.config import LOCAL_THETA, SCALED_BY_WIDTH, llama3_divisors
from minisft.gguf.write_tokenizer import Vocabulary, add_vocabulary
from minisft.model.model_config import ModelConfig, Rope

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter


F16_MAX = 65504.0
CONVERTER = "write Hugging Face files instead (without --gguf), and try llama.cpp's convert_hf_to_gguf.py on them"


@dataclass(frozen=True)
class Architecture:
    name: str
    # llama.cpp turns neighbours (2i, 2i + 1) by one angle: the halves of each head of q and k are interleaved for it
    turns_neighbours: bool = False
    norm_offset: float = 0.0  # is added to the norms, whose files hold weight - 1
    # layer i slides if i % window_pattern < window_pattern - 1, unless the file says otherwise; 0: none slides
    window_pattern: int = 0
    divides_frequencies: bool = False  # reads rope_freqs, a divisor for each frequency
    biases: tuple[str, ...] = ()  # switches of ModelConfig that may be set


ALL_BIASES = ("qkv_bias", "o_bias", "mlp_bias")
ARCHITECTURES = {  # by model_type
    "llama": Architecture("llama", turns_neighbours=True, divides_frequencies=True, biases=ALL_BIASES),
    "mistral": Architecture("llama", turns_neighbours=True),
    "qwen2": Architecture("qwen2", biases=("qkv_bias",)),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0, window_pattern=2),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, window_pattern=6),
    "phi3": Architecture("phi3"),
    "smollm3": Architecture("smollm3", turns_neighbours=True),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2", window_pattern=4),
    "granite": Architecture("granite", turns_neighbours=True, divides_frequencies=True, biases=ALL_BIASES),
    "starcoder2": Architecture("starcoder2", biases=ALL_BIASES),
    "exaone4": Architecture("exaone4", window_pattern=4, divides_frequencies=True),
    "seed_oss": Architecture("seed_oss", biases=("qkv_bias",)),
    "ernie4_5": Architecture("ernie4_5", turns_neighbours=True),
    "glm4": Architecture("glm4", turns_neighbours=True, biases=("qkv_bias",)),
    "cohere2": Architecture("cohere2", turns_neighbours=True, window_pattern=4),
}
NO_ROPE_EVERY = 4  # SmolLM3's, written into llama.cpp


@dataclass(frozen=True)
class Source:
    """A tensor of the model, in the layout and by the name of Hugging Face's files."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def write_gguf(
    path: Path, config: ModelConfig, sources: list[Source], vocabulary: Vocabulary, kind: str, name: str
) -> list[str]:
    """Write the file; returns lines for the user.

    kind: one of KINDS (kinds.py). Vectors stay fp32; of the quantised kinds the embedding and the head are q8_0 at least, and a
    matrix whose rows are no multiple of 32 numbers is f16. name: general.name of the file. Raises UserError (exit code MODEL)
    for a family or a switch that llama.cpp does not compute, a tokenizer that it does not have, and weights that f16 cannot
    hold; OSError if writing fails.
    """
    from gguf import GGUFWriter, LlamaFileType

    check_architecture(config)
    architecture = ARCHITECTURES[config.model_type]
    lines: list[str] = []
    tensors = list(_tensors(config, architecture, sources, kind))
    with closing(GGUFWriter(path, architecture.name)) as writer:
        writer.add_type("model")
        writer.add_name(name)
        file_type = {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")
        writer.add_file_type(LlamaFileType[file_type])
        writer.add_quantization_version(2)
        lines += _add_values(writer, config, architecture)
        lines += add_vocabulary(writer, vocabulary, config.vocab_size)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        # not by write_tensor_data: numpy's tofile loses the last bytes on a full disk without an error
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.data())
            assert data.nbytes == tensor.num_bytes
            writer.write_padding(file, file.tell())
            file.write(data.data.cast("B"))
            writer.write_padding(file, data.nbytes)
    return lines


def check_architecture(config: ModelConfig) -> None:
    """Raises UserError (exit code MODEL) for a model that llama.cpp does not compute as we do."""
    family = config.model_type
    if family not in ARCHITECTURES:
        _refuse(f"{family} is not written as GGUF; written are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[family]
    for name in ALL_BIASES:
        if getattr(config, name) and name not in architecture.biases:
            _refuse(f"llama.cpp has no {name} for {family}")
    if family != "granite" and not math.isclose(config.attention_scale, _scale(config), rel_tol=1e-6):
        _refuse(
            f"llama.cpp multiplies the scores of {family} by {_scale(config):.6g}, this model by {config.attention_scale:.6g}"
        )
    if family == "gemma2" and None in (config.attention_softcap, config.logit_softcap):
        _refuse("gemma2 without softcapping")
    if family == "exaone4" and any(config.windows) and config.num_layers != 64:
        _refuse(f"llama.cpp knows windows of exaone4 with 64 layers only, this model has {config.num_layers}")
    has_rope = [rope is not None for rope in config.ropes]
    expected = [True] * config.num_layers
    if family == "smollm3":
        expected = [(layer + 1) % NO_ROPE_EVERY != 0 for layer in range(config.num_layers)]
    if family == "cohere2" or family == "exaone4" and any(config.windows):
        expected = [window is not None for window in config.windows]
    if has_rope != expected:
        _refuse(f"the layers of this {family} that have a rotary embedding are not those of llama.cpp's {family}")
    _check_rope(config, architecture)


def _check_rope(config: ModelConfig, architecture: Architecture) -> None:
    family, rope = config.model_type, main_rope(config)
    if rope.kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        _refuse(f"the rotary embedding {rope.kind!r} has no form in GGUF")
    if rope.kind == "llama3" and not architecture.divides_frequencies:
        _refuse(f"llama.cpp does not read the rotary embedding 'llama3' of {family}")
    if rope.kind == "longrope" and family != "phi3":
        _refuse(f"llama.cpp does not read the rotary embedding 'longrope' of {family}")
    if rope.kind == "yarn":
        usual = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
        ramp = (rope.attention_factor, rope.beta_fast, rope.beta_slow, rope.truncate, rope.query_beta)
        if not math.isclose(ramp[0], usual, rel_tol=1e-6) or ramp[1:] != (32.0, 1.0, True, 0.0):
            _refuse(
                "a yarn embedding with other settings than llama.cpp's (attention_factor, beta_fast, beta_slow, truncate)"
            )
    others = {r for r in config.ropes if r is not None and r != rope}
    sliding = {r for r, window in zip(config.ropes, config.windows) if r is not None and window is not None}
    if others and (others != sliding or len(others) > 1 or family not in ("gemma3_text", "olmo3")):
        _refuse(f"layers of this {family} have several rotary embeddings")
    if family == "olmo3" and any(r.kind != "default" or r.theta != rope.theta for r in others):
        _refuse("sliding layers of olmo3 with a stretched embedding")
    if architecture.turns_neighbours and not config.rope_interleaved and rope.dim != config.head_dim:
        _refuse(f"llama.cpp turns whole heads of {family}")


def main_rope(config: ModelConfig) -> Rope:
    """The rotary embedding of the layers that see everything; of any layer where all slide or those have none."""
    found = [rope for rope, window in zip(config.ropes, config.windows) if rope is not None and window is None]
    return (found or [rope for rope in config.ropes if rope is not None])[0]


def _refuse(problem: str) -> NoReturn:
    raise UserError(f"no GGUF file is written: {problem}", hint=CONVERTER, exit_code=MODEL)


# ---- metadata -----------------------------------------------------------------------------------------------------


def _scale(config: ModelConfig) -> float:
    """By what llama.cpp multiplies the scores."""
    by_width = SCALED_BY_WIDTH.get(ARCHITECTURES[config.model_type].name) == config.num_layers
    return (config.hidden_size // config.num_heads if by_width else config.head_dim) ** -0.5


def _add_values(writer: "GGUFWriter", config: ModelConfig, architecture: Architecture) -> list[str]:
    """The keys of the architecture. Returns lines for the user."""
    lines, context = [], config.max_position_embeddings
    windows = [window for window in config.windows if window is not None]
    if windows and not architecture.window_pattern and min(windows) < context:
        context = min(windows)
        lines.append(
            f"context_length is {context:,}: beyond it this model has windows, which llama.cpp does not compute"
        )
    writer.add_context_length(context)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    (writer.add_layer_norm_eps if config.norm == "layer" else writer.add_layer_norm_rms_eps)(config.norm_eps)
    if windows and architecture.window_pattern:
        writer.add_sliding_window(windows[0])
        every = architecture.window_pattern
        slides = [window is not None for window in config.windows]
        if slides != [layer % every < every - 1 for layer in range(config.num_layers)]:
            writer.add_sliding_window_pattern(slides)
    elif config.model_type == "phi3":
        writer.add_sliding_window(0)  # else llama.cpp refuses the file
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_scale)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(1 / config.logit_scale)
    elif config.model_type == "cohere2":
        writer.add_logit_scale(config.logit_scale)
    _add_rope(writer, config)
    return lines


def _add_rope(writer: "GGUFWriter", config: ModelConfig) -> None:
    from gguf import RopeScalingType

    rope = main_rope(config)
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    local = {r.theta for r, window in zip(config.ropes, config.windows) if r is not None and window is not None}
    if config.model_type == "gemma3_text" and local - {LOCAL_THETA}:
        writer.add_rope_freq_base_swa(*local)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
    if rope.kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    elif config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)


# ---- tensors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    type: "GGMLQuantizationType"
    values: Callable[[], np.ndarray]  # fp32

    @property
    def num_bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES

        numbers, num_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // numbers * num_bytes

    def data(self) -> np.ndarray:
        """The numbers as they are stored. Raises UserError (exit code MODEL) for one that f16 cannot hold."""
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        values = self.values()
        largest = float(np.abs(values).max(initial=0.0))
        if not math.isfinite(largest):
            _refuse(f"{self.name} holds a number that is not finite")
        if self.type == GGMLQuantizationType.F16 and largest > F16_MAX:
            problem = f"{self.name} holds {largest:.3g}, and the largest number of f16 is {F16_MAX:.0f}"
            raise UserError(problem, hint="--gguf bf16", exit_code=MODEL)
        return np.ascontiguousarray(quantize(values, self.type))


def _tensors(config: ModelConfig, architecture: Architecture, sources: list[Source], kind: str) -> Iterator[_Tensor]:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    number = next(number for number in MODEL_ARCH if MODEL_ARCH_NAMES[number] == architecture.name)
    names = get_tensor_name_map(number, config.num_layers)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for source in sources:
        name = names.get_name(source.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            _refuse(f"llama.cpp's {architecture.name} has no tensor for {source.name}")
        module = source.name.split(".")[-2]
        turned = architecture.turns_neighbours and not config.rope_interleaved
        num_heads = heads.get(module, 0) if turned else 0
        offset = architecture.norm_offset if module.endswith("norm") else 0.0

        def values(source=source, interleaved=num_heads, offset=offset) -> np.ndarray:
            tensor = source.read().detach().to("cpu", torch.float32)
            if interleaved:  # [H, 2, Dh/2, ...] -> [H, Dh/2, 2, ...]
                tensor = tensor.unflatten(0, (interleaved, 2, -1)).transpose(1, 2).reshape(tensor.shape)
            return (tensor + offset).contiguous().numpy()

        yield _Tensor(name, source.shape, _type(kind, name, source.shape), values)
    rope = main_rope(config)
    if rope.kind == "llama3":
        extra = {"rope_freqs.weight": llama3_divisors(rope)}
    elif rope.kind == "longrope":
        table = config.hf.get("rope_parameters") or config.hf["rope_scaling"]
        extra = {f"rope_factors_{length}.weight": table[f"{length}_factor"] for length in ("long", "short")}
    else:
        extra = {}
    for name, numbers in extra.items():
        array = np.array(numbers, dtype=np.float32)
        yield _Tensor(name, array.shape, GGMLQuantizationType.F32, lambda array=array: array)


def _type(kind: str, name: str, shape: tuple[int, ...]) -> "GGMLQuantizationType":
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if kind.startswith("q") and name in ("token_embd.weight", "output.weight"):
        kind = "q8_0"  # llama.cpp's own quantiser keeps more bits there too
    found = GGMLQuantizationType[kind.upper()]
    return found if shape[-1] % GGML_QUANT_SIZES[found][0] == 0 else GGMLQuantizationType.F16
