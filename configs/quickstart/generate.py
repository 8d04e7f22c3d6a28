"""Makes the quickstarts' data sets and tokenizer: `python configs/quickstart/generate.py`. Deterministic; its output is
shipped beside it.

Five kinds of small text task over random words, so that a 2 M parameter model can learn them in a minute on two CPU cores
and anyone can see at a glance whether it did. No held-out prompt is among the training prompts.

For preferences: `undecided.jsonl` answers the prompts of three kinds with any of the three, so whoever learns from it can do
all of them and does not listen. A pair has the right answer as the chosen one and that of another kind as the rejected one:
what is chosen here is rejected there, so that no token and no length decides, only the prompt.
"""

import json
import random
from pathlib import Path

from minisft.data.tokenizer import SPECIAL_TOKENS, train_tokenizer

FOLDER = Path(__file__).parent
NUM_TRAIN, NUM_HELD_OUT = 6000, 40  # rows of each kind
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(3, 5)))


def task(kind: str, rng: random.Random) -> tuple[str, str]:
    """A random instruction of this kind and its answer."""
    if kind == "larger":
        a, b = rng.sample(range(10, 1000), 2)
        return f"Larger: {a} {b}", str(max(a, b))
    w = word(rng)
    answers = {
        "reverse": w[::-1],
        "sort": "".join(sorted(w)),
        "upper": w.upper(),
        "last": w[-1],
    }
    return f"{kind.capitalize()}: {w}", answers[kind]


KINDS = ("reverse", "sort", "upper", "last", "larger")
NUM_UNDECIDED, NUM_PAIRS, NUM_HELD_OUT_PAIRS = 12000, 6000, 400
CHANGES = {"reverse": lambda w: w[::-1], "sort": lambda w: "".join(sorted(w)), "upper": str.upper}


def preferences(rng: random.Random) -> dict[str, list[dict]]:
    """Rows of the three files for preference tuning, all prompts different."""
    rows: dict[str, dict] = {}
    while len(rows) < NUM_UNDECIDED + NUM_PAIRS + NUM_HELD_OUT_PAIRS:
        w, kind, any_kind = word(rng), rng.choice(list(CHANGES)), rng.choice(list(CHANGES))
        right, wrong = CHANGES[kind](w), CHANGES[rng.choice([k for k in CHANGES if k != kind])](w)
        if right != wrong:
            prompt = f"{kind.capitalize()}: {w}\n"
            pair = {"prompt": prompt, "chosen": right, "rejected": wrong, "kind": kind}
            rows[prompt] = {"pair": pair, "undecided": {"prompt": prompt, "completion": CHANGES[any_kind](w)}}
    made = list(rows.values())
    pairs = [row["pair"] for row in made[NUM_UNDECIDED:]]
    return {
        "undecided": [row["undecided"] for row in made[:NUM_UNDECIDED]],
        "pairs": pairs[NUM_HELD_OUT_PAIRS:],
        "held_out_pairs": pairs[:NUM_HELD_OUT_PAIRS],
    }


def main() -> None:
    rng = random.Random(0)
    train, held_out = [], []
    for kind in KINDS:
        rows: dict[str, str] = {}
        while len(rows) < NUM_TRAIN + NUM_HELD_OUT:
            prompt, answer = task(kind, rng)
            rows[prompt] = answer
        made = [{"prompt": p + "\n", "completion": a, "kind": kind} for p, a in rows.items()]
        held_out += made[:NUM_HELD_OUT]
        train += made[NUM_HELD_OUT:]
    rng.shuffle(train)
    for name, rows in {"train": train, "held_out": held_out, **preferences(random.Random(1))}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
    # Bytes without merges, as these tasks are about characters, and one token for each instruction.
    tokens = (*SPECIAL_TOKENS, *(f"{kind.capitalize()}:" for kind in KINDS))
    tokenizer = train_tokenizer([], vocab_size=256 + len(tokens), special_tokens=tokens, chat_template=None)
    tokenizer.save(FOLDER / "tokenizer")


if __name__ == "__main__":
    main()
