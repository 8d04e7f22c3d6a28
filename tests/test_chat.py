"""`minisft chat`, and `minisft generate` with a file of prompts: one by one, in batches, in a conversation it is the same."""

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
from tiny import settings, train, write_rows

from minisft.__main__ import main
from minisft.answers import open_model
from minisft.commands import chat
from minisft.data.tokenizer import train_tokenizer

LONG = {"data.max_length": 256}
GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "top_k": None, "top_p": None, "seed": None}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model with a chat template (out) and one without (bare), both hardly trained."""
    folder = tmp_path_factory.mktemp("chat")
    train_tokenizer([], vocab_size=259, chat_template="chatml").save(folder / "tokenizer")
    settings(folder)
    rows = [{"question": f"{i}?", "answer": f"{i * i}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**LONG, "train.max_steps": 3}
    train(folder, **options)
    (folder / "bare").mkdir()
    settings(folder / "bare")
    train(folder / "bare", **options)
    return folder


def talk(monkeypatch, capsys, lines: str, *words: str) -> tuple[str, str]:
    """(what it printed, on stdout and on stderr)"""
    monkeypatch.setattr(sys, "stdin", StringIO(lines))
    assert main(["chat", *words, "--max_new_tokens=12"]) == 0
    return tuple(capsys.readouterr())


def test_each_answer_is_that_to_the_whole_conversation(home, monkeypatch, capsys):
    answerer = open_model(home / "out")
    messages: list[dict] = [{"role": "system", "content": "be kind"}]
    expected = []
    for question in ("1?", "/x?"):
        messages.append({"role": "user", "content": question})
        (answer,) = answerer.complete([answerer.ids_of(messages)], GREEDY)
        messages.append({"role": "assistant", "content": answer})
        expected.append(answer)
    file = home / "talk.jsonl"
    said, _ = talk(monkeypatch, capsys, f"1?\n//x?\n/save {file}\n", str(home / "out"), "--system=be kind")
    assert said == "\n".join([*expected, f"appended to {file}", "", ""])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"messages": messages}]
    train(home, **{"output_dir": str(home / "again"), "data.train_data": str(file), "train.max_steps": 1, **LONG})


def test_commands_forget_and_replace(home, monkeypatch, capsys):
    out = str(home / "out")
    first = talk(monkeypatch, capsys, "1?\n", out)[0]
    again = talk(monkeypatch, capsys, "2?\n/reset\n1?\n", out)[0]
    assert again.endswith(first)
    kind = talk(monkeypatch, capsys, "1?\n", out, "--system=be kind")[0]
    assert talk(monkeypatch, capsys, "2?\n/system be kind\n1?\n", out)[0].endswith(kind)
    said, _ = talk(monkeypatch, capsys, "/save\n/what\n1\\\n2?\n/quit\nnever\n", out)
    assert "nothing to save" in said and "/what is no command" in said and "/reset" in said
    assert said.count("\n") == 3 + len(chat.COMMANDS.splitlines())


def test_without_a_template_each_question_stands_alone(home, monkeypatch, capsys):
    out = str(home / "bare" / "out")
    said, warned = talk(monkeypatch, capsys, "ab.\ncd.\nab.\n", out)
    assert "stands alone" in warned and said.splitlines()[0] == said.splitlines()[2]
    assert main(["chat", out, "--system=x"]) == 2


def test_pieces_are_whole_characters_and_join_to_the_answer(home, monkeypatch):
    """Bytes of a character come in several tokens; none of its parts is shown."""
    answerer = open_model(home / "out")
    text = "a\u00e9\U0001f600 b"
    tokens = answerer.tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert len(tokens) > len(text)
    monkeypatch.setattr("minisft.generation.stream", lambda *_, **__: ((0, token) for token in tokens))
    pieces = list(chat.answer_pieces(answerer, [{"role": "user", "content": "?"}], {}))
    assert [piece for piece in pieces if piece] == list(text)
    monkeypatch.setattr("minisft.generation.stream", lambda *_, **__: ((0, token) for token in tokens[:2]))
    assert "".join(chat.answer_pieces(answerer, [{"role": "user", "content": "?"}], {})) == "a\ufffd"


def test_ctrl_c_ends_an_answer_and_keeps_what_there_is(home, monkeypatch, capsys):
    def pieces(*_):
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "answer_pieces", pieces)
    file = home / "cut.jsonl"
    said, _ = talk(monkeypatch, capsys, f"1?\n/save {file}\n", str(home / "out"))
    assert said.startswith("one ...\n")
    assert json.loads(file.read_text())["messages"][-1] == {"role": "assistant", "content": "one"}


# ---- the prompts of a file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_file_is_answered_as_one_by_one(home, capsys, batch_size):
    file, out = home / "asked.jsonl", home / f"answers-{batch_size}.jsonl"
    talks = [[{"role": "user", "content": "7" * i}] for i in (1, 9, 2)]
    talks.append([*talks[0], {"role": "assistant", "content": "49"}, {"role": "user", "content": "8?"}])
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks))
    few = ["--max_new_tokens=12", f"--batch_size={batch_size}"]
    words = ["generate", str(home / "out"), "--messages", str(file), "--system=be kind", *few]
    assert main([*words, "--out", str(out)]) == 0
    assert "4 rows" in capsys.readouterr().out
    answerer = open_model(home / "out")
    for line, messages in zip(out.read_text().splitlines(), talks, strict=True):
        messages = [{"role": "system", "content": "be kind"}, *messages]
        (answer,) = answerer.complete([answerer.ids_of(messages)], GREEDY)
        assert json.loads(line) == {"messages": messages, "output": answer}
    assert main(words) == 0
    assert capsys.readouterr().out == out.read_text()


def test_the_metric_counts_the_rows_that_are_right(home, capsys):
    answerer = open_model(home / "out")
    rows = [{"question": f"{i}?", "answer": f"right {i}"} for i in range(6)]
    for row in rows[:2]:  # what the model says is right by definition
        (row["answer"],) = answerer.complete([answerer.ids_of([{"role": "user", "content": row["question"]}])], GREEDY)
    file = home / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", str(home / "out"), "--data", str(file), "--metric=exact_match", "--max_new_tokens=12"]
    assert main(words) == 0
    assert capsys.readouterr().out == "exact_match 33.3%, 2 of 6\n"


@pytest.mark.parametrize(
    "rows, told",
    [
        ('{"messages": []}', "messages = []"),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages = "),
        ('{"prompt": "a"}', "messages = null"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "ends with an answer"),
        ("{", ":1"),
    ],
)
def test_wrong_rows_are_named(home, capsys, rows, told):
    (home / "wrong.jsonl").write_text(rows + "\n")
    assert main(["generate", str(home / "out"), "--messages", str(home / "wrong.jsonl")]) == 65
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--metric=exact_match"], ["--data=x", "--system=y"], ["--batch_size=0"]])
def test_options_that_do_not_fit_are_refused(home, capsys, words):
    write_rows(home / "some.jsonl")
    assert main(["generate", str(home / "out"), *words]) == 2
    assert words[-1].partition("=")[0] in capsys.readouterr().err
