"""Who may import whom: the table below, held for every file by reading its imports, not by running it."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Rooms that are not named here are of floor 3. "data/*" stands for the rooms of the folder without a line of their own.
FLOORS = {
    "kernels/*": 0,
    "__init__": 1, "errors": 1, "units": 1, "files": 1, "strict_json": 1, "atomic_folder": 1, "hub": 1, "schedule": 1,
    "signals": 1, "loggers": 1, "log_files": 1, "trackers": 1, "best": 1, "cards": 1, "memory": 1, "spikes": 1, "control": 1,
    "data/kinds": 1, "data/rows": 1, "data/row_format": 1, "data/formats": 1, "data/preferences": 1, "data/prompts": 1,
    "data/chat/conversations": 1, "data/packing_strategies": 1, "data/packing": 1, "preference/losses": 1,
    "model/lora_options": 1,
    "config/*": 1, "gguf/file": 1, "gguf/kinds": 1, "importers/*": 1, "init/*": 1, "init/detect": 3,
    "data/*": 2, "gguf/*": 2, "model/*": 2, "runtime": 2, "ranks": 2, "peers": 2,
    "parameters": 2, "parts": 2, "update": 2, "optimizers": 2, "metrics": 2,
    "train": 4, "commands/*": 4, "__main__": 4,
}  # fmt: skip
PACKAGES = {  # what each floor may import from outside
    0: {"torch", "triton"},
    1: {"numpy"},
    2: {
        "numpy",
        "torch",
        "safetensors",
        "tokenizers",
        "jinja2",
        "pyarrow",
    },
    3: {"numpy", "torch", "safetensors", "tqdm"},
    4: {"numpy", "torch", "safetensors", "tqdm"},
}
EXTRA_PACKAGES = {
    "hub": {"huggingface_hub"},  # every download goes through it, and only there
    "upload": {"huggingface_hub"},  # and every upload here
    "card": {"yaml"},  # the header of a model card
    "harness": {"lm_eval"},  # inside a function
    "preference/losses": {"torch"},  # inside a function: the configuration reads the names of the losses from here
    "gguf/file": {"gguf"},  # inside functions: hub asks here whether a path is such a file
    "gguf/tensors": {"gguf"},  # for a type
    "report/page": {"jinja2"},
    "report/charts": {"matplotlib"},  # inside functions: an extra
    "trackers": {"torch"},  # inside a function: its texts and hyperparameters for TensorBoard
    "gguf/write": {"gguf"},  # inside functions
    "gguf/write_tokenizer": {"gguf"},  # for a type
    "gguf_folder": {"gguf"},  # inside a function that asks whether it is there
    "importers/yaml_file": {"yaml"},  # other trainers write YAML, we TOML
}
# Kernels made of others: rope norms the heads of q and k first, where a model does; attention turns q and dk; both losses score
# rows of logits; 8-bit states are quantised; copies in bf16 stay with their weights. And ops whose file is split.
EXTRA_ROOMS = {
    "__init__": {
        "train",
        "model/load",
        "data/tokenizer",
        "generation",
        "evaluation",
    },  # the public API, imported when first used
    "data/tokenizer_files": {"gguf/tokenizer"},
    "gguf/config": {"model/model_config"},
    "gguf/write": {"model/model_config"},
    "model/load": {"gguf/config"},
    "model/weight_files": {"gguf/tensors"},
    "kernels/rope": {"kernels/rms_norm"},
    "kernels/linear": {"kernels/copies"},
    "kernels/rms_norm": {"kernels/copies"},
    "kernels/lora": {"kernels/copies", "kernels/linear"},
    "kernels/linear_cross_entropy": {
        "kernels/copies",
        "kernels/cross_entropy",
        "kernels/linear",
        "kernels/linear_cross_entropy_torch",
    },
    "kernels/linear_cross_entropy_torch": {"kernels/copies", "kernels/linear"},
    "kernels/flash_attention": {
        "kernels/flash_attention_configs",
        "kernels/flash_attention_kernels",
        "kernels/flash_attention_tiles",
        "kernels/flash_attention_torch",
        "kernels/rope",
    },
    "kernels/flash_attention_kernels": {"kernels/flash_attention_tiles"},
    "kernels/flash_attention_tiles": {"kernels/rope"},
    "kernels/gated_delta_rule": {"kernels/gated_delta_rule_kernels", "kernels/gated_delta_rule_torch"},
    "kernels/adamw": {"kernels/adamw_formats", "kernels/copies", "kernels/quantize"},
    "kernels/adamw_formats": {"kernels/quantize"},
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "shelve", "marshal", "dill", "joblib", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "torch.save", "torch.hub.load", "os.system"}


def room_of(path: Path) -> str:
    """minisft/data/batch.py -> data/batch, minisft/__init__.py -> __init__, kernels/rope.py -> kernels/rope"""
    return path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("minisft/")


FILES = {room_of(path): path for folder in ("minisft", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))}


def floor(room: str) -> int:
    return FLOORS.get(room, FLOORS.get(f"{room.partition('/')[0]}/*", 3))


def room_of_module(module: str) -> str | None:
    """minisft.data.batch -> data/batch; a package is its __init__; None for a module that is not ours."""
    name = "/".join(module.split(".")[1:])
    return next((room for room in (name, f"{name}/__init__".lstrip("/")) if room in FILES), None)


@cache
def nodes_of(room: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(FILES[room].read_text())))


@cache
def imports(room: str) -> tuple[frozenset[str], frozenset[str]]:
    """(our rooms, top-level names of other packages) that a file imports, wherever in the file it does so."""
    ours, others = set(), set()
    for node in nodes_of(room):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}: relative import in line {node.lineno}"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from minisft.data import cache` imports a room, `from minisft.data.cache import build` a name of one
            modules = [m if room_of_module(m) else node.module for m in modules]
        else:
            continue
        for module in modules:
            if module.partition(".")[0] == "minisft":
                found = room_of_module(module)
                assert found is not None, f"{room} imports {module}, which does not exist"
                ours.add(found)
            else:
                others.add(module.partition(".")[0])
    return frozenset(ours - {room}), frozenset(others - set(sys.stdlib_module_names))


def may_import(room: str, other: str) -> bool:
    """The floors, and the walls on them."""
    here, there = floor(room), floor(other)
    top, other_top = (name.rpartition("/")[0].partition("/")[0] for name in (room, other))  # data/chat is in data
    if other == "__init__" or other in EXTRA_ROOMS.get(room, ()):
        return True
    if here == 0:
        return other == "kernels/common"
    walled = top in ("data", "model") and other.startswith("config/")
    if here == 1:
        return there == 1 and not walled
    if here == 2:
        return there < 2 and not walled or there == 2 and top == other_top
    return there <= 3 and here <= 4


def test_the_files_are_there():
    assert {"__init__", "__main__", "config/sections", "train", "kernels/common", "data/batch"} <= set(FILES)
    assert not any(room.endswith("utils") for room in FILES)


@pytest.mark.parametrize("room", FILES)
def test_a_room_imports_only_what_its_floor_allows(room):
    ours, others = imports(room)
    assert [other for other in ours if not may_import(room, other)] == []
    allowed = PACKAGES[floor(room)] | EXTRA_PACKAGES.get(room, set())
    assert others - allowed == set()


def test_no_circle():
    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " -> ".join([*path, room])
        if room not in done:
            for other in sorted(imports(room)[0]):
                visit(other, (*path, room))
            done.add(room)

    done: set[str] = set()
    for room in FILES:
        visit(room, ())


@pytest.mark.parametrize("room", FILES)
def test_nothing_unsafe(room):
    nodes = nodes_of(room)
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    imported = {a.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)} | imported
    assert calls & FORBIDDEN_CALLS == set()
    assert modules & FORBIDDEN_MODULES == set()
    keywords = {ast.unparse(node) for node in nodes if isinstance(node, ast.keyword)}
    assert keywords & {"allow_pickle=True", "shell=True", "trust_remote_code=True"} == set()


def test_floors_0_and_1_and_the_commands_load_without_what_they_do_not_need():
    light = [r for r in FILES if floor(r) == 1] + ["train", "__main__"]
    modules = ["minisft." + room.replace("/", ".") for room in light if room != "__init__"]
    numpy_free = [m for m in modules if m.startswith(("minisft.config.", "minisft.train", "minisft.__main__"))]
    code = (
        "import importlib, sys\n"
        "def load(modules, without):\n"
        "    [importlib.import_module(m) for m in modules]\n"
        "    assert not set(without) & set(sys.modules), set(without) & set(sys.modules)\n"
        f"load({numpy_free}, ['torch', 'numpy'])\n"
        f"load({modules}, ['torch', 'huggingface_hub', 'transformers'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_constraints_pin_every_direct_dependency():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    tested = [*project["dependencies"], *(r for e in ("test", "bench", "docs", "parquet") for r in extras[e])]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+(; .+)?", pin) for pin in pins)  # no local versions, one pin a line
    assert {re.split(r"[^a-z0-9-]", requirement)[0] for requirement in tested} <= {
        pin.partition("==")[0] for pin in pins
    }


def test_every_package_is_installed():
    settings = PYPROJECT["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in FILES.values()}
    names = {folder.replace("/", ".").replace("kernels", "minisft.kernels") for folder in folders}
    assert settings["packages"] == sorted({*names, "minisft.configs", "minisft.examples"})
    of_package = {"minisft": "minisft", "minisft.configs": "configs"}  # its folder
    of_package |= {f"minisft.{name}": f"minisft/{name}" for name in ("data", "report")}
    installed = {
        path
        for name, top in of_package.items()
        for files in settings["package-data"][name]
        for path in (ROOT / top).glob(files)
    }
    beside = {
        path
        for top in ("minisft", "configs")
        for path in (ROOT / top).rglob("*.*")
        if path.suffix not in (".py", ".pyc")
    }
    assert {path for path in beside if path.is_file()} == installed


def test_the_walk_goes_through_functions_that_exist():
    page = (ROOT / "docs" / "rooms.md").read_text()
    walk = re.findall(r"^\| `([\w.]+)` \| \[`([\w/.]+)`\]", page, re.MULTILINE)
    assert len(walk) == 7 and len({file for _, file in walk}) == 6
    for function, file in walk:
        assert f"def {function.rpartition('.')[2]}(" in (ROOT / file).read_text(), function


def test_the_map_has_every_room():
    block = (ROOT / "docs" / "rooms.md").read_text().partition("## The rooms")[2].split("```")[1]
    mapped, folder = set(), ""
    for line in block.strip("\n").split("\n"):
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folder = folder if indent else name
        found = set(ROOT.glob(folder + name if indent else name))
        assert found, f"{line.strip()}: nothing has this name"
        mapped |= found
    rooms = [path for top in ("minisft", "kernels") for path in (ROOT / top).iterdir() if path.name != "__pycache__"]
    assert [path.name for path in rooms if path not in mapped] == []


# ------------------------------------------------------------------------------------------------- the test of the test


@pytest.mark.parametrize(
    ("room", "other", "allowed"),
    [
        ("kernels/rope", "kernels/common", True),
        ("kernels/rope", "kernels/glu", False),
        ("kernels/rope", "errors", False),
        ("config/load", "errors", True),
        ("config/load", "model/load", False),
        ("config/sections", "model/lora_options", True),
        ("data/packing", "data/batch", False),
        ("model/lora_options", "config/sections", False),
        ("data/loader", "data/packing", True),
        ("data/loader", "model/load", False),
        ("data/loader", "config/sections", False),
        ("model/load", "kernels/rope", True),
        ("model/load", "data/batch", False),
        ("update", "loop", False),
        ("loop", "config/sections", True),
        ("loop", "model/load", True),
        ("loop", "train", False),
        ("train", "loop", True),
        ("commands/generate", "train", False),
    ],
)
def test_the_table(room, other, allowed):
    assert may_import(room, other) is allowed
