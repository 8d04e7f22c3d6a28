"""minisft: a from-scratch, pure-PyTorch engine that fine-tunes language models."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# The kernels live in the top-level folder kernels/ and import as minisft.kernels. An installation maps that folder
# (pyproject.toml); a plain checkout finds it by this extra entry on the package's search path.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).resolve().parents[1]))
