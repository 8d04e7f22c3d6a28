"""`python -m minisft generate FOLDER --prompt "..."`: answer prompts with a trained model.

FOLDER is a run's output folder or a model folder (a checkpoint, any Hugging Face folder of a supported family). Prompts come from
--prompt, from the conversations of a file (--messages), from rows with answers (--data), or line by line from standard input.
They are formatted as the training prompts were: as a user's turn of the chat template, as an instruction, or unchanged. In
a folder that no run wrote, the chat template is used if there is one.
"""

import argparse
import json
import sys
from pathlib import Path

from minisft.answers import Answerer, add_sampling, open_model, sampling, system_turn
from minisft.atomic_folder import write_file
from minisft.errors import DATA, UserError, shortened
from minisft.files import checked_path, file_to_write


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="minisft generate", description="Answer prompts with a trained model.")
    parser.add_argument("folder", help="a model folder, or the output folder of a run")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", action="append", help="may be repeated; without it, the lines of stdin")
    given.add_argument(
        "--messages", metavar="FILE", help="conversations to go on with: rows with messages (JSON lines)"
    )
    given.add_argument("--data", metavar="FILE", help="rows with a prompt and its answer, in any format that trains")
    parser.add_argument("--metric", choices=["exact_match"], help="with --data: compare with the rows' answers")
    parser.add_argument("--out", metavar="FILE", help="with --messages or --data: write JSON lines there")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts that are completed at once (default 64)")
    parser.add_argument("--system", help="the system turn of a chat")
    parser.add_argument("--plain", action="store_true", help="use the prompt unchanged; \\n is a newline")
    add_sampling(parser)
    arguments = parser.parse_args(argv)
    folder = Path(checked_path(arguments.folder, "the folder"))
    for option in ("messages", "data"):
        if getattr(arguments, option):
            checked_path(getattr(arguments, option), f"--{option}")
    if arguments.out and not (arguments.messages or arguments.data):
        raise UserError(
            "--out is for the rows of a file", hint="give --data FILE or --messages FILE, or redirect the output"
        )
    if arguments.out:
        arguments.out = file_to_write(arguments.out, "--out")
    if arguments.metric and not arguments.data:
        raise UserError("--metric compares with the answers of rows", hint="give --data FILE")
    if not 1 <= arguments.batch_size <= 2**16:
        raise UserError(f"--batch_size {arguments.batch_size}: expected a number from 1 to 65,536")

    answerer = open_model(folder)
    if arguments.plain:
        answerer.layout, answerer.is_escaped = "plain", False
    if arguments.system and (answerer.layout != "chat" or arguments.data):
        problem = "rows of --data have their own" if arguments.data else "this model has no chat template"
        raise UserError(f"--system: {problem}", hint="write it into the prompts")
    if arguments.messages or arguments.data:
        return _answer_file(answerer, arguments)
    for prompt in arguments.prompt or (line.rstrip("\n") for line in sys.stdin):
        ids = answerer.ids_of([*system_turn(arguments.system), {"role": "user", "content": prompt}])
        print(answerer.complete([ids], sampling(arguments))[0], flush=True)
    return 0


# ---- files ------------------------------------------------------------------------------------------------------


def _answer_file(answerer: Answerer, arguments: argparse.Namespace) -> int:
    """Complete the prompts of a file in batches; print or write them, and the score by group."""
    from minisft.samples import Prompt, Sample, exact_match, read_prompts

    if arguments.data:
        from minisft.config.sections import DataSection
        from minisft.data.row_format import FormatOptions

        options = FormatOptions(
            prompt_format={"chat": "chat", "plain": "plain"}.get(answerer.layout, "auto"),
            control_tokens="escape" if answerer.is_escaped else "allow",
        )
        field_map = DataSection().field_map
        prompts = read_prompts(
            arguments.data, answerer.tokenizer, options=options, field_map=field_map, group_field=None
        )
        rows: list[dict] = [{"prompt": prompt.text, "answer": prompt.answer} for prompt in prompts]
    else:
        if answerer.layout != "chat":
            raise UserError("--messages: this model has no chat template", hint="give --data, or --prompt")
        rows = read_conversations(arguments.messages, arguments.system)
        prompts = [Prompt(answerer.ids_of(row["messages"]), "", "", "all") for row in rows]

    # Prompts of about one length are completed together: a batch keeps keys and values for its longest one.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    outputs: dict[int, str] = {}
    for start in range(0, len(order), arguments.batch_size):
        some = order[start : start + arguments.batch_size]
        outputs |= zip(some, answerer.complete([prompts[i].ids for i in some], sampling(arguments)))
        if sys.stderr.isatty():
            print(f"{len(outputs):,} of {len(prompts):,} prompts", end="\r", file=sys.stderr, flush=True)
    lines = [json.dumps({**row, "output": outputs[i]}, ensure_ascii=False) for i, row in enumerate(rows)]
    if arguments.out:
        write_file(arguments.out, "\n".join(lines) + "\n")
        print(f"written: {arguments.out}, {len(lines):,} rows")
    elif not arguments.metric:
        print("\n".join(lines))
    if arguments.metric:
        samples = [Sample(prompt, outputs[i]) for i, prompt in enumerate(prompts)]
        for right, total in exact_match(samples).values():
            print(f"exact_match {right / total:.1%}, {right:,} of {total:,}")
    return 0


def read_conversations(path: str, system: str | None) -> list[dict]:
    """The rows of a file, each with messages that end with a question. Raises UserError (exit code DATA)."""
    from minisft.data.rows import BadRow, place
    from minisft.data.sources import parse_source, read_rows

    rows = []
    for row in read_rows(parse_source(path)):
        if isinstance(row, BadRow):
            raise UserError(str(row), exit_code=DATA)
        messages = row.data.get("messages")
        is_list = isinstance(messages, list) and bool(messages)
        if not is_list or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in messages
        ):
            told = shortened(json.dumps(messages, ensure_ascii=False), 100)
            hint = "each row needs messages: a list of {role, content}, text both"
            raise UserError(f"{place(row.file, row.line)}: messages = {told}", hint=hint, exit_code=DATA)
        if messages[-1]["role"] == "assistant":
            hint = "cut the last turn off; --data FILE --metric exact_match compares with it"
            raise UserError(
                f"{place(row.file, row.line)}: the conversation ends with an answer", hint=hint, exit_code=DATA
            )
        has_system = messages[0]["role"] == "system"
        rows.append({"messages": messages if has_system else [*system_turn(system), *messages]})
    return rows
