"""Do the tests notice a wrong line? Changes one place of a file at a time and runs the tests of that file.

    python tests/mutation.py                                          a sample of every file of TESTS
    python tests/mutation.py --files minisft/schedule.py --per-file 30 --seed 1

A mutant is a file with one small change: another comparison, + for -, and for or, a constant, True for False, the first
operand alone, a deleted statement, min for max, an open slice. A mutant is killed where a test fails or hangs. It survives
where all tests pass; then it is equivalent (only slower, say), or a test is missing.

The work is done in a temporary copy of the tree, so the checkout is never touched. The choice of mutants is a function of
the seed and the file. Prints one line a mutant and a table; the exit code is 1 if less than SHARE of them are killed.

Not changed: messages (`raise`, f-strings), `assert`, annotations and decorators; in kernels everything that only a GPU or
Triton runs, and the tables of launch configurations.
"""

import argparse
import ast
import contextlib
import copy
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.92

# file -> the test files that have to notice, the quickest first
TESTS = {
    "minisft/schedule.py": "schedule",
    "minisft/data/packing.py": "packing",
    "minisft/data/packing_strategies.py": "packing",
    "minisft/data/loader.py": "loader dpo",
    "minisft/data/shared_turns.py": "shared_turns",
    "minisft/data/chat/masks.py": "template masks prompts encoding",
    "minisft/data/chat/inference.py": "prompts masks template",
    "minisft/data/chat/spans.py": "template masks prompts",
    "minisft/data/chat/template_check.py": "template masks",
    "minisft/preference/losses.py": "preference_losses dpo",
    "minisft/dpo.py": "dpo dpo_run",
    "minisft/checkpoint.py": "checkpoint optim resume",
    "minisft/optimizers.py": "optim optim_memory",
    "minisft/update.py": "optim_memory loop optim",
    "minisft/loop.py": "intervals loop optim_memory resume dpo_run trainable ranks",
    "minisft/resume.py": "resume optim_memory dpo_run",
    "kernels/rms_norm.py": "norms",
    "kernels/layer_norm.py": "norms",
    "kernels/rope.py": "rope",
    "kernels/glu.py": "glu",
    "kernels/cross_entropy.py": "cross_entropy linear_cross_entropy",
    "kernels/linear_cross_entropy.py": "linear_cross_entropy",
    "kernels/linear_cross_entropy_torch.py": "linear_cross_entropy",
    "kernels/flash_attention.py": "flash_attention",
    "kernels/flash_attention_torch.py": "flash_attention",
    "kernels/adamw_formats.py": "adamw optim_memory",
}

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {"min": "max", "amin": "amax", "minimum": "maximum", "any": "all"}
NAMES |= {b: a for a, b in NAMES.items()}


@dataclass(frozen=True)
class Mutant:
    """Bytes first:last of a file replaced by `new`."""

    line: int
    first: int
    last: int
    new: str

    def text(self, source: bytes) -> bytes:
        return source[: self.first] + self.new.encode() + source[self.last :]

    def told(self, source: bytes) -> str:
        old, new = (" ".join(text.split()) for text in (source[self.first : self.last].decode(), self.new))
        return f"{old}  ->  {new}"


# ---- the mutants of a file --------------------------------------------------------------------------------------


def mutants(source: bytes, is_kernel: bool = False) -> list[Mutant]:
    """Every mutant that can be made of this file."""
    tree, made = ast.parse(source), []
    if is_kernel:
        tree.body = run_by_torch(tree.body)
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    for node in nodes(tree):
        first = begins[node.lineno - 1] + node.col_offset
        last = begins[node.end_lineno - 1] + node.end_col_offset
        for new in changes(node):
            text = ast.unparse(ast.fix_missing_locations(new))
            made.append(Mutant(node.lineno, first, last, text if isinstance(new, ast.stmt) else f"({text})"))
    return made


def run_by_torch(body: list[ast.stmt]) -> list[ast.stmt]:
    """The functions and classes of a kernel file that run without Triton: not the kernels, what launches them, and helpers
    of these alone."""
    made = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    users = {
        name: {other for other, node in made.items() if other != name and re.search(rf"\b{name}\b", ast.unparse(node))}
        for name in made
    }
    triton = {
        name
        for name, node in made.items()
        if "jit" in map(ast.unparse, node.decorator_list)
        or "triton" in name.lower()
        or re.search(r"kernel\[", ast.unparse(node))
    }
    while helpers := {name for name in made.keys() - triton if users[name] and users[name] <= triton}:
        triton |= helpers
    return [node for name, node in made.items() if name not in triton]


def nodes(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Every expression and statement that may be changed."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or isinstance(node, ast.Assert | ast.Raise | ast.JoinedStr):
                continue
            if isinstance(node, ast.If) and re.search("cuda|triton", ast.unparse(node.test)):
                yield from nodes(ast.Module(node.orelse, []))
                continue
            if isinstance(node, ast.expr | ast.stmt):
                yield node
            yield from nodes(node)


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield changed(node, ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield changed(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant({0: 1, 1: 0}.get(value, value + 1))
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield changed(node, func=ast.Name(NAMES[name]))
        case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES:
            yield changed(node, func=changed(node.func, attr=NAMES[name]))
        case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper) as s):
            if lower is not None and ast.unparse(lower) != "0":  # x[0:] is x[:]
                yield changed(node, slice=changed(s, lower=None))
            if upper is not None:
                yield changed(node, slice=changed(s, upper=None))
        case ast.Return(value=ast.BinOp(left=value) | ast.BoolOp(values=[value, *_]) | ast.IfExp(body=value)):
            yield changed(node, value=value)
    if isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        yield ast.Pass()


def changed(node: ast.AST, **fields) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def choose(file: str, source: bytes, number: int, seed: int) -> list[Mutant]:
    """That many of the file's mutants, at most one a line, in the order of lines."""
    everything = mutants(source, file.startswith("kernels/"))
    random.Random(f"{seed} {file}").shuffle(everything)
    by_line = {mutant.line: mutant for mutant in reversed(everything)}  # the first of each line stays
    chosen = [mutant for mutant in everything if by_line[mutant.line] is mutant][:number]
    return sorted(chosen, key=lambda mutant: mutant.line)


# ---- running the tests ------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Import what takes seconds, and nothing of this project. The tests run in forks of this process."""
    sys.path[:] = [path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT)]
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "20000", "HF_HUB_OFFLINE": "1"}
    import pytest  # noqa: F401

    os.environ["TRITON_INTERPRET"] = "1"  # as in conftest.py: where Triton is imported it asks for it
    import torch._dynamo  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def run_pytest(tree: Path, tests: str, output: Path) -> None:
    """In a process of its own: the tests of the tree, its exit code that of pytest."""
    os.setsid()  # so that what the tests start ends with them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    files = [f"tests/test_{name}.py" for name in tests.split()]
    import pytest

    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", "not triton", *files]))


def first_failure(tree: Path, tests: str, limit: float | None = None) -> str | None:
    """The test that failed, "a hang" after `limit` seconds, or None where all passed."""
    output = tree / "output.txt"
    process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(tree, tests, output))
    process.start()
    try:
        process.join(limit)
        hangs = process.is_alive()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode != 5, f"no tests in {tests}"
    if hangs:
        return "a hang"
    if process.exitcode == 0:
        return None
    said = output.read_text()
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", said, re.MULTILINE)
    return failed[1] if failed else said.strip().splitlines()[-1]


def copy_tree(to: Path) -> Path:
    for name in ("minisft", "kernels", "tests", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, to / name)
    return to


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", nargs="*", default=list(TESTS), metavar="FILE", help="of TESTS; default: all")
    parser.add_argument("--per-file", type=int, default=8, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the tests, removes the copy
    warm_up()
    counts, limits = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        for file in options.files:
            tests, path = TESTS[file], tree / file
            if tests not in limits:
                began = time.monotonic()
                assert (failed := first_failure(tree, tests)) is None, f"without any change {failed} fails"
                limits[tests] = 60 + 3 * (time.monotonic() - began)
            source, killed = path.read_bytes(), []
            for mutant in choose(file, source, options.per_file, options.seed):
                shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)  # may be as old, and as long
                path.write_bytes(mutant.text(source))
                by = first_failure(tree, tests, limits[tests])
                killed.append(by is not None)
                print(f"{file}:{mutant.line}  {mutant.told(source)}  |  {by or 'SURVIVED'}", flush=True)
            path.write_bytes(source)
            counts[file] = sum(killed), len(killed)
    print()
    for file, (killed, number) in counts.items():
        print(f"{file:42} {killed:4} of {number:4}")
    killed, number = map(sum, zip(*counts.values()))
    print(f"{'all':42} {killed:4} of {number:4}  {killed / number:.1%}")
    return int(killed < SHARE * number)


if __name__ == "__main__":
    sys.exit(main())
