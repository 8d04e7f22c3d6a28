"""Draws every picture of the pages, into docs/images: the same bytes each time. A test holds the files to this program.

    python -m docs.pictures

The pictures of numbers are drawn from benchmarks/results, so they change when something is measured again. One picture is one
function; most show the same five tokens: a document A B C beside a document D E.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import number
from docs import charts
from docs.drawing import Sheet

IMAGES = Path(__file__).parent / "images"
TOKENS = "ABCDE"
DOCUMENT = [0, 0, 0, 1, 1]  # of each token
COLOR = ["blue", "orange"]  # of each document
TRAINED = [False, True, True, False, True]
START, END = [0, 0, 0, 3, 3], [3, 3, 3, 5, 5]


def token_row(
    s: Sheet, x: float, y: float, values: list, w: float = 44, h: float = 30, colors: list | None = None
) -> None:
    colors = colors or [COLOR[d] for d in DOCUMENT]
    for i, value in enumerate(values):
        s.cell(x + i * w, y, w, h, str(value), colors[i], font="mono")


def kinds() -> Sheet:
    """Chapter 1: a row, its text with kinds, tokens and what is trained."""
    s = Sheet(
        236,
        "A row with a prompt and a completion becomes tokens, each with a kind; only the answer and its end are trained",
    )
    s.text(20, 28, "a row of the file", bold=True)
    s.box(20, 42, 600, 32, "empty")
    s.text(32, 58, '{"prompt": "Upper: cat\\n", "completion": "CAT"}', font="mono", size=14)
    s.text(20, 102, "its tokens", bold=True)
    words = ["Upper:", "space", "c", "a", "t", "\\n", "C", "A", "T", "end"]
    trained = [False] * 6 + [True] * 4
    x = 20.0
    for i, (word, is_trained) in enumerate(zip(words, trained)):
        w = 72 if i < 2 else 57
        s.cell(
            x,
            116,
            w,
            32,
            word,
            "green" if is_trained else "empty",
            font="mono",
            edge="strong_green" if is_trained else "line",
        )
        s.text(
            x + w / 2,
            166,
            "itself" if is_trained else "-100",
            at="middle",
            size=12,
            color="strong_green" if is_trained else "soft",
        )
        x += w
    s.line((20, 186), (20, 192), (388, 192), (388, 186))
    s.line((396, 186), (396, 192), (619, 192), (619, 186), color="strong_green")
    s.text(204, 210, "prompt: read, not trained", at="middle", color="soft")
    s.text(507, 210, "answer and its end: trained", at="middle", color="strong_green", size=12.5)
    return s


def packing() -> Sheet:
    """Chapter 2: the figure of all chapters."""
    s = Sheet(
        356,
        "Two documents, A B C and D E, in one row: ids, positions, start, end, targets, and the block-diagonal mask",
    )
    s.text(20, 26, "one row of T = 5 tokens", bold=True)
    s.text(118, 48, "document 1", color="strong_blue", size=12)
    s.text(250, 48, "document 2", color="strong_orange", size=12)
    lines = [("tokens", list(TOKENS)), ("position_ids", [0, 1, 2, 0, 1]), ("start", START), ("end", END)]
    lines.append(("labels", ["-100", "B", "C", "-100", "E"]))
    for row, (name, values) in enumerate(lines):
        y = 60 + row * 40
        s.text(108, y + 15, name, at="end", size=13, font="mono")
        token_row(
            s,
            118,
            y,
            values,
            colors=["green" if TRAINED[i] else "empty" for i in range(5)] if name == "labels" else None,
        )
    s.text(20, 286, "row r is scored against the token after it", size=13)
    s.text(108, 314, "loss_rows", at="end", size=13, font="mono")
    s.text(108, 338, "targets", at="end", size=13, font="mono")
    for i, (row, target) in enumerate(((0, "B"), (1, "C"), (3, "E"))):
        s.cell(118 + i * 44, 302, 44, 24, str(row), "empty", font="mono")
        s.cell(118 + i * 44, 326, 44, 24, target, "green", font="mono")
    mask(s, 420, 84, 38)
    s.text(420, 26, "who sees whom", bold=True)
    s.text(420, 46, "query q sees key k where", size=12.5, color="soft")
    s.text(420, 62, "start[q] <= k <= q", size=12.5, color="soft", font="mono")
    s.text(420, 304, "No tensor of this shape exists:", size=12.5, color="soft")
    s.text(420, 322, "start and end say it all.", size=12.5, color="soft")
    return s


def mask(s: Sheet, x: float, y: float, w: float) -> None:
    for q in range(5):
        s.text(x - 10, y + q * w + w / 2, TOKENS[q], at="end", font="mono")
        s.text(x + q * w + w / 2, y + 5 * w + 14, TOKENS[q], at="middle", font="mono")
        for k in range(5):
            sees = START[q] <= k <= q
            s.box(x + k * w, y + q * w, w, w, COLOR[DOCUMENT[q]] if sees else "empty", radius=0)
    for d in (0, 1):
        first, size = DOCUMENT.index(d), DOCUMENT.count(d)
        s.box(x + first * w, y + first * w, size * w, size * w, "none", ["strong_blue", "strong_orange"][d], radius=0)


def shift() -> Sheet:
    """Chapter 5: the shift by index."""
    s = Sheet(
        230,
        "Each hidden state is scored against the next token of its own document; the last one of a document against nothing",
    )
    s.text(20, 42, "hidden states", size=13)
    s.text(20, 172, "next tokens", size=13)
    for i, name in enumerate(TOKENS):
        x = 150 + i * 92
        s.cell(x, 26, 60, 34, f"h({name})", COLOR[DOCUMENT[i]], font="mono")
        s.cell(x, 156, 60, 34, name, "green" if TRAINED[i] else "empty", font="mono")
    for i in (0, 1, 3):
        s.arrow((180 + i * 92, 62), (180 + (i + 1) * 92, 154), color="strong_green", width=2)
    s.line((180 + 2 * 92, 62), (180 + 2 * 92 + 46, 108), color="strong_red", dash="4 4")
    s.text(180 + 2 * 92 + 50, 112, "x", color="strong_red", bold=True, size=16)
    s.line((180 + 4 * 92, 62), (180 + 4 * 92 + 30, 92), color="strong_red", dash="4 4")
    s.text(180 + 4 * 92 + 34, 96, "x", color="strong_red", bold=True, size=16)
    s.text(
        20,
        212,
        "C never predicts D: they are strangers. A and D are prompts, which train nothing.",
        size=12.5,
        color="soft",
    )
    return s


def decoder() -> Sheet:
    """Chapter 3: the way of a token."""
    s = Sheet(
        330,
        "The decoder: embedding, layers of attention and MLP on a residual stream, a norm; documents meet in attention only",
    )
    for i, name in enumerate(TOKENS):
        x, color = 60 + i * 62, COLOR[DOCUMENT[i]]
        s.line((x + 20, 52), (x + 20, 292), color="line", width=6)
        s.cell(x, 290, 40, 28, name, color, font="mono")
        for y in (232, 132):
            s.box(x - 4, y, 48, 22, "empty", "soft")
        s.cell(x - 2, 26, 44, 28, "h", color, font="mono", size=13)
    for y in (176, 76):
        s.box(52, y, 180, 26, "blue", "strong_blue")
        s.box(238, y, 118, 26, "orange", "strong_orange")
        s.text(142, y + 13, "attention", at="middle", size=12.5)
        s.text(297, y + 13, "attention", at="middle", size=12.5)
    notes = [
        (40, "hidden states [T, D]", "the loss multiplies the head"),
        (89, "attention", "a document looks at itself only"),
        (143, "MLP", "each token alone"),
        (189, "attention", ""),
        (243, "MLP", ""),
        (304, "input_ids [T]", "embedding: a row of a table"),
    ]
    for y, words, more in notes:
        s.text(392, y - (8 if more else 0), words, bold=True, size=13.5)
        if more:
            s.text(392, y + 9, more, size=12, color="soft")
    return s


def attention() -> Sheet:
    """Chapter 4: tiles of 2 x 2 over three documents."""
    lengths, tile, w = [6, 3, 7], 2, 16
    s = Sheet(
        330,
        "Attention in tiles: tiles without a visible pair are never computed, whole tiles need no mask, only those on an edge do",
    )
    start = [sum(lengths[:d]) for d, length in enumerate(lengths) for _ in range(length)]
    total, x0, y0 = len(start), 36, 44
    s.text(x0, 24, "16 queries, 16 keys, tiles of 2 x 2", bold=True)
    counts = {"red": 0, "green": 0, "empty": 0}
    for a in range(0, total, tile):
        for b in range(0, total, tile):
            seen = sum(start[q] <= k <= q for q in range(a, a + tile) for k in range(b, b + tile))
            color = "empty" if not seen else "green" if seen == tile * tile else "red"
            counts[color] += 1
            s.box(x0 + b * w, y0 + a * w, tile * w, tile * w, color, "paper", radius=2)
    for d, length in enumerate(lengths):
        at = sum(lengths[:d])
        stairs = [(at + i + 1, at + i + j) for i in range(length) for j in (0, 1)]
        outline = [(at, at), *stairs, (at, at + length), (at, at)]
        s.line(*((x0 + x * w, y0 + y * w) for x, y in outline), color="ink", width=1.6)
    s.text(x0, y0 + total * w + 16, "one line of tiles is one program", size=12, color="soft")
    x = 330
    for y, color, words, more in (
        (58, "empty", f"{counts['empty']} tiles: never computed", "after the diagonal, or of another document"),
        (106, "green", f"{counts['green']} tiles: computed without a mask", "every query sees every key"),
        (154, "red", f"{counts['red']} tiles: computed with a mask", "on the diagonal, or a document's edge"),
    ):
        s.box(x, y - 10, 22, 22, color)
        s.text(x + 34, y - 5, words, size=13.5, bold=True)
        s.text(x + 34, y + 13, more, size=12, color="soft")
    s.text(x, 206, "kept from tile to tile, for each query:", size=13, bold=True)
    for i, (name, what) in enumerate(
        (("m", "the largest score"), ("s", "the sum of exp(score - m)"), ("o", "the sum of exp(score - m) v"))
    ):
        s.text(x, 230 + i * 20, name, size=13, font="mono")
        s.text(x + 24, 230 + i * 20, what, size=12.5)
    s.text(x, 296, "At a larger m, s and o shrink by exp(m_old - m).", size=12, color="soft")
    s.text(x, 314, "At the end: o / s.", size=12, color="soft")
    return s


def loss_chunks() -> Sheet:
    """Chapter 5: chunks of logits."""
    s = Sheet(
        250,
        "The loss multiplies only scored rows with the vocabulary's matrix, a chunk of rows at a time, and never has all logits",
    )
    s.text(20, 26, "naive: all logits at once", bold=True)
    s.box(20, 44, 44, 150, "blue")
    s.text(42, 208, "[T, D]", at="middle", size=12, color="soft")
    s.text(78, 119, "W", at="middle", size=15)
    s.arrow((68, 136), (92, 136))
    s.box(100, 44, 170, 150, "red", "strong_red")
    s.text(185, 112, "logits", at="middle")
    s.text(185, 132, "[T, V], several copies", at="middle", size=12)
    s.line((300, 20), (300, 214), color="line")
    s.text(325, 26, "here: a chunk of scored rows", bold=True)
    s.box(325, 44, 44, 150, "empty")
    for y in (44, 62, 116, 134, 170):
        s.box(325, y, 44, 16, "green", "strong_green", radius=1)
    s.text(347, 208, "[T, D]", at="middle", size=12, color="soft")
    s.arrow((373, 84), (408, 84))
    s.text(390, 68, "W", at="middle", size=15)
    s.box(415, 60, 170, 48, "green", "strong_green")
    s.text(500, 78, "logits of one chunk", at="middle", size=13)
    s.text(500, 95, "become their gradient", at="middle", size=12)
    s.arrow((460, 110), (430, 146))
    s.arrow((540, 110), (565, 146))
    s.cell(385, 150, 90, 30, "dh [D]", "blue", size=13)
    s.cell(500, 150, 120, 30, "dW += [V, D]", "orange", size=13)
    s.text(415, 208, "then the next, in the same memory", size=12, color="soft")
    s.text(20, 236, "Rows that train nothing (prompts) are never multiplied.", size=12.5, color="soft")
    return s


def micro_batches() -> Sheet:
    """Chapter 6: two micro-batches of unequal weight."""
    s = Sheet(
        290,
        "Two micro-batches with 4 and 1 trained tokens: their sums over the step's 5 count all tokens alike, their means do not",
    )
    for x, name, values in ((20, "micro-batch 1", [1.0, 1.0, 1.0, 1.0]), (330, "micro-batch 2", [6.0])):
        s.text(x, 26, name, bold=True)
        for i, value in enumerate(values):
            s.cell(x + i * 52, 42, 48, 34, number(value), "blue" if x < 100 else "orange", font="mono")
        s.text(
            x,
            94,
            f"sum {number(sum(values))}, {len(values)} trained token{'s' * (len(values) > 1)}",
            size=13,
            color="soft",
        )
    s.text(470, 58, "losses of the tokens", size=12.5, color="soft")
    s.box(20, 118, 600, 66, "green", "strong_green")
    s.text(34, 138, "divide once, by N of the whole step", bold=True)
    s.text(34, 162, "(4 + 6) / (4 + 1) = 2.0", font="mono", size=15)
    s.text(330, 162, "as one big batch would: each token 1/5", size=12.5)
    s.box(20, 200, 600, 66, "red", "strong_red")
    s.text(34, 220, "the mean of the micro-batches' means", bold=True)
    s.text(34, 244, "(4/4 + 6/1) / 2 = 3.5", font="mono", size=15)
    s.text(330, 244, "the lone token counts 1/2, the others 1/8", size=12.5)
    return s


def save() -> Sheet:
    """Chapter 7: what is on the disk, step by step."""
    s = Sheet(
        296,
        "The save protocol: write beside, sync, manifest, rename; a kill before the rename leaves the old checkpoint",
    )
    stages = [
        ("write", "files into a", "hidden folder"),
        ("fsync", "each file reaches", "the disk"),
        ("manifest", "sizes, sha256", "of every file"),
        ("rename", "one atomic", "operation"),
        ("fsync", "the parent", "folder"),
    ]
    for i, (name, a, b) in enumerate(stages):
        x = 20 + i * 122
        is_rename = name == "rename"
        s.cell(
            x,
            24,
            104,
            36,
            name,
            "green" if is_rename else "empty",
            edge="strong_green" if is_rename else "line",
            bold=True,
        )
        s.text(x + 52, 78, a, at="middle", size=12, color="soft")
        s.text(x + 52, 94, b, at="middle", size=12, color="soft")
        if i < 4:
            s.arrow((x + 106, 42), (x + 120, 42))
    s.line((438, 112), (438, 284), color="strong_green", dash="5 4")
    s.text(20, 126, "a kill here ...", bold=True)
    s.text(20, 150, ".tmp-step-00000020-...", font="mono", size=13)
    s.text(226, 150, "half written, never read", size=12.5, color="soft")
    s.text(20, 174, "step-00000010/", font="mono", size=13)
    s.text(226, 174, "whole: the run resumes at 10", size=12.5, color="strong_green")
    s.text(452, 126, "... or here", bold=True)
    s.text(452, 150, "step-00000020/", font="mono", size=13)
    s.text(452, 174, "whole: resumes at 20", size=12.5, color="strong_green")
    s.box(20, 204, 402, 72, "empty")
    s.text(34, 226, "At the next start:", size=13, bold=True)
    s.text(34, 246, "leftovers are deleted; every file is read and", size=12.5)
    s.text(34, 263, "compared with its sha256; the newest whole one counts.", size=12.5)
    return s


def preference() -> Sheet:
    """Chapter 8: a pair that shares its prompt."""
    s = Sheet(300, "A preference pair: one prompt, a chosen and a rejected answer that do not see each other")
    names = ["p", "p", "p", "c", "c", "r", "r", "r"]
    colors = ["empty"] * 3 + ["green"] * 2 + ["red"] * 3
    s.text(20, 26, "one prompt, two answers", bold=True)
    for i, (name, color) in enumerate(zip(names, colors)):
        s.cell(20 + i * 36, 42, 36, 30, name, color, font="mono")
        s.text(38 + i * 36, 86, str([0, 1, 2, 3, 4, 3, 4, 5][i]), at="middle", size=12, color="soft", font="mono")
    s.text(20, 106, "positions: the rejected answer starts again", size=12, color="soft")
    s.text(20, 122, "after the prompt", size=12, color="soft")
    w, x0, y0 = 26, 400, 42
    s.text(x0, 26, "who sees whom", bold=True)
    for q in range(8):
        s.text(x0 - 8, y0 + q * w + w / 2, names[q], at="end", size=12, font="mono")
        for k in range(8):
            sees = k <= q and not (q >= 5 and 3 <= k < 5)
            s.box(x0 + k * w, y0 + q * w, w, w, colors[q] if sees and q >= 3 else "blue" if sees else "paper", radius=0)
    s.text(20, 158, "log p of an answer: its tokens' sum", size=13)
    s.text(20, 184, "reward = beta (log p - log p of the reference)", size=13)
    s.text(20, 210, "margin = reward(chosen) - reward(rejected)", size=13)
    s.text(20, 236, "loss = -log sigmoid(margin)", size=13, bold=True)
    s.text(20, 276, "The step around it is the one of chapter 6; N is the number of pairs.", size=12.5, color="soft")
    return s


def rooms() -> Sheet:
    """The house: who may import whom."""
    s = Sheet(
        330, "The rooms of the house in floors; a room imports only from floors below it, or beside it without circles"
    )
    floors = [
        ("4", "commands", "train.py, commands/", "violet"),
        ("3", "a run", "loop.py, sft.py, dpo.py, prepare/, evaluation.py, checkpoint.py", "orange"),
        ("2", "with torch", "data/, model/, optimizers.py, update.py, runtime.py, metrics.py", "green"),
        ("1", "without torch", "config/, schedule.py, data/packing.py, errors.py, hub.py", "blue"),
        ("0", "kernels", "kernels/: one op a file", "empty"),
    ]
    for i, (level, name, words, color) in enumerate(floors):
        y = 24 + i * 54
        s.box(20, y, 600, 46, color)
        s.text(36, y + 23, level, bold=True, size=18)
        s.text(64, y + 15, name, bold=True, size=13)
        s.text(64, y + 33, words, size=12, font="mono")
    s.text(
        20,
        308,
        "A room imports from the floors below it. data/ and model/ never import each other.",
        size=12.5,
        color="soft",
    )
    return s


PICTURES: dict[str, Callable[[], Sheet | None]] = {  # file name -> what draws it; None where nothing was measured
    "kinds": kinds,
    "packing": packing,
    "shift": shift,
    "decoder": decoder,
    "attention": attention,
    "loss_chunks": loss_chunks,
    "micro_batches": micro_batches,
    "save": save,
    "preference": preference,
    "rooms": rooms,
    "memory": charts.memory,
    "step_time": charts.step_time,
    "kernels_cpu": charts.kernels,
    "kernels_gpu": charts.roofline,
}


def drawn() -> dict[str, str]:
    """The text of every picture by its file's name."""
    sheets = {f"{name}.svg": draw() for name, draw in PICTURES.items()}
    return {name: sheet.svg() for name, sheet in sheets.items() if sheet is not None}


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    pictures = drawn()
    for old in IMAGES.glob("*.svg"):
        if old.name not in pictures:
            old.unlink()
    for name, text in pictures.items():
        (IMAGES / name).write_text(text, encoding="utf-8")
    print(f"written: {len(pictures)} pictures in {IMAGES}")


if __name__ == "__main__":
    main()
