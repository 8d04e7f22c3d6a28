"""The audit: it finds what was planted, counts everything once, and says the same in three forms."""

import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from minisft import __main__ as commands
from minisft.commands.audit import audit
from minisft.config.load import load
from minisft.data.audit import (
    TITLES,
    all_findings,
    count_tokens,
    kind_table,
    length_histogram,
    overlap,
    quick_findings,
    source_table,
    stretches,
)
from minisft.data.cache import build_cache
from minisft.data.documents import select_documents
from minisft.data.kinds import TRAINED
from minisft.data.row_format import FormatOptions
from minisft.data.sources import parse_source
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.errors import DATA, UserError
from minisft.prepare.data import prepare_data
from minisft.prepare.options import prepare_tokenizer

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
TOKENIZER = train_tokenizer(["Hello, how are you?", "2 + 2 = 4"] * 5, 300)
GOOD = [{"question": f"How much is {i} + {i}?", "answer": f"It is {2 * i}."} for i in range(20)]


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def opened(folder, rows, tokenizer=TOKENIZER, max_length=None, truncation="right", **options):
    path = write(folder / f"rows{len(list(folder.iterdir()))}.jsonl", rows)
    options = {"on_bad_row": "skip", "options": FormatOptions(**options)}
    cache = build_cache([parse_source(path)], tokenizer, cache_dir=folder / "cache", **options)
    return select_documents(cache, max_length=max_length, truncation=truncation)


def found(documents, tokenizer=TOKENIZER, max_length=None, truncation="right") -> dict[str, int]:
    return {finding.name: finding.count for finding in all_findings(documents, tokenizer, max_length, truncation)}


def with_bos(folder):
    """TOKENIZER with a BOS token, which it puts before every text."""
    backend = TOKENIZER.backend.from_str(TOKENIZER.backend.to_str())
    backend.add_special_tokens(["<s>"])
    ids = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    TOKENIZER.save(folder)
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>"}))
    return load_tokenizer(folder)


# ------------------------------------------------------------------------------------------------- what was planted


def test_nothing_is_found_where_nothing_is_wrong(tmp_path):
    assert found(opened(tmp_path, GOOD)[0]) == {}


def test_each_finding_where_it_was_planted(tmp_path):
    long = {"question": "Count.", "answer": "one two three " * 30}
    documents, _ = opened(tmp_path, [*GOOD, long, GOOD[3], GOOD[3]], max_length=60)
    findings = {f.name: f for f in all_findings(documents, TOKENIZER, 60, "right")}
    assert {name: f.count for name, f in findings.items()} == {"duplicate": 2, "too_long": 1, "cut_answer": 1}
    assert findings["cut_answer"].documents == (20,) and findings["cut_answer"].examples[0].endswith(":21")
    assert findings["duplicate"].documents == (21, 22) and findings["duplicate"].share == 2 / 23


def test_rows_without_a_label(tmp_path):
    eos = TOKENIZER.eos_token_id
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
        {"input_ids": [5, 6, eos], "labels": [-100, 6, eos]},
    ]
    (finding,) = quick_findings(opened(tmp_path, rows)[0].cache, TOKENIZER, None, "right")
    assert (finding.name, finding.count, finding.total, finding.documents) == ("no_label", 1, 2, (0,))


def test_answers_of_which_the_cut_leaves_nothing(tmp_path):
    """They are dropped, and counted as dropped; that many are is a finding, unless they were to be dropped."""
    long = [{"question": f"Count {i}. " * 30, "answer": "one"} for i in range(5)]
    documents, account = opened(tmp_path, [*GOOD, *long], max_length=60)
    assert account.dropped == {"with nothing to train after the cut": 5}
    assert found(documents, max_length=60) == {"lost_answer": 5, "too_long": 5}
    assert found(documents, max_length=60, truncation="left") == {"too_long": 5}
    assert found(documents, max_length=60, truncation="drop") == {"too_long": 5}


def test_ends_that_are_not_trained(tmp_path):
    parts = [{"type": "text", "text": "four"}, {"type": "text", "text": " (I think)", "train": False}]
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    documents, _ = opened(tmp_path, [{"messages": messages}, {"prompt": "2 + 2 = ", "completion": "4"}])
    assert "untrained_end" not in found(documents)  # a part that is left out on purpose is none
    documents, _ = opened(tmp_path, [{"prompt": "2 + 2 = ", "completion": "4"}], add_eos=False)
    assert found(documents)["untrained_end"] == 1
    # In a cache whose terminators were not trained, each conversation is found.
    documents, _ = opened(tmp_path, GOOD)
    kinds = np.array(documents.cache.kinds)
    kinds[documents.cache.ids == TOKENIZER.eos_token_id] &= ~np.uint8(TRAINED)
    object.__setattr__(documents.cache, "kinds", kinds)
    assert found(documents) == {"untrained_end": len(GOOD)}
    # An end that is cut off is another finding.
    assert found(documents, max_length=41)["untrained_end"] == 1  # of the one short enough
    assert "untrained_end" not in found(documents, max_length=38)


def test_a_document_of_max_length_is_not_too_long(tmp_path):
    documents, _ = opened(tmp_path, GOOD[:1])
    length = int(documents.lengths[0])
    assert found(documents, max_length=length) == {}
    assert found(documents, max_length=length - 1)["too_long"] == 1


def test_stop_tokens_within_rows_of_ids_are_ends(tmp_path):
    """They have no kind of their own there; an answer that goes over into context without one is open."""
    eos = TOKENIZER.eos_token_id
    closed = {"input_ids": [5, 6, eos, 7, 8, eos], "labels": [-100, 6, eos, -100, 8, eos]}
    still_open = {"input_ids": [5, 6, 7, 7, 8, eos], "labels": [-100, 6, 7, -100, 8, eos]}
    findings = quick_findings(opened(tmp_path, [closed, still_open])[0].cache, TOKENIZER, None, "right")
    assert [(f.name, f.documents) for f in findings] == [("untrained_end", (1,))]


def test_two_bos(tmp_path):
    tokenizer = with_bos(tmp_path / "tokenizer")
    documents, _ = opened(tmp_path, [{"text": "Hello"}, {"text": "<s>Hello"}, {"text": "<s><s>Hello"}], tokenizer)
    counts = found(documents, tokenizer)
    assert (counts["double_bos"], counts["duplicate"]) == (1, 1)


def test_control_tokens_and_what_does_not_round_trip(tmp_path):
    rows = [*GOOD, {"question": "Say <|im_end|>", "answer": "No."}, *GOOD[:1]]
    documents, _ = opened(tmp_path, rows, control_tokens="escape")
    findings = {f.name: f.documents for f in all_findings(documents, TOKENIZER, None, "right")}
    assert findings == {
        "control_token": (20,),
        "round_trip": (20,),
        "duplicate": (21,),
    }  # decoded, it would be the token
    documents, _ = opened(tmp_path, rows, control_tokens="allow")
    findings = {f.name: (f.documents, f.count) for f in all_findings(documents, TOKENIZER, None, "right")}
    assert findings == {"control_token": ((20,), 1), "duplicate": ((21,), 1)}


def test_plain_text_may_hold_special_tokens(tmp_path):
    """They are there on purpose, and are no finding even where another source has one in a message."""
    rows = [[{"question": "Say <|im_end|>", "answer": "No."}], [{"text": "a<|im_end|>b"}] * 2]
    sources = [parse_source(write(tmp_path / f"{i}.jsonl", source)) for i, source in enumerate(rows)]
    cache = build_cache(sources, TOKENIZER, cache_dir=tmp_path, options=FormatOptions(control_tokens="allow"))
    findings = all_findings(select_documents(cache, max_length=None, truncation="right")[0], TOKENIZER, None, "right")
    assert [(f.count, f.documents) for f in findings if f.name == "control_token"] == [(1, (0,))]


def test_tokens_that_begin_before_the_answer(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %} {% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    TOKENIZER.save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer", chat_template=template)
    assert len(tokenizer.encode(" how")) == 1 < len(tokenizer.encode(" x"))
    rows = [{"question": "Ask me", "answer": answer} for answer in ("how", "x")]
    documents, account = opened(tmp_path, rows, tokenizer)
    (finding,) = all_findings(documents, tokenizer, None, "right")
    assert (finding.name, finding.count, finding.total) == ("straddling", 1, account.trained)


def test_overlap_of_train_and_evaluation(tmp_path):
    train, _ = opened(tmp_path, GOOD)
    other = {"question": GOOD[4]["question"], "answer": "I do not know."}
    held_out, _ = opened(tmp_path, [GOOD[2], other, {"question": "New?", "answer": "Yes."}])
    counts = {finding.name: finding.documents for finding in overlap(train, held_out)}
    assert counts == {"eval_overlap": (0,), "eval_prompt_overlap": (0, 1)}


def test_a_prompt_of_bos_alone_is_none(tmp_path):
    tokenizer = with_bos(tmp_path / "tokenizer")
    train, _ = opened(tmp_path, [{"text": "Hello"}], tokenizer)
    held_out, _ = opened(tmp_path, [{"text": "how are you?"}], tokenizer)
    assert overlap(train, held_out) == []
    assert [f.name for f in overlap(train, train)] == ["eval_overlap"]


def test_each_finding_has_a_limit():
    config, _ = load({"model": {"model_name_or_path": "m", "config": None}, "data": {"train_data": "x.jsonl"}})
    assert set(vars(config.audit)) == {f"max_{name}" for name in TITLES}


def test_stretches_show_what_is_trained_cut_and_dangerous(tmp_path):
    row = {"question": "a\x1b[31m\u202e", "answer": "two words"}
    documents, _ = opened(tmp_path, [row])
    (start,), (end,) = documents.start, documents.end
    parts = stretches(documents.cache, 0, int(start), int(end) - 2, TOKENIZER, 1000)
    assert [p.text for p in parts if p.state == "trained"] == ["two words"]
    cut = [(p.text, p.is_special, p.kind) for p in parts if p.state == "cut"]
    assert cut == [("<|im_end|>", True, "terminator"), ("\n", False, "header")]
    assert "a\\x1b[31m\\u202e" in "".join(p.text for p in parts)  # as Python writes it
    cache = opened(tmp_path, [{"text": "Hello"}])[0].cache
    parts = stretches(cache, 0, 0, int(cache.offsets[1]), TOKENIZER, 1000)
    assert parts[0].state == "context" and parts[1].state == "trained"  # the first token is never a target
    rows = [{"prompt": "2 + 2 = ", "completion": "4", "weight": weight} for weight in (0.0, 1.0)]
    cache = opened(tmp_path, rows)[0].cache
    for d, expected in enumerate([{"context"}, {"context", "trained"}]):
        bounds = int(cache.offsets[d]), int(cache.offsets[d + 1])
        assert {p.state for p in stretches(cache, d, *bounds, TOKENIZER, 1000)} == expected


# ------------------------------------------------------------------------------------------------- the account closes


def random_rows(rng: random.Random) -> list:
    """Rows of one format, some of them wrong, some long, some equal."""
    words = ["a", "Hello", "2 + 2", "\u00e4\u20ac", "<|im_end|>", " ", "x" * 40]

    def text() -> str:
        return " ".join(rng.choice(words) for _ in range(max(1, rng.randint(-1, 9))))

    def messages() -> list[dict]:
        roles = rng.choice(
            [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 3, ["user"]]
        )
        return [{"role": role, "content": text(), "train": rng.random() < 0.9} for role in roles]

    makers = [
        lambda: {"messages": messages()},
        lambda: {"question": text(), "answer": text()},
        lambda: {"prompt": text(), "completion": text(), "weight": rng.choice([0.0, 1.0, 2.5])},
        lambda: {"text": text()},
        lambda: {"input_ids": [rng.randint(0, 290) for _ in range(rng.randint(1, 9))]},
    ]
    maker = rng.choice(makers)
    rows = [maker() for _ in range(rng.randint(3, 7))]
    rows += rng.choices(rows, k=rng.randint(0, 2))
    # Not at the end, where an empty line is no row.
    rows.insert(rng.randrange(1, len(rows)), rng.choice(['{"broken\n', "[1]\n", "\n", rows[0]]))
    return rows


@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_account_closes_over_random_corpora(number, tmp_path):
    """Every row is used or dropped with a reason, every token is trained, context, cut or dropped (Accounting asserts
    both), and the tables of the audit add up to the same numbers, also by source. Five corpora of any formats a run."""
    rng, names, closed, refused = random.Random(0), set(), 0, 0
    while closed < number:
        folder = tmp_path / str(closed + refused)
        folder.mkdir()
        corpora = [random_rows(rng) for _ in range(5)]
        sources = [
            parse_source({"path": write(folder / f"{i}.jsonl", rows), "weight": rng.choice([0.5, 1.0, 2.5])})
            for i, rows in enumerate(corpora)
        ]
        options = FormatOptions(
            control_tokens=rng.choice(["error", "escape", "allow"]),
            turns_max_length=(limit := rng.choice([None, 8, 30])),
            add_eos=rng.random() < 0.8,
        )
        truncation = "turns" if limit else rng.choice(["right", "left", "drop"])
        max_length = limit or rng.choice([None, 20])
        split_at = None if max_length else rng.choice([None, 5])
        try:
            cache = build_cache(sources, TOKENIZER, cache_dir=folder, on_bad_row="skip", options=options)
            documents, account = select_documents(
                cache, max_length=max_length, truncation=truncation, split_at=split_at
            )
        except UserError as error:
            assert "no row is left" in str(error) or "no usable row" in str(error)
            refused += 1
            assert refused < number / 50
            continue
        assert account.rows_read == sum(map(len, corpora))
        counts = count_tokens(documents, split_at)
        assert counts.sum(axis=(0, 1)).tolist() == [account.context, account.trained]
        assert sum(row["trained"] for row in kind_table(counts).values()) == account.trained
        table = source_table(documents, counts)
        assert [row["rows_read"] for row in table] == [len(rows) for rows in corpora]
        assert all(row["rows_used"] + sum(row["bad_rows"].values()) <= row["rows_read"] for row in table)
        assert sum(row["rows_used"] for row in table) == account.rows_used
        assert sum(row["trained"] for row in table) == account.trained
        assert sum(row["context"] for row in table) == account.context
        assert sum(row["documents_per_epoch"] for row in table) == account.num_documents == len(documents)
        assert sum(bin["documents"] for bin in length_histogram(documents.lengths)) == len(documents)
        findings = {f.name: f for f in all_findings(documents, TOKENIZER, max_length, truncation)}
        assert all(0 < finding.count <= finding.total for finding in findings.values())
        names |= findings.keys()
        closed += len(corpora)
    assert names > {"no_label", "lost_answer", "untrained_end", "cut_answer", "too_long", "control_token", "duplicate"}


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def config(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer")
    write(tmp_path / "train.jsonl", [*GOOD, {"question": "<script>alert(1)</script>", "answer": "</pre><b>&amp;"}])
    write(tmp_path / "test.jsonl", [{"question": "New?", "answer": "Yes."}])
    path = tmp_path / "run.toml"
    path.write_text(
        f'output_dir = "{tmp_path}/out"\n[model]\ntokenizer_name_or_path = "tokenizer"\nconfig = {{model_type = "llama"}}\n'
        '[data]\ntrain_data = "train.jsonl"\neval_data = "test.jsonl"\n'
    )
    return path


def run(*argv) -> int:
    return commands.main(["audit", *map(str, argv)])


def test_text_and_json_say_the_same(config, capsys):
    assert run(config, "--show", 2) == 0
    text = capsys.readouterr().out
    assert run(config, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    train = report["sets"]["train"]
    assert f"{train['rows']['read']} read = {train['rows']['used']} used + 0 dropped" in text
    assert f"{train['tokens']['trained']:,} trained + {train['tokens']['context']:,} context" in text
    assert report["exceeded"] == [] and text.startswith("ok ")
    assert "[It is 0.<|im_end|>]" in text and "\x1b" not in text  # brackets where nobody sees colours
    assert report["sets"].keys() == {"train", "eval"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"packing": True, "max_length": 80},
        {"packing": True, "max_length": 40, "packing_strategy": "bfd_split"},
        {"packing": True, "max_length": 40, "packing_strategy": "wrapped"},
        {"eval_data": None, "eval_fraction": 0.3},
    ],
)
def test_its_steps_and_documents_are_those_of_the_run(config, keys):
    keys = {f"data.{name}": value for name, value in keys.items()} | {"train.per_device_train_batch_size": 2}
    settings, _ = load(str(config), keys)
    loader, evals, _ = prepare_data(settings, prepare_tokenizer(settings)[0])
    report = audit(settings)[0]["sets"]
    train, packing = report["train"], report["train"]["packing"]
    assert train["epoch"] == {"documents": len(loader.documents), "tokens": int(loader.documents.lengths.sum())}
    plan = packing["packed" if packing["is_on"] else "unpacked"]
    assert plan["packs"] == loader.plan.num_packs and plan["steps_per_epoch"] == loader.steps_per_epoch
    assert plan["steps"] == 3 * loader.steps_per_epoch
    assert train["held_out"] == (len(evals[""].documents) if settings.data.eval_fraction else 0)


def test_one_row_by_its_place(config, capsys, monkeypatch):
    assert run(config, "--row", "train.jsonl:3") == 0
    text = capsys.readouterr().out
    assert text.startswith("-- train, ") and "How much is 2 + 2?" in text and "[It is 4.<|im_end|>]" in text
    assert run(config, "--row", "train.jsonl:3", "--max_length", 41) == 0
    assert "[It is 4.]{<|im_end|>" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(config, "--row", "train.jsonl:3") == 0
    text = capsys.readouterr().out
    assert "\x1b[34m<|im_start|>\x1b[0massistant\n\x1b[32mIt is 4.\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(config, "--row", "train.jsonl:3") == 0 and "\x1b" not in capsys.readouterr().out
    assert run(config, "--row", "train.jsonl:99") == DATA
    assert "no document comes from there" in capsys.readouterr().err
    assert run(config, "--row", "3") == 2


def test_a_limit_that_is_exceeded(config, capsys):
    write(config.parent / "test.jsonl", GOOD[:1])
    assert run(config) == DATA
    text = capsys.readouterr().out
    assert (
        "EXCEEDED   eval: 1 of 1 (100.00%) evaluation documents that are trained on too; audit.max_eval_overlap = 0"
        in text
    )
    assert run(config, "--audit.max_eval_overlap", 1) == 0


def test_a_run_stops_before_its_first_step(config, tmp_path, capsys):
    from minisft.train import run as train

    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}, {"input_ids": [5, 6, 7]}]
    write(config.parent / "train.jsonl", rows)
    with pytest.raises(
        UserError, match=r"train: 1 of 2 \(50.00%\) documents with nothing to train: .*train.jsonl:1"
    ) as e:
        train(config, precision="fp32", report_to=[])
    assert e.value.exit_code == DATA and "audit.max_no_label = 0.05" in e.value.hint
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_names_of_fields_cannot_repaint_the_terminal(config, capsys):
    write(config.parent / "train.jsonl", [row | {"\x1b[31mfield\x07": 1} for row in GOOD])
    assert run(config, "--show", 1) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\x07" not in text and "\\x1b[31mfield\\x07" in text


def test_the_page_escapes_bad_rows_and_names(config, tmp_path, capsys):
    rows = [*GOOD, {"<img src=x>": "<img src=y>"}]
    path = write(config.parent / "<i>.jsonl", rows)
    assert run(config, "--train_data", path, "--on_bad_row", "skip", "--html", tmp_path / "a.html") == 0
    page = Checked()
    page.feed((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.links == [] and "<img src=x>" in page.text and "<i>.jsonl" in page.text


def test_the_page_has_the_notes_and_warnings_of_the_terminal(config, tmp_path, capsys):
    rows = [
        {"prompt": "a " * 9, "completion": " b" * 99, "label": True, "context": "<b>", "weight": 2, "<i>": 1},
        {"prompt": "a", "completion": " c", "label": True},
    ]
    write(config.parent / "train.jsonl", rows)
    write(
        config.parent / "test.jsonl", [{"prompt": "c", "completion": " d", "label": label} for label in (True, False)]
    )
    options = ("--trainer_type", "dpo", "--loss_type", "kto", "--max_length", 64, "--truncation", "left")
    run(config, *options, "--html", tmp_path / "a.html")
    page, terminal = Checked(), capsys.readouterr().out
    page.feed((tmp_path / "a.html").read_text(encoding="utf-8"))
    notes = [line.strip() for line in terminal.splitlines() if "WARNING" in line or "column weight" in line]
    assert len(notes) == 4 and page.open == []
    layout = next(line for line in terminal.splitlines() if line.startswith("  labelled, "))
    for line in (*notes, layout.strip().partition("; turns found")[0]):
        assert line in page.text, line
    assert "fields not used: context, <i>" in page.text


class Checked(HTMLParser):
    """Tags closed in order, and everything that could fetch something."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.scripts, self.text = [], [], 0, ""

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_safe(config, tmp_path, capsys):
    write(config.parent / "test.jsonl", GOOD[:1])
    assert run(config, "--html", tmp_path / "a.html", "--json") == DATA
    json.loads(capsys.readouterr().out)  # nothing but JSON there
    page = Checked()
    page.feed((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.links == [] and page.scripts == 1
    assert re.findall(r'data-findings="eval_overlap[^"]*"', (tmp_path / "a.html").read_text())
    assert "<script>alert(1)</script>" in page.text  # as text, not as an element
    assert (
        "url(" not in (tmp_path / "a.html").read_text() and "evaluation documents that are trained on too" in page.text
    )


@pytest.mark.parametrize(
    "argv, code, message",
    [
        ([], 2, "usage: minisft audit"),
        (["--show"], 2, "--show needs a value"),
        (["--show", "many"], 2, "--show many"),
        (["CONFIG", "--html="], 2, "--html needs a value"),
        (["CONFIG", "--json", "--show", "2"], 2, "--json prints nothing but the report"),
        (["nothing.toml"], 2, "there is no such file"),
        (["CONFIG", "--train_date", "x"], 2, "train_data"),
        (["CONFIG", "--html", "no/such/folder/a.html"], 2, "--html no/such/folder/a.html"),
        (["CONFIG", "--train_data", "missing.jsonl"], DATA, "no file matches"),
    ],
)
def test_mistakes(config, capsys, argv, code, message):
    assert run(*[str(config) if word == "CONFIG" else word for word in argv]) == code
    assert message in capsys.readouterr().err


def test_help_needs_no_torch():
    import subprocess

    script = (
        "import sys; from minisft.__main__ import main; main(['audit', '--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and "--html FILE" in done.stdout, done.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not here")
@pytest.mark.parametrize("name, rows", [("gsm8k_test", 1319), ("alpaca_en_demo", 999), ("dpo_en_demo", 299),
                                        ("glaive_toolcall_en_demo", 300)])  # fmt: skip
@pytest.mark.parametrize("most", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_real_data_has_no_unexplained_drop(tmp_path, name, rows, most):
    TOKENIZER.save(tmp_path / "tokenizer")
    (path,) = SHARED.glob(f"{name}.*")
    given = {"model": {"tokenizer_name_or_path": str(tmp_path / "tokenizer"), "config": {"model_type": "llama"}}}
    config, _ = load(
        given | {"output_dir": str(tmp_path / "out"), "data": {"train_data": f"{path}[:{most}]", "max_length": "none"}}
    )
    report, *_ = audit(config)
    train, rows = report["sets"]["train"], min(rows, most)
    assert train["rows"] == {"read": rows, "used": rows, "dropped": {}, "cut": 0}
    assert {f["name"] for f in train["findings"]} <= {"duplicate"} and report["exceeded"] == []
    assert train["tokens"]["cut"] == train["tokens"]["in_dropped"] == 0
