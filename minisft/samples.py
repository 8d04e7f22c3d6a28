"""Held-out prompts completed by the model, and how many of the completions are right."""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from minisft import runtime
from minisft.data.cache import Documents
from minisft.data.chat.masks import as_rendered
from minisft.data.detect_format import detect_row_format, rename_fields
from minisft.data.encoding import encode_prompt, prompt_variables
from minisft.data.formats import plain_prompt, to_example
from minisft.data.kinds import ANSWER, KIND_MASK, REASONING, TOOL_CALL, USER
from minisft.data.row_format import FormatOptions
from minisft.data.rows import BadRow, RowError, place
from minisft.data.sources import parse_source, read_rows
from minisft.data.tokenizer import Tokenizer
from minisft.errors import DATA, UserError
from minisft.generation import generate, stop_ids
from minisft.model.decoder import Decoder
from minisft.model.shards import device_of

LONGEST_EXAMPLE = 150  # characters of a prompt that is shown as an example


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete and the answer that counts as right."""

    ids: list[int]  # the prompt's tokens, exactly as in training
    text: str
    answer: str
    group: str  # rows are scored by group


def read_prompts(
    path: str, tokenizer: Tokenizer, *, options: FormatOptions, field_map: dict[str, str], group_field: str | None
) -> list[Prompt]:
    """The rows of a data file as prompts, in any format that has a prompt and an answer. Raises UserError.

    For a preference row the chosen answer counts as the right one, whichever trainer runs.
    """
    options = replace(options, answers="chosen")
    prompts: list[Prompt] = []
    row_format = None
    for row in read_rows(parse_source({"path": path, "field_map": field_map})):
        if isinstance(row, BadRow):
            raise UserError(str(row), exit_code=DATA)
        try:
            data = rename_fields(row.data, field_map)
            row_format = row_format or detect_row_format(data, "auto", options, tokenizer.template is not None)
            example = to_example(data, row_format, options)
            if example.messages:
                *messages, answer = as_rendered(example.messages, options.reasoning)
                if not messages or answer["role"] != "assistant" or not answer["content"].strip():
                    raise RowError("nothing to complete", "the last turn must be an answer in words, after other turns")
                variables = (example.variables or {}) | prompt_variables(tokenizer, example, options)
                prompt, answer = replace(example, messages=messages, variables=variables), answer["content"]
            elif len(example.pieces) == 2:
                prompt, answer = replace(example, pieces=example.pieces[:1]), example.pieces[1].text
            else:
                raise UserError(
                    f"{place(row.file, row.line)}: {row_format.name} rows have no prompt to complete",
                    hint="evaluate.generate_data needs rows with a prompt and an answer",
                    exit_code=DATA,
                )
            text, ids = encode_prompt(
                tokenizer,
                prompt,
                layout=row_format.prompt,
                control_tokens=options.control_tokens,
                add_special_tokens=options.add_special_tokens,
            )
        except RowError as error:
            raise UserError(f"{place(row.file, row.line)}: {error}", exit_code=DATA) from None
        group = str(row.data.get(group_field, "")) if group_field else "all"
        prompts.append(Prompt(ids, text, answer, group))
    return prompts


def example_prompt(documents: Documents, tokenizer: Tokenizer, layout: str) -> str:
    """The shortest of the first prompts of the data, as `minisft generate --prompt` takes it; "Hello" if none of them is a short
    line.

    layout: how a question became a prompt, as in RowFormat.prompt.
    """
    cache, prompts = documents.cache, []
    before, after = plain_prompt("\0").split("\0") if layout == "instruction" else ("", "")
    for d in documents.index[:100]:
        span = slice(int(cache.offsets[d]), int(cache.offsets[d + 1]))
        is_user = np.append((cache.kinds[span] & KIND_MASK) == USER, False)
        first = int(is_user.argmax())
        length = int((~is_user[first:]).argmax())  # 0 if the document has no user's turn
        text = tokenizer.decode(cache.ids[span][first : first + length])
        if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
            continue
        text = text[len(before) : len(text) - len(after)]
        if layout == "plain":
            text = text.replace("\n", "\\n") if "\\" not in text else ""  # a backslash could begin a newline there
        if 0 < len(text) <= LONGEST_EXAMPLE and text.isprintable():
            prompts.append(text.strip() if layout == "chat" else text)
    return min(prompts, key=len, default="Hello")


def prompts_of(documents: Documents, tokenizer: Tokenizer, number: int) -> list[Prompt]:
    """An even choice of the documents as prompts: each up to its first answer, which counts as right. Of text without answers the
    first quarter is the prompt, and of a pair the first answer counts."""
    cache, prompts = documents.cache, []
    units = np.linspace(0, documents.num_units - 1, min(number, documents.num_units)).astype(int)
    for at in documents.pieces_of(units)[0]:
        span = slice(int(documents.start[at]), int(documents.end[at]))
        ids, kinds = cache.ids[span].tolist(), cache.kinds[span] & KIND_MASK
        is_answer = np.append(np.isin(kinds, (ANSWER, REASONING, TOOL_CALL)), False)
        first = int(is_answer.argmax()) or math.ceil(len(ids) / 4)
        length = int((~is_answer[first:]).argmax()) or len(ids) - first
        text, answer = (tokenizer.decode(part) for part in (ids[:first], ids[first : first + length]))
        prompts.append(Prompt(ids[:first], text, answer, "all"))
    return prompts


@dataclass(frozen=True)
class Sample:
    prompt: Prompt
    output: str

    @property
    def correct(self) -> bool:
        return self.output.strip() == self.prompt.answer.strip()


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
    precision: str,
    batch_size: int = 64,
) -> list[Sample]:
    """Greedy completions of the prompts, up to a token that ends an answer."""
    device, stops, samples = device_of(model.embed_tokens.weight), stop_ids(model, tokenizer), []
    for i in range(0, len(prompts), batch_size):
        chunk = prompts[i : i + batch_size]
        with runtime.autocast(device, precision):
            outputs = generate(model, [p.ids for p in chunk], max_new_tokens=max_new_tokens, stop_ids=stops)
        samples += [Sample(p, tokenizer.decode(ids)) for p, ids in zip(chunk, outputs)]
    return samples


def exact_match(samples: list[Sample]) -> dict[str, tuple[int, int]]:
    """(right, all) by group, in the order in which the groups first appear."""
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for sample in samples:
        table[sample.prompt.group][0] += sample.correct
        table[sample.prompt.group][1] += 1
    return {group: (right, total) for group, (right, total) in table.items()}
