"""minisft: a from-scratch, pure-PyTorch engine that fine-tunes language models.

    from minisft import run, load_model, load_tokenizer, generate, evaluate

`import minisft` imports nothing else, torch included; each of these names does when it is first used.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisft.data.tokenizer import load_tokenizer
    from minisft.evaluation import evaluate
    from minisft.generation import generate
    from minisft.model.load import load_model
    from minisft.train import run

__all__ = ["__version__", "evaluate", "generate", "load_model", "load_tokenizer", "run"]
__version__ = "0.1.0"

# The kernels live in the top-level folder kernels/ and import as minisft.kernels. An installation maps that folder
# (pyproject.toml); a plain checkout finds it by this extra entry on the package's search path.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).resolve().parents[1]))

_MODULE_OF = {
    "evaluate": "minisft.evaluation",
    "generate": "minisft.generation",
    "load_model": "minisft.model.load",
    "load_tokenizer": "minisft.data.tokenizer",
    "run": "minisft.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'minisft' has no attribute {name!r}")
    return getattr(_import_module(_MODULE_OF[name]), name)
