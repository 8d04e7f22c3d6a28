"""`minisft explain`: every key is explained from the table of keys, and docs/configuration.md is written from the same."""

import ast
from itertools import product
from pathlib import Path

import pytest
from tiny import settings

from minisft.__main__ import main
from minisft.commands.explain import explain, page
from minisft.config import check
from minisft.config.interactions import TOGETHER
from minisft.config.sections import KEYS
from minisft.config.values import as_toml
from minisft.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_all_keys_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), "python -m minisft explain --all writes it"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_explained(key):
    lines = explain(key, {}, {})
    told = " ".join(" ".join(lines).split())
    assert lines[0].startswith(f"{key} = ") and " ".join(KEYS[key].metadata["help"].split()) in told
    assert max(len(line) for line in lines[1:]) <= 130 and "takes" in told


def test_the_interactions_name_keys_and_each_pair_once():
    pairs = [key for keys, _ in TOGETHER for key in [frozenset(keys.split())]]
    assert all(key in KEYS for keys in pairs for key in keys) and len(set(pairs)) == len(pairs)


def refused_together() -> set[frozenset[str]]:
    """The pairs of keys that check.py refuses by name, read from its source; in a loop, of every text of the loop that makes a
    key."""
    found, last, loops = set(), {}, {}
    for node in ast.walk(ast.parse(Path(check.__file__).read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            last.setdefault(node.targets[0].id, set()).add(node.value.value)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            loops.setdefault(node.targets[0].id, []).extend(
                key for key in node.value.keys if isinstance(key, ast.Constant)
            )
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "refuse":
            first = node.args[0]
            texts = {first.value} if isinstance(first, ast.Constant) else set()
            found |= {frozenset(text.split()) for text in texts if len(text.split()) > 1}
        if isinstance(node, ast.For):
            values = [value for value in ast.walk(node.iter) if isinstance(value, ast.Constant)]
            names = {name.id for name in ast.walk(node.iter) if isinstance(name, ast.Name)}
            values += [value for name in names for value in loops.get(name, ())]
            patterns = [text for text in ast.walk(node) if isinstance(text, ast.JoinedStr)]
            for pattern, value in product(patterns, values):
                parts = [p.value if isinstance(p, ast.Constant) else str(value.value) for p in pattern.values]
                if len(pair := "".join(parts).split()) > 1 and all(key in KEYS for key in pair):
                    found.add(frozenset(pair))
    return found | {frozenset(text.split()) for text in last.get("keys", ()) if len(text.split()) > 1}


def test_keys_that_can_contradict_each_other_are_explained_together():
    rules = refused_together()
    assert {
        frozenset(("parallel.context_parallel", "dpo.ld_alpha")),
        frozenset(("data.stream", "train.max_steps")),
    } <= rules
    assert len(rules) > 25 and all(key in KEYS for pair in rules for key in pair)
    together = [set(keys.split()) for keys, _ in TOGETHER]
    assert [sorted(pair) for pair in rules if not any(pair <= keys for keys in together)] == []


def test_a_value_says_where_it_came_from(tmp_path, capsys):
    values = settings(tmp_path, trainer_type="dpo", **{"train.learning_rate": None})
    del values["train.learning_rate"]
    (tmp_path / "run.toml").write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in values.items()))
    path = str(tmp_path / "run.toml")
    for written, value, origin in (
        ("learning_rate", "1e-06", "default of trainer_type dpo"),
        ("train.precision", '"fp32"', path),
        ("max_steps", "7", "command line"),
        ("weight_decay", "0.0", "default"),
    ):
        assert main(["explain", written, path, "--max_steps", "7"]) == 0
        shown = capsys.readouterr().out
        assert f"{written.rpartition('.')[2]} = {value}\n" in shown and origin in " ".join(shown.split())


def test_other_names_sections_and_what_there_is_not(capsys):
    assert main(["explain", "lr"]) == 0
    assert "another trainer's name" in capsys.readouterr().out
    assert main(["explain", "lora"]) == 0
    assert "  lora.r = " in capsys.readouterr().out
    assert main(["explain", "deepspeed"]) == 0
    assert "not supported" in capsys.readouterr().out
    assert main(["explain", "learing_rate"]) == 2
    assert "did you mean train.learning_rate?" in capsys.readouterr().err
    with pytest.raises(UserError, match="ambiguous|unknown"):
        explain("nothing_like_it", {}, {})
    assert main(["explain", "learning_rate", "nowhere.toml"]) == 2
