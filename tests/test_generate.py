"""Generation with the cache equals computing the whole text again, and rows do not disturb each other."""

import pytest
import torch

from minisft.data.batch import document_bounds
from minisft.data.tokenizer import train_tokenizer
from minisft.errors import UserError
from minisft.generation import generate, stop_ids, stream
from minisft.kernels.common import use_backend
from minisft.model.decoder import Decoder
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights
from minisft.samples import Prompt, complete

LLAMA = {
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 53, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
PROMPTS = [[7, 3, 9], [1], list(range(30)), [5, 5, 5, 5, 5]]


def tiny(config: dict) -> Decoder:
    model = build_model(from_hf(config), "cpu")
    init_weights(model, seed=0)
    return model


@pytest.fixture(params=[LLAMA, GPT2 | {"initializer_range": 0.4}], ids=["llama", "gpt2"])
def model(request) -> Decoder:
    return tiny(request.param)


@torch.no_grad()
def greedy(model: Decoder, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The definition: the whole text again for each token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        start, end = document_bounds(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        hidden = model(torch.tensor(ids), torch.arange(len(ids), dtype=torch.int32), start, end)
        ids.append(int(model.logits(hidden[-1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_greedy_equals_recomputing_everything(model, backend):
    model.eval()
    with use_backend(backend):
        assert generate(model, PROMPTS, max_new_tokens=10) == [greedy(model, prompt, 10) for prompt in PROMPTS]


def test_a_stream_leaves_the_caller_s_gradients_on(model):
    expected = generate(model, PROMPTS, max_new_tokens=3)
    outputs = [[] for _ in PROMPTS]
    for row, token in stream(model, PROMPTS, max_new_tokens=3):
        assert torch.is_grad_enabled()
        outputs[row].append(token)
    assert outputs == expected and torch.is_grad_enabled()


def test_stop_tokens_end_a_row_and_no_other(model):
    full = generate(model, PROMPTS, max_new_tokens=10)
    stops = {full[0][4], full[2][0]}
    expected = []
    for row in full:
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        expected.append(row[:end])
    assert len({len(row) for row in expected}) > 1  # rows leave at different steps
    assert generate(model, PROMPTS, max_new_tokens=10, stop_ids=stops) == expected
    assert generate(model, PROMPTS, max_new_tokens=10, stop_ids=range(53)) == [[]] * 4


@pytest.mark.parametrize("listed, more", [(None, []), (0, [0]), (7, [7]), ([7, 258], [7, 258])])
def test_stop_ids_are_the_tokenizer_s_and_the_model_s(model, listed, more):
    tokenizer = train_tokenizer([], vocab_size=259)
    model.generation_config = {} if listed is None else {"eos_token_id": listed}
    assert stop_ids(model, tokenizer) == tokenizer.stop_ids | set(more)


def test_held_out_prompts_end_at_the_second_terminator_of_the_model():
    """As Llama 3 does, whose generation_config lists <|end_of_text|> beside <|eot_id|>: its answers end at either."""
    model, tokenizer = tiny(LLAMA | {"vocab_size": 259}), train_tokenizer([], vocab_size=259)
    prompt = Prompt(tokenizer.encode("abc"), "abc", "", "all")
    (full,) = generate(model, [prompt.ids], max_new_tokens=8)
    end = next(i for i in range(1, 8) if full[i] not in full[:i])
    model.generation_config = {"eos_token_id": [tokenizer.eos_token_id, full[end]]}
    (sample,) = complete(model, tokenizer, [prompt], max_new_tokens=8, precision="fp32")
    assert sample.output == tokenizer.decode(full[:end]) != tokenizer.decode(full)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 0.8, "top_p": 0.9, "seed": 2}]
)
def test_rows_are_independent(model, options):
    rows = generate(model, PROMPTS, max_new_tokens=8, **options)
    others = [[2] * 9, PROMPTS[1], [4], [50, 51]]
    assert generate(model, others, max_new_tokens=8, **options)[1] == rows[1]
    stopped = generate(model, PROMPTS, max_new_tokens=8, stop_ids=[rows[0][0]], **options)
    assert all(row == full[: len(row)] for row, full in zip(stopped, rows))


def test_seed(model):
    def sample(seed):
        return generate(model, PROMPTS, max_new_tokens=8, temperature=2.0, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_sampling_reduces_to_greedy(model):
    best = generate(model, PROMPTS, max_new_tokens=8)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {}):
        temperature = 1e-4 if not options else 3.0
        assert generate(model, PROMPTS, max_new_tokens=8, temperature=temperature, seed=0, **options) == best


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}])
def test_sampled_frequencies(options):
    """5,000 draws of one next token against the probabilities by their definition."""
    model, draws, temperature = tiny(LLAMA | {"initializer_range": 0.15}), 5000, 0.7
    rows = generate(model, [[1]] * draws, max_new_tokens=1, temperature=temperature, seed=0, **options)
    counts = torch.bincount(torch.tensor(rows).flatten(), minlength=53)

    zero = torch.zeros(1, dtype=torch.int32)
    logits = model.eval().logits(model(torch.tensor([1]), zero, zero, zero + 1))[0].detach() / temperature
    if "top_k" in options:
        logits[logits < logits.sort(descending=True).values[options["top_k"] - 1]] = -torch.inf
    expected = logits.softmax(-1)
    if "top_p" in options:
        more_likely = expected[None, :] > expected[:, None]
        expected = expected.where((more_likely * expected).sum(-1) < options["top_p"], 0)
        expected = expected / expected.sum()
    assert counts[expected == 0].sum() == 0
    # A count deviates by sqrt(n p (1 - p)); 53 of them stay within 4.5 of that, but for one seed in 3,000.
    deviation = (counts - draws * expected).abs()
    assert torch.all(deviation <= 4.5 * (draws * expected * (1 - expected)).sqrt() + 1e-3)


def test_leaves_the_model_as_it_was(model):
    for training in (True, False):
        model.train(training)
        generate(model, PROMPTS, max_new_tokens=2)
        assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_do(model):
    assert generate(model, [], max_new_tokens=3) == []
    assert generate(model, PROMPTS, max_new_tokens=0) == [[]] * 4


@pytest.mark.parametrize(
    "prompts, options, named",
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, 53]], {}, "token 53"),
        ([[-1]], {}, "token -1"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens = -1"),
        (
            [[1]],
            {"max_new_tokens": 10**30},
            "max_new_tokens = 1000000000000000000000000000000: expected a number from 0 to 1,048",
        ),
        ([[1]], {"temperature": -0.5}, "temperature = -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature = nan"),
        ([[1]], {"temperature": 1e-320}, "temperature = 1e-320"),
        ([[1]], {"temperature": 1.0, "seed": 2**70}, "seed = 1180591620717411303424"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k = 0"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_mistakes(model, prompts, options, named):
    with pytest.raises(UserError, match=named):
        generate(model, prompts, **{"max_new_tokens": 4} | options)


def test_learned_positions_end():
    model = tiny(GPT2)
    assert len(generate(model, [[1] * 30], max_new_tokens=11)[0]) == 11  # the 41st token is never fed back
    with pytest.raises(UserError, match="40 positions"):
        generate(model, [[1] * 30], max_new_tokens=12)
