"""The training ledger: the documents of every step and their losses, exact however a step is split, killed or resumed."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_dpo_run import write_pairs
from test_ranks import join, start_ranks
from tiny import parts, settings, train, train_until_killed, weights

from minisft.__main__ import main
from minisft.ledger import ENTRY, Ledger, cut_ledgers, read_ledger
from minisft.selfcheck import naive

RUN = {"log.ledger": True, "train.max_steps": 12, "checkpoint.save_steps": 4}


def table(folder: Path) -> dict[tuple[int, int], float]:
    """{(step, document): loss}; nothing is there twice."""
    entries = read_ledger(folder)
    keys = list(zip(entries.step.tolist(), entries.document.tolist()))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, entries.loss.tolist()))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    train(folder, **RUN)
    return folder


# ---- the file -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 2**31 - 2), max_size=4, unique=True), max_size=12), st.integers(0, 12), st.data()
)
def test_what_is_written_is_read_and_cut_at_any_step(tmp_path_factory, steps, last, data):
    """Steps of any documents, also of none, in sessions that begin anywhere; a later session replaces what came after."""
    folder = tmp_path_factory.mktemp("file")
    expected, sessions = {}, data.draw(st.integers(1, 3))
    begin = 0
    for _ in range(sessions):
        expected = {key: loss for key, loss in expected.items() if key[0] <= begin}
        ledger = Ledger(folder, 0, begin)
        for step, documents in enumerate(steps[begin:], begin + 1):
            losses = np.arange(len(documents), dtype=np.float32) + step
            half = len(documents) // 2
            both = np.array(documents, dtype=np.int64)
            ledger.write(step, [(both[:half], losses[:half]), (both[half:], losses[half:])])
            expected |= {(step, document): float(loss) for document, loss in zip(documents, losses)}
        ledger.close()
        begin = data.draw(st.integers(0, len(steps)))
    assert table(folder) == expected
    gaps = sessions + sum(not documents for documents in steps)
    assert (folder / "ledger-rank-0.bin").stat().st_size <= 8 * (len(expected) + gaps)
    cut_ledgers(folder, last)
    assert table(folder) == {key: loss for key, loss in expected.items() if key[0] <= last}


def test_a_document_that_occurs_several_times_has_the_mean_of_its_targets(tmp_path):
    with closing(Ledger(tmp_path, 0, 0)) as ledger:
        ledger.write(1, [(np.array([5, 5, 7]), np.float32([1, 2, 4])), (np.array([5]), np.float32([6]))])
    assert table(tmp_path) == {(1, 5): 3.0, (1, 7): 4.0}


def test_an_entry_that_a_full_disk_cut_off_is_none(tmp_path):
    with closing(Ledger(tmp_path, 0, 0)) as ledger:
        ledger.write(1, [(np.array([5, 7]), np.float32([1, 2]))])
    path = tmp_path / "ledger-rank-0.bin"
    path.write_bytes(path.read_bytes()[:-3])
    assert table(tmp_path) == {(1, 5): 1.0}
    Ledger(tmp_path, 0, 0).close()
    assert path.stat().st_size == 0 and ENTRY.itemsize == 8


# ---- runs ---------------------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_the_documents_alone(home):
    run, config = parts(home)
    found = {document: loss for (step, document), loss in table(home / "out").items() if step == 1}
    for document in naive.micro_batches(run.train, 0)[0]:
        logits, targets, _ = naive.logits_of(run.model, document)
        nll = F.cross_entropy(logits, targets, reduction="none")[document.trained[1:]]
        assert found.pop(document.number) == pytest.approx(nll.mean().item(), rel=1e-6)
    assert not found


def test_an_epoch_has_every_document_once_and_at_most_8_bytes_each(home):
    steps_per_epoch = 8
    seen = [document for step, document in table(home / "out") if step <= steps_per_epoch]
    assert sorted(seen) == list(range(64))
    assert (home / "out" / "ledger-rank-0.bin").stat().st_size == 8 * (len(table(home / "out")) + 1)


def test_a_run_with_a_ledger_is_the_same_run(home, tmp_path):
    plain = train(home, output_dir=str(tmp_path / "plain"), **{**RUN, "log.ledger": False})
    assert not list(plain.output_dir.glob("ledger*"))
    assert weights(plain.output_dir) == weights(home / "out")
    assert (plain.output_dir / "metrics.jsonl").read_bytes() == (home / "out" / "metrics.jsonl").read_bytes()


def test_splits_and_packs_have_the_same_ledger(home, tmp_path):
    whole = table(home / "out")
    split = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4}
    train(home, output_dir=str(tmp_path / "split"), **RUN, **split)
    other = table(tmp_path / "split")
    assert other.keys() == whole.keys()
    assert all(
        other[key] == pytest.approx(whole[key], rel=1e-3) for key in whole
    )  # 12 updates of Adam amplify last bits
    everything = {"data.train_data": str(home / "rows.jsonl[:32]"), "train.per_device_train_batch_size": 32}
    for name, packing in (("one", False), ("packed", True)):
        train(
            home,
            output_dir=str(tmp_path / name),
            **{**RUN, "train.max_steps": 1},
            **everything,
            **{"data.packing": packing},
        )
    one, packed = table(tmp_path / "one"), table(tmp_path / "packed")
    assert one.keys() == packed.keys() and len(one) == 32
    assert all(packed[key] == pytest.approx(one[key], rel=1e-5) for key in one)


@pytest.mark.parametrize("stop", [5, 9, 10])
def test_a_run_that_was_killed_and_resumed_has_the_ledger_of_one_that_was_not(home, tmp_path, stop):
    options = {**RUN, "output_dir": str(tmp_path / "out")}
    train_until_killed(home, stop, **options)
    assert max(step for step, _ in table(tmp_path / "out")) == stop
    train(home, **options)
    assert table(tmp_path / "out") == table(home / "out")


def test_a_run_that_starts_over_or_without_a_ledger_keeps_nothing_of_what_it_replaces(home, tmp_path):
    options = {**RUN, "output_dir": str(tmp_path / "out"), "train.max_steps": 6}
    train(home, **options)
    train(home, **{**options, "checkpoint.resume": "never", "train.max_steps": 2})
    assert {step for step, _ in table(tmp_path / "out")} == {1, 2}
    train(home, **{**options, "log.ledger": False, "train.max_steps": 4})
    train(home, **{**options, "train.max_steps": 6})
    assert {step for step, _ in table(tmp_path / "out")} == {1, 2, 5, 6}


@pytest.mark.slow  # three processes
def test_two_ranks_have_the_ledger_of_one(home, tmp_path):
    two = {**RUN, "output_dir": str(tmp_path / "two"), "train.per_device_train_batch_size": 4}
    assert join(start_ranks(home, two)) == (0, 0)
    assert len(list((tmp_path / "two").glob("ledger-rank-*.bin"))) == 2
    found, whole = table(tmp_path / "two"), table(home / "out")
    assert found.keys() == whole.keys()
    assert all(found[key] == pytest.approx(whole[key], rel=1e-3) for key in whole)


def test_pairs_have_one_loss_each(home, tmp_path):
    write_pairs(home / "pairs.jsonl", count=16)
    dpo = {"trainer_type": "dpo", "data.train_data": str(home / "pairs.jsonl"), "train.max_steps": 2}
    result = train(home, output_dir=str(tmp_path / "dpo"), **{**RUN, **dpo})
    found = table(result.output_dir)
    assert sorted(document for _, document in found) == list(range(0, 32, 2))
    first = [loss for (step, _), loss in found.items() if step == 1]
    assert first == pytest.approx([np.log(2)] * 8, rel=1e-5)


# ---- the command --------------------------------------------------------------------------------------------------


def said(capsys, *words) -> str:
    capsys.readouterr()
    assert main(["ledger", *words]) == 0
    return capsys.readouterr().out


def test_one_row_over_all_steps(home, capsys):
    row = json.loads((home / "rows.jsonl").read_text().splitlines()[11])
    for name in ("12", "rows.jsonl:12"):
        (found,) = json.loads(said(capsys, str(home / "out"), "--row", name, "--json"))
        assert found["document"] == 11 and row["completion"] in found["text"]
        assert {(one["step"], 11): one["loss"] for one in found["steps"]}.items() <= table(home / "out").items()
        assert len(found["steps"]) == sum(document == 11 for _, document in table(home / "out"))
    assert "rows.jsonl:12" in said(capsys, str(home / "out"), "--row", "12")


def test_the_hardest_and_the_forgotten(home, capsys):
    last, lowest = {}, {}
    for (_, document), loss in table(home / "out").items():
        last[document], lowest[document] = loss, min(loss, lowest.get(document, loss))
    hardest = json.loads(said(capsys, str(home / "out"), "--hardest", "5", "--json"))
    assert [one["document"] for one in hardest] == sorted(last, key=last.get, reverse=True)[:5]
    forgotten = json.loads(said(capsys, str(home / "out"), "--forgotten", "3", "--json"))
    rises = [one["last"] - one["lowest"] for one in forgotten]
    assert rises == sorted(rises, reverse=True) and rises[0] == max(last[d] - lowest[d] for d in last)
    assert len(said(capsys, str(home / "out"), "--hardest", "4").split("\n\n")) == 4
    assert "documents                    64" in said(capsys, str(home / "out"))


def test_a_loss_that_is_not_finite_is_json(home, tmp_path, capsys):
    shutil.copytree(home / "out", tmp_path / "out")
    with closing(Ledger(tmp_path / "out", 0, 99)) as ledger:
        ledger.write(99, [(np.array([5]), np.float32([np.nan]))])
    (found,) = json.loads(said(capsys, str(tmp_path / "out"), "--hardest", "1", "--json"), parse_constant=pytest.fail)
    assert found["document"] == 5 and found["last"] == "NaN"


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--row", "9999"], "no document"),
        (["--row", "many"], "--row many"),
        (["--hardest", "0"], "--hardest 0"),
        (["--hardest", "1", "--forgotten", "1"], "one of"),
    ],
)
def test_mistakes_are_told(home, capsys, words, problem):
    assert main(["ledger", str(home / "out"), *words]) != 0
    assert problem in capsys.readouterr().err


def test_a_folder_without_a_ledger_and_other_rows_are_told(home, tmp_path, capsys):
    assert main(["ledger", str(tmp_path)]) == 65
    assert "log.ledger" in capsys.readouterr().err
    assert settings(home)["output_dir"] == str(home / "out")
