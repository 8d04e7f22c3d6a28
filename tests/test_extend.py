"""To extend is to write a function and an entry of a table: CONTRIBUTING.md says which. Each is tried on a copy of the code."""

import json
import shutil
from functools import partial
from pathlib import Path

from tiny import logged, run_anew, settings, start

ROOT = Path(__file__).resolve().parents[1]
ADDED = {  # file -> what is added at its end
    "minisft/data/formats.py": """
def _read_fable(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    return [_single(Prompt(string_of(row, "fable")), string_of(row, "moral"), row_format)]


FORMATS["fable"] = Format(("fable", "moral"), (), _read_fable)
""",
    "minisft/preference/losses.py": """
def square(p: Pairs, o: LossOptions) -> Tensor:
    return (p.margin - 1).square()


LOSSES["square"] = square
""",
    "minisft/schedule.py": """
SCHEDULES["staircase"] = {}
DECAYS["staircase"] = lambda q: 1.0 if q < 0.5 else 0.25
""",
    "minisft/config/choices.py": """
OPTIMIZERS["steepest"] = {"momentum": 0.5}
""",
    "minisft/optimizers.py": """
RULES["steepest"] = lambda groups, betas, eps, momentum: SGD(groups, momentum)
""",
}


def test_a_format_a_loss_a_schedule_and_an_optimizer_are_added_by_an_entry(tmp_path):
    for folder in ("minisft", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in ADDED.items():
        with open(tmp_path / file, "a", encoding="utf-8") as f:
            f.write("\n" + text)
    keys = settings(
        tmp_path, **{"train.optim": "steepest", "train.max_steps": 4, "train.lr_scheduler_type": "staircase"}
    )
    keys["train.optim_args"] = {"momentum": 0.25}
    fables = [{"fable": f"The {c} and the fox.", "moral": f"Trust the {c}."} for c in "abcdefgh"]
    pairs = [{"prompt": row["fable"], "chosen": row["moral"], "rejected": "None."} for row in fables]
    for name, rows in (("fables", fables), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = keys | {"data.train_data": str(tmp_path / "fables.jsonl"), "output_dir": str(tmp_path / "sft")}
    dpo = keys | {"data.train_data": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "dpo")}
    dpo |= {"trainer_type": "dpo", "dpo.loss_type": ["square"]}
    program, said = tmp_path / "program.py", tmp_path / "said.txt"
    program.write_text(f"from minisft.train import run\nfor keys in {[sft, dpo]}: run({{}}, **keys)")
    done = start(partial(run_anew, first=tmp_path), program, said)
    done.join()
    assert done.exitcode == 0, said.read_text()
    printed = " ".join(said.read_text().split())  # a line is wrapped where the length of the folder's path has it
    assert "fables.jsonl: fable, " in printed and printed.count("optimizer steepest") == 2
    assert logged(tmp_path / "dpo")[0] == 1.0  # policy and reference are equal at first: (0 - 1)^2
    assert [rate / 1e-2 for rate in logged(tmp_path / "sft", "learning_rate")] == [1.0, 1.0, 0.25, 0.25]
    losses = logged(tmp_path / "sft")
    assert losses[-1] < losses[0]
