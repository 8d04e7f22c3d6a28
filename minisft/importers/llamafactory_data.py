"""LLaMA-Factory's data sets: where the rows are, and what their description in dataset_info.json says of the columns."""

from pathlib import Path

from minisft.errors import CONFIG, UserError
from minisft.importers.translation import FirstRow, Translation, as_number, columns_left_out, short, source
from minisft.strict_json import read_json

DATA_INFO = "dataset_info.json"
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}  # the columns where none are named
# The names of roles that turns may have here: with from and value, with role and content.
NAMES = {
    "user_tag": (("human", "user"), ("user",)),
    "assistant_tag": (("gpt", "assistant"), ("assistant",)),
    "system_tag": (("system",), ("system", "developer")),
    "observation_tag": (("observation", "tool", "function_response", "tool_response"), ("tool",)),
    "function_tag": (("function_call", "tool_call"), ()),
}


def dataset_info(directory: str, folder: Path) -> tuple[dict | None, Path]:
    """The descriptions of the data, and the folder that they are in."""
    for place in dict.fromkeys((folder / directory, Path(directory), folder, *(p / directory for p in folder.parents))):
        if (place / DATA_INFO).is_file():
            info = read_json(place / DATA_INFO, exit_code=CONFIG)
            return (info if isinstance(info, dict) else {}), place
    return None, folder


def described_source(
    t: Translation, name: str, info: dict, where: Path, limit: int | None, stage: str, first_row: FirstRow
) -> str | dict:
    """One entry of dataset_info.json as a source of ours."""
    repository, file = info.get("hf_hub_url"), info.get("file_name")
    if file and not repository and (where / str(file)).is_dir():
        path = f"{where / str(file)}/*"
    else:
        path = str(repository) if repository else str(where / str(file or info.get("script_url") or name))
    if not repository and not file:
        t.difference(f"{name}: only files and Hugging Face repositories are read; name its rows as data.train_data")
    limit = min((int(n) for n in (limit, as_number(info.get("num_samples"))) if n), default=None)
    slice = f"[:{limit}]" if limit else ""
    split = str(info.get("split") or "train")
    entries: dict[str, object] = {
        "name": info.get("subset"),
        "data_dir": info.get("folder") if repository else None,
        "split": f"{split}{slice}" if repository else slice,
    }
    row = first_row(source(path))
    wanted = _columns(t, name, info, stage)
    entries["field_map"] = {theirs: ours for ours, theirs in wanted.items() if theirs and theirs != ours}
    entries["ignore"] = columns_left_out(t, row, wanted.values()) if stage != "pt" else []
    return source(path, **entries)


def _columns(t: Translation, name: str, info: dict, stage: str) -> dict[str, str | None]:
    """{our field: their column} of one data set."""
    columns, tags = info.get("columns"), info.get("tags")
    columns = columns if isinstance(columns, dict) else ALPACA  # a column that is not named is not read
    tags = tags if isinstance(tags, dict) else {}
    for key, value in (columns | tags).items():
        if not isinstance(value, str | None):
            hint = "expected the name of a column, or of a role"
            raise UserError(f"{DATA_INFO}: {name}: {key} = {short(value)}", hint=hint)
    style, ranking, kto = info.get("formatting", "alpaca"), bool(info.get("ranking")), stage == "kto"
    if style == "alpaca" and stage == "pt":
        return {"text": columns.get("prompt") or "text"}
    wanted: dict[str, str | None] = {"system": columns.get("system")}
    if style == "alpaca":
        t.agree("data.prompt_format", "chat", f"{name}, through LLaMA-Factory's template")
        wanted |= _alpaca(t, name, columns, ranking or kto)
    else:
        wanted |= {"tools": columns.get("tools")}
        messages = columns.get("messages") or "conversations"
        written = (tags.get("role_tag") or "from", tags.get("content_tag") or "value")
        if written == ("role", "content"):
            wanted["prompt" if ranking else "messages"] = messages
        else:
            wanted["conversations"] = messages
        if written not in (("from", "value"), ("role", "content")):
            t.difference(f"{name}: turns must have from and value, or role and content; there {' and '.join(written)}")
        names = {key: NAMES[key][written == ("role", "content")] for key in NAMES if tags.get(key)}
        others = [f"{key} = {tags[key]}" for key, ours in names.items() if tags[key] not in ours]
        if others:
            t.difference(f"{name}: these names of roles are not known here: {', '.join(others)}")
        if style == "openai":
            t.difference(f'{name}: formatting openai adds "detailed thinking off" to the system prompt there, not here')
    if ranking:
        wanted |= {"chosen": columns.get("chosen"), "rejected": columns.get("rejected")}
    if kto:
        answer = {"completion": columns.get("response")} if style == "alpaca" else {}
        wanted |= {**answer, "label": columns.get("kto_tag")}
    if any(columns.get(kind) for kind in ("images", "videos", "audios")):
        t.difference(f"{name}: images, sounds and videos are not supported")
    return wanted


def _alpaca(t: Translation, name: str, columns: dict, is_preference: bool) -> dict[str, str | None]:
    """The columns of questions and answers."""
    question, query = columns.get("prompt"), columns.get("query")
    if query:
        t.difference(f"{name}: {question} and {query} are joined by a newline there, by an empty line here")
    if columns.get("history") and not is_preference:
        t.difference(f"{name}: the answers in {columns['history']} (earlier turns) are trained there, and context here")
    asked = {"history": columns.get("history"), "input": query, "instruction": question}
    return asked if is_preference else asked | {"output": columns.get("response")}
