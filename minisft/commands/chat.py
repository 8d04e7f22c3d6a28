"""`minisft chat FOLDER`: talk to a trained model in the terminal, answers appear as they are made.

FOLDER is what `minisft generate` takes. The whole conversation is rendered by the chat template for every answer, as in training.
Without a template there is nothing that joins turns, so each question stands alone.

Ctrl-C ends an answer; at the prompt it leaves, as Ctrl-D does. /save appends the conversation as a row of messages, which can
be trained on.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from minisft.answers import Answerer, add_sampling, open_model, sampling, system_turn
from minisft.errors import UserError
from minisft.files import checked_path

COMMANDS = """\
  /reset         forget the conversation
  /system TEXT   another system turn, and a new conversation; without TEXT: none
  /save FILE     append the conversation to FILE, as a row that can be trained on
  /help          these lines
  /quit          leave (or Ctrl-D)
A line that begins with // is sent with one / less. A line that ends with \\ goes on in the next one."""
UNFINISHED = "\ufffd"  # what a decoder puts where the bytes of a character are not all there


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="minisft chat", description="Talk to a trained model.", epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", help="a model folder, or the output folder of a run")
    parser.add_argument("--system", help="the system turn")
    add_sampling(parser, max_new_tokens=1024)
    arguments = parser.parse_args(argv)
    answerer = open_model(Path(checked_path(arguments.folder, "the folder")))
    if answerer.layout != "chat":
        if arguments.system:
            raise UserError("--system: this model has no chat template", hint="write it into the question")
        print("This model has no chat template: each question stands alone.", file=sys.stderr)
    if sys.stdin.isatty():
        import readline  # noqa: F401 - lines can be edited and called back

        print("/help lists the commands, Ctrl-D leaves.")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the command
    converse(answerer, sampling(arguments), system_turn(arguments.system))
    return 0


def converse(answerer: Answerer, options: dict, start: list[dict]) -> None:
    """Questions and answers until the input ends. start: the system turn, if there is one."""
    messages = list(start)
    while (line := read_line()) is not None:
        word, _, rest = line.partition(" ")
        if word.startswith("/") and not word.startswith("//"):
            if word in ("/quit", "/exit"):
                return
            elif word == "/reset":
                messages = list(start)
            elif word == "/system" and answerer.layout == "chat":
                start = system_turn(rest.strip())
                messages = list(start)
            elif word == "/save":
                save(messages, rest.strip())
            else:
                if word != "/help":
                    print(f"{word} is no command of this chat")
                print(COMMANDS)
            continue
        if not line.strip():
            continue
        question = {"role": "user", "content": line[1:] if word.startswith("//") else line}
        try:
            answer = say(answerer, [*messages, question], options)
        except UserError as error:  # the conversation is too long, say
            print(f"{error}", file=sys.stderr)
            continue
        messages += [question, {"role": "assistant", "content": answer}]


def read_line() -> str | None:
    """The user's next line; None at the end of the input, or where Ctrl-C came."""
    lines, prompt = [], "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
        prompt = ". " if prompt else ""


def say(answerer: Answerer, messages: list[dict], options: dict) -> str:
    """Print the answer as it is made, and return it. Ctrl-C ends it where it is."""
    answer = ""
    try:
        for piece in answer_pieces(answerer, messages, options):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print()
    return answer


def answer_pieces(answerer: Answerer, messages: list[dict], options: dict) -> Iterator[str]:
    """The answer in pieces of whole characters, which together are what the tokens decode to."""
    from minisft.generation import stop_ids, stream

    stops = stop_ids(answerer.model, answerer.tokenizer)
    tokens, told, text = [], "", ""
    for _, token in stream(answerer.model, [answerer.ids_of(messages)], stop_ids=stops, **options):
        tokens.append(token)
        text = answerer.tokenizer.decode(tokens)
        if text.startswith(told) and not text.endswith(UNFINISHED):
            yield text[len(told) :]
            told = text
    yield text[len(told) :]


def save(messages: list[dict], name: str) -> None:
    """Append the conversation to a file of JSON lines, and tell so; a mistake is told too."""
    if not any(turn["role"] == "assistant" for turn in messages):
        print("there is no answer yet, so there is nothing to save")
        return
    try:
        path = Path(checked_path(name, "/save FILE")).expanduser()
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except UserError as error:
        print(error)
    except OSError as error:
        print(f"{name}: {error.strerror}")
    else:
        print(f"appended to {path}")
