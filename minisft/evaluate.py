"""Token-exact evaluation, and samples that show what the model has learned.

The evaluation loss is (sum of nll over every target of the set) / (number of targets). It does not depend on the batch
size, on packing, or on the number of ranks.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from minisft import runtime
from minisft.data.conversations import RowError
from minisft.data.formats import to_example
from minisft.data.layout import FormatOptions, detect_layout, rename_fields
from minisft.data.loader import Loader
from minisft.data.rows import BadRow, place
from minisft.data.sources import parse_source, read_rows
from minisft.data.tokenizer import Tokenizer
from minisft.errors import DATA, UserError
from minisft.generate import generate
from minisft.metrics import Sums


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, loss: Callable, device: torch.device, precision: str
) -> dict[str, float]:
    """Means over the whole set: loss, mean_token_accuracy, entropy (nats). Leaves the model in training mode as it was."""
    training = model.training
    model.eval()
    sums = Sums(device)
    for step in range(loader.steps_per_epoch):
        for batch in loader.step(0, step):
            with runtime.autocast(device, precision):
                sums.add(loss(model, batch.to(device), 1.0)[1])
    model.train(training)
    return sums.means()


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
    """The rows of a data file as prompts: every format that has a prompt and an answer. Raises UserError.

    Whatever is trained on, of a preference row the chosen answer is the right one.
    """
    options = replace(options, answers="chosen")
    prompts: list[Prompt] = []
    layout = None
    for row in read_rows(parse_source(path)):
        if isinstance(row, BadRow):
            raise UserError(str(row), exit_code=DATA)
        try:
            data = rename_fields(row.data, field_map)
            layout = layout or detect_layout(data, "auto", options, tokenizer.template is not None)
            example = to_example(data, layout, options)
        except RowError as error:
            raise UserError(f"{place(row.file, row.line)}: {error}", exit_code=DATA) from None
        if example.messages:
            *prompt, answer = example.messages
            text = tokenizer.apply_chat_template(prompt, tools=example.tools, add_generation_prompt=True)
            ids, answer = tokenizer.encode(text), answer["content"]
        elif len(example.pieces) == 2:
            text, answer = (piece.text for piece in example.pieces)
            ids = (tokenizer.prefix_ids if options.add_special_tokens else []) + tokenizer.encode(text)
        else:
            raise UserError(
                f"{place(row.file, row.line)}: {layout.format} rows have no prompt to complete",
                hint="evaluate.generate_data needs rows with a prompt and an answer",
                exit_code=DATA,
            )
        group = str(row.data.get(group_field, "")) if group_field else "all"
        prompts.append(Prompt(ids, text, answer, group))
    return prompts


@dataclass(frozen=True)
class Sample:
    prompt: Prompt
    output: str

    @property
    def correct(self) -> bool:
        return self.output.strip() == self.prompt.answer.strip()


def complete(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
    precision: str,
    batch_size: int = 64,
) -> list[Sample]:
    """Greedy completions of the prompts, up to a token that ends an answer."""
    device, samples = next(model.parameters()).device, []
    for i in range(0, len(prompts), batch_size):
        chunk = prompts[i : i + batch_size]
        with runtime.autocast(device, precision):
            outputs = generate(
                model, [p.ids for p in chunk], max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids
            )
        samples += [Sample(p, tokenizer.decode(ids)) for p, ids in zip(chunk, outputs)]
    return samples


def exact_match(samples: list[Sample]) -> dict[str, tuple[int, int]]:
    """(right, all) by group, in the order in which the groups first appear."""
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for sample in samples:
        table[sample.prompt.group][0] += sample.correct
        table[sample.prompt.group][1] += 1
    return {group: (right, total) for group, (right, total) in table.items()}
