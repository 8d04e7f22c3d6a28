"""The process that prepares the next chunk of a stream while the run trains on the present one (prepare/data.py starts it).

It takes the configuration and the place of the chunk from its standard input, as JSON, and leaves the chunk and its token cache
in their folder. It reports nothing: what goes wrong here goes wrong again where the run opens the chunk.
"""

import json
import os
import sys

from minisft.config.load import load
from minisft.data.chunks import read_formats, read_places
from minisft.prepare.data import Chunks
from minisft.prepare.options import prepare_tokenizer


def main() -> None:
    os.nice(5)
    task = json.load(sys.stdin)
    config, _ = load({}, {key: value for key, value in task["config"].items() if value is not None}, origin="stream")
    tokenizer, _ = prepare_tokenizer(config)
    chunks = Chunks(config, tokenizer)
    chunks.formats |= read_formats(task["formats"])
    chunks.read(task["number"], read_places(task["begin"]))


if __name__ == "__main__":
    main()
