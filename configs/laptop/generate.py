"""Makes the data of the laptop recipe: `python configs/laptop/generate.py`. Deterministic; its output is shipped beside it.

A sentence that somebody says on the phone, and the order in it as JSON. A pretrained model of 135 M parameters understands the
sentence, and does not know what the JSON is to look like; that is what it learns. No sentence of the held-out rows, and no
combination of name and first item in them, is among the training rows.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
NUM_TRAIN, NUM_HELD_OUT = 400, 50
NAMES = "Anna Ben Carla David Elif Farid Grace Hugo Ines Jonas Kemal Lena Mara Nils Olga Pedro Rosa Samir Tara Viktor".split()
ITEMS = "pizza salad lasagna burger soup curry sandwich lemonade coffee tea cake pancake".split()
SIZES = "small medium large".split()
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
OPENINGS = [
    "Hi, this is {name}.",
    "{name} here.",
    "Good evening, {name} speaking.",
    "Hello, my name is {name}.",
    "It's {name} again.",
]
WISHES = [
    "I'd like {items}.",
    "Could I get {items}?",
    "We need {items}.",
    "Please make it {items}.",
    "Can you do {items}?",
]
ENDINGS = {
    True: ["I'll pick it up.", "I'm coming to collect it.", "No delivery, I'll come by."],
    False: ["Please deliver it.", "Can you bring it to us?", "Delivery, please."],
}


def spoken(count: int, size: str, item: str) -> str:
    plural = "" if count == 1 else "es" if item.endswith("ch") else "s"
    return f"{COUNTS[count]} {size} {item}{plural}"


def order(rng: random.Random) -> dict:
    """A random row, with the key that says which training rows would give it away."""
    name, pickup = rng.choice(NAMES), rng.random() < 0.5
    items = [
        {"count": rng.choice(list(COUNTS)), "size": rng.choice(SIZES), "item": item}
        for item in rng.sample(ITEMS, rng.choice([1, 1, 2, 2, 3]))
    ]
    *first, last = [spoken(**item) for item in items]
    listed = f"{', '.join(first)} and {last}" if first else last
    sentence = " ".join(
        [
            rng.choice(OPENINGS).format(name=name),
            rng.choice(WISHES).format(items=listed),
            rng.choice(ENDINGS[pickup]),
        ]
    )
    answer = json.dumps({"name": name, "items": items, "pickup": pickup})
    return {"prompt": f"Write this order as JSON: {sentence}", "completion": answer, "key": (name, items[0]["item"])}


def main() -> None:
    rng = random.Random(0)
    held_out_keys = set(rng.sample([(name, item) for name in NAMES for item in ITEMS], 40))
    rows: dict[bool, list[dict]] = {False: [], True: []}
    while len(rows[False]) < NUM_TRAIN or len(rows[True]) < NUM_HELD_OUT:
        row = order(rng)
        kept = rows[row.pop("key") in held_out_keys]
        if row not in kept:
            kept.append(row)
    for name, kept in (("train", rows[False][:NUM_TRAIN]), ("held_out", rows[True][:NUM_HELD_OUT])):
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
