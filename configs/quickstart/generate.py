"""Makes the quickstart's data set and tokenizer: `python configs/quickstart/generate.py`. Deterministic; its output is
shipped beside it.

Five kinds of small text task over random words, so that a 2 M parameter model can learn them in a minute on two CPU cores
and anyone can see at a glance whether it did. No held-out prompt is among the training prompts.
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
    for name, rows in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
    # Bytes without merges, as these tasks are about characters, and one token for each instruction.
    tokens = (*SPECIAL_TOKENS, *(f"{kind.capitalize()}:" for kind in KINDS))
    tokenizer = train_tokenizer([], vocab_size=256 + len(tokens), special_tokens=tokens, chat_template=None)
    tokenizer.save(FOLDER / "tokenizer")


if __name__ == "__main__":
    main()
