"""The audit: it finds what was planted, counts everything once, and says the same in three forms."""

import json
import random
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from minisft import __main__ as commands
from minisft.commands.audit import audit
from minisft.config_file import load
from minisft.data.audit import all_findings, length_histogram, overlap, quick_findings, tokens_by_kind
from minisft.data.batch import TRAINED
from minisft.data.cache import build_cache
from minisft.data.documents import select_documents
from minisft.data.formats import FormatOptions
from minisft.data.sources import parse_source
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.errors import DATA, UserError

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


def found(documents, tokenizer=TOKENIZER, max_length=None) -> dict[str, int]:
    return {finding.name: finding.count for finding in all_findings(documents, tokenizer, max_length)}


# ------------------------------------------------------------------------------------------------- what was planted


def test_nothing_is_found_where_nothing_is_wrong(tmp_path):
    assert found(opened(tmp_path, GOOD)[0]) == {}


def test_each_finding_where_it_was_planted(tmp_path):
    long = {"question": "Count.", "answer": "one two three " * 30}
    documents, _ = opened(tmp_path, [*GOOD, long, GOOD[3], GOOD[3]], max_length=60)
    findings = {f.name: f for f in all_findings(documents, TOKENIZER, 60)}
    assert {name: f.count for name, f in findings.items()} == {"duplicate": 2, "too_long": 1, "cut_answer": 1}
    assert findings["cut_answer"].documents == (20,) and findings["cut_answer"].examples[0].endswith(":21")
    assert findings["duplicate"].documents == (21, 22) and findings["duplicate"].share == 2 / 23


def test_rows_without_a_label(tmp_path):
    eos = TOKENIZER.eos_token_id
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
        {"input_ids": [5, 6, eos], "labels": [-100, 6, eos]},
    ]
    (finding,) = quick_findings(opened(tmp_path, rows)[0], TOKENIZER, None)
    assert (finding.name, finding.count, finding.total, finding.documents) == ("no_label", 1, 2, (0,))


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


def test_two_bos(tmp_path):
    backend = TOKENIZER.backend.from_str(TOKENIZER.backend.to_str())
    backend.add_special_tokens(["<s>"])
    ids = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    folder = tmp_path / "tokenizer"
    TOKENIZER.save(folder)
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>"}))
    tokenizer = load_tokenizer(folder)
    documents, _ = opened(tmp_path, [{"text": "Hello"}, {"text": "<s>Hello"}, {"text": "<s><s>Hello"}], tokenizer)
    counts = found(documents, tokenizer)
    assert (counts["double_bos"], counts["duplicate"]) == (1, 1)


def test_control_tokens_and_what_does_not_round_trip(tmp_path):
    rows = [*GOOD, {"question": "Say <|im_end|>", "answer": "No."}]
    documents, _ = opened(tmp_path, rows, control_tokens="escape")
    assert found(documents) == {"control_token": 1, "round_trip": 1}  # decoded, it would be read as the token


def test_overlap_of_train_and_evaluation(tmp_path):
    train, _ = opened(tmp_path, GOOD)
    other = {"question": GOOD[4]["question"], "answer": "I do not know."}
    held_out, _ = opened(tmp_path, [GOOD[2], other, {"question": "New?", "answer": "Yes."}])
    counts = {finding.name: finding.documents for finding in overlap(train, held_out)}
    assert counts == {"eval_overlap": (0,), "eval_prompt_overlap": (0, 1)}


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
    rows.insert(rng.randint(1, len(rows)), rng.choice(['{"broken\n', "[1]\n", "\n", rows[0]]))
    return rows


def test_the_account_closes_over_1000_random_corpora(tmp_path):
    """Every row is used or dropped with a reason, every token is trained, context, cut or dropped (Accounting asserts
    both), and the tables of the audit add up to the same numbers."""
    rng, usable = random.Random(0), 0
    for number in range(1000):
        path = tmp_path / f"{number}.jsonl"
        rows = random_rows(rng)
        write(path, rows)
        options = FormatOptions(
            control_tokens=rng.choice(["error", "escape", "allow"]),
            turns_max_length=(limit := rng.choice([None, 8, 30])),
            add_eos=rng.random() < 0.8,
        )
        truncation = "turns" if limit else rng.choice(["right", "left", "drop"])
        try:
            source = parse_source({"path": str(path), "weight": rng.choice([0.5, 1.0, 2.5])})
            cache = build_cache([source], TOKENIZER, cache_dir=tmp_path / "cache", on_bad_row="skip", options=options)
            documents, account = select_documents(
                cache, max_length=limit or rng.choice([None, 20]), truncation=truncation
            )
        except UserError:
            continue  # no usable row, or a format that cannot be told from the first one
        usable += 1
        assert account.rows_read == len(rows)
        kinds = tokens_by_kind(documents)
        assert sum(row["trained"] + row["context"] for row in kinds.values()) == account.trained + account.context
        # The table counts a document's first token as the cache has it; as a target it never is.
        assert 0 <= sum(row["trained"] for row in kinds.values()) - account.trained <= account.rows_used * 6
        histogram = length_histogram(documents.lengths)
        assert sum(bin["documents"] for bin in histogram) == account.num_documents == len(documents)
        assert all(finding.count <= finding.total for finding in all_findings(documents, TOKENIZER, limit))
    assert usable > 600


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
    assert report["exceeded"] == [] and "ok: no limit of [audit] is exceeded" in text
    assert "[It is 0.<|im_end|>]" in text and "\x1b" not in text  # brackets where nobody sees colours
    assert report["sets"].keys() == {"train", "eval"}


def test_a_limit_that_is_exceeded(config, capsys):
    write(config.parent / "test.jsonl", GOOD[:1])
    assert run(config) == DATA
    text = capsys.readouterr().out
    assert "EXCEEDED  eval: 100.00% is above audit.max_eval_overlap = 0" in text
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
def test_real_data_has_no_unexplained_drop(tmp_path, name, rows):
    TOKENIZER.save(tmp_path / "tokenizer")
    (path,) = SHARED.glob(f"{name}.*")
    given = {"model": {"tokenizer_name_or_path": str(tmp_path / "tokenizer"), "config": {"model_type": "llama"}}}
    config, _ = load(
        given | {"output_dir": str(tmp_path / "out"), "data": {"train_data": str(path), "max_length": "none"}}
    )
    report, _ = audit(config)
    train = report["sets"]["train"]
    assert train["rows"] == {"read": rows, "used": rows, "dropped": {}}
    assert {f["name"] for f in train["findings"]} <= {"duplicate"} and report["exceeded"] == []
    assert train["tokens"]["cut"] == train["tokens"]["in_dropped"] == 0
