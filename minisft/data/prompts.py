"""The prompt of a row whose parts are in columns of their own.

    instruction, question, query, input    the question: the first of them that the row has
    input, context                         belong to the question
    system, system_prompt                  the system turn
    history                                earlier turns, [[user, assistant], ...]; they are context

A value that is null counts as absent. Other columns that a prompt may be in are never joined by a guess: detect_format.py
reports them as unused.
"""

from dataclasses import dataclass, field

from minisft.data.chat.conversations import describe_type
from minisft.data.rows import RowError

QUESTIONS = ("instruction", "question", "query", "input")
EXTRAS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
PROMPT_FIELDS = (*QUESTIONS, "context", "history", *SYSTEMS)


@dataclass(slots=True)
class Prompt:
    text: str
    extra: str = ""  # what the text asks about
    system: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)  # earlier questions and their answers

    @property
    def is_empty(self) -> bool:
        return not self.text.strip() and not self.extra.strip()

    @property
    def question(self) -> str:
        return f"{self.text}\n\n{self.extra}" if self.text.strip() and self.extra.strip() else self.extra or self.text

    def messages(self) -> list[dict]:
        """The prompt as turns of a conversation."""
        turns = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for question, answer in self.history:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*turns, {"role": "user", "content": self.question}]

    def plain(self) -> str:
        """The prompt as text without a frame; the answer follows directly."""
        return f"{self.system}\n\n{self.question}" if self.system.strip() else self.question


def prompt_of(row: dict) -> Prompt | None:
    """The prompt of a row of strings, which is either in `prompt` or in the columns of a question. None: in neither.

    Raises RowError.
    """
    if row.get("prompt") is not None:
        return Prompt(string_of(row, "prompt"), system=system_of(row))
    head = question_field(row)
    return None if head is None else question_of(row, head)


def question_field(row: dict) -> str | None:
    return next((name for name in QUESTIONS if row.get(name) is not None), None)


def question_of(row: dict, head: str) -> Prompt:
    """The question in the column `head`, with all that belongs to it. Raises RowError."""
    extras = [string_of(row, name) for name in EXTRAS if name != head and row.get(name) is not None]
    extra = "\n\n".join(text for text in extras if text.strip())
    return Prompt(string_of(row, head), extra, system_of(row), history_of(row))


def plain_prompt(
    instruction: str, input: str = "", system: str = "", history: list[tuple[str, str]] | None = None
) -> str:
    """The text of a prompt for a tokenizer without a chat template; the answer follows its last newline."""
    before = f"{system}\n\n" if system.strip() else ""
    before += "".join(f"{plain_prompt(question)}{answer}\n\n" for question, answer in history or [])
    input = f"### Input:\n{input}\n\n" if input.strip() else ""
    return f"{before}### Instruction:\n{instruction}\n\n{input}### Response:\n"


def string_of(row: dict, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise RowError("not a string", f"{name} is {describe_type(row.get(name))}")
    return row[name]


def system_of(row: dict) -> str:
    """The system prompt, "" if there is none. Raises RowError if two columns have different ones."""
    found = {string_of(row, name) for name in SYSTEMS if row.get(name) is not None}
    found = {text for text in found if text.strip()}
    if len(found) > 1:
        raise RowError("two system prompts", f"the fields {' and '.join(SYSTEMS)} differ")
    return found.pop() if found else ""


def history_of(row: dict) -> list[tuple[str, str]]:
    history = row.get("history")
    if history is None:
        return []
    is_pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not is_pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise RowError("bad history", "not a list of pairs of strings, [[user, assistant], ...]")
    if any(not text.strip() for pair in history for text in pair):
        raise RowError("bad history", "a turn has no text")
    return [(question, answer) for question, answer in history]
