"""Completing prompts, one token a row at a time.

The prompts go through the model once, side by side as one flat stream like any other batch, and leave their keys and
values in a cache. Each step then sends one token a row, a stream of one-token documents, so a step costs one token and
not the whole text again. A row that is finished leaves the batch.

Sampling: temperature divides the logits, top_k keeps the k most likely tokens, top_p the smallest set of most likely
tokens whose probability reaches p (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751). A token is drawn by
walking down the sorted probabilities to a uniform number in [0, 1). Each row has its own numbers, drawn at the start,
so a row's completion does not depend on when others finish.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from minisft.data.tokenizer import Tokenizer
from minisft.errors import MODEL, UserError, shortened
from minisft.model.attention import KVCache
from minisft.model.decoder import Decoder
from minisft.model.shards import device_of
from minisft.parallel import is_sharded, no_backward
from minisft.ranks import send_from_first_rank


def stop_ids(model: Decoder, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation_config.json, one id or a list.

    Raises UserError (exit code MODEL) for anything else there.
    """
    listed = model.generation_config.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    if not all(one is None or type(one) is int for one in listed):
        problem = f"generation_config.json: eos_token_id = {shortened(str(listed), 60)}"
        raise UserError(problem, hint="give the id of a token, or a list of ids", exit_code=MODEL)
    return tokenizer.stop_ids | set(listed) - {None}


def generate(model: Decoder, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The new tokens of each prompt, without the stop token that ended it. options: those of `stream`."""
    outputs: list[list[int]] = [[] for _ in prompts]
    for row, token in stream(model, prompts, **options):
        outputs[row].append(token)
    return outputs


@torch.no_grad()  # which no_backward alone would leave on at a yield
def stream(
    model: Decoder,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[tuple[int, int]]:
    """(number of the prompt, its next token) for all prompts together, as the tokens are chosen; no more of a prompt after a stop
    token, which is not among them.

    temperature 0 takes the most likely token. `seed` fixes the draws; None takes them from torch's global generator.
    Works in eval mode, under the autocast of the caller, and leaves the model in the mode it was in.
    Raises UserError for an empty prompt, an id outside the vocabulary, options out of range, or a text longer than the
    learned positions.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, seed)
    if not prompts or max_new_tokens == 0:
        return
    was_training = model.training
    model.eval()
    try:
        with no_backward(model):
            yield from _stream(model, prompts, max_new_tokens, temperature, top_k, top_p, set(stop_ids), seed)
    finally:
        model.train(was_training)


def _stream(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_ids: set[int],
    seed: int | None,
) -> Iterator[tuple[int, int]]:
    device = device_of(model.embed_tokens.weight)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator).to(device)  # [B, max_new_tokens]
    cache = KVCache(max(map(len, prompts)) + max_new_tokens)
    running = list(range(len(prompts)))  # the prompt of each row of the batch

    # ---- prefill: the prompts side by side
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
    last = lengths.cumsum(0) - 1
    first = (last + 1 - lengths).repeat_interleave(lengths)  # [T]
    input_ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    position_ids = torch.arange(len(input_ids), device=device) - first
    end = (last + 1).repeat_interleave(lengths)
    hidden = model(input_ids, position_ids.int(), first.int(), end.int(), kv_cache=cache)[last]  # [B, D]

    # ---- decode: one token a row
    for step in range(max_new_tokens):
        tokens = _choose(model.logits(hidden).float(), uniform[:, step], temperature, top_k, top_p)  # [B]
        if is_sharded(model):  # the ranks make the same passes together, so that they must choose the same
            send_from_first_rank([tokens])
        unfinished = []
        for row, token in enumerate(tokens.tolist()):
            if token not in stop_ids:
                unfinished.append(row)
                yield running[row], token
        if not unfinished or step + 1 == max_new_tokens:
            break
        if len(unfinished) < len(running):
            running = [running[row] for row in unfinished]
            keep = torch.tensor(unfinished, device=device)
            tokens, uniform, lengths = tokens[keep], uniform[keep], lengths[keep]
            cache.keep(keep)
        index = torch.arange(len(tokens), dtype=torch.int32, device=device)
        hidden = model(tokens, lengths.int(), index, index + 1, kv_cache=cache)  # [B, D]
        lengths = lengths + 1


def _choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits fp32 [B, V], uniform numbers [B] -> token ids int64 [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # the token that crosses top_p is kept
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])  # [B, 1]
    return order.gather(-1, drawn).squeeze(-1)


def _check(
    model: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    for name, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, 0 <= max_new_tokens <= 2**20, f"from 0 to {2**20:,}"),
        ("temperature", temperature, temperature == 0 or 1e-6 <= temperature <= 1e6, "0, or from 1e-6 to 1e6"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ("seed", seed, seed is None or abs(seed) < 2**63, "of 63 bits"),
    ):
        if not fits:
            raise UserError(f"{name} = {value}: expected a number {expected}")
    check_prompts(model, prompts, max_new_tokens)


def check_prompts(model: Decoder, prompts: list[list[int]], max_new_tokens: int, name: str = "prompt") -> None:
    """Raises UserError for an empty prompt, an id outside the vocabulary, or a text longer than the learned positions. name: what
    messages call one, before its number."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"{name} {number} has no tokens", hint="begin it with the tokenizer's BOS token")
        wrong = [token for token in prompt if not 0 <= token < model.config.vocab_size]
        if wrong:
            raise UserError(f"{name} {number} has token {wrong[0]}; the vocabulary has {model.config.vocab_size}")
        # The last new token is never fed back, so it needs no position.
        needed, limit = len(prompt) + max_new_tokens - 1, model.config.max_position_embeddings
        if model.config.learned_positions and needed > limit:
            raise UserError(
                f"{name} {number} has {len(prompt)} tokens; {max_new_tokens} more exceed the model's {limit} positions",
                hint="shorten the prompt or lower max_new_tokens",
            )
