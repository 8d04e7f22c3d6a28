"""A tokenizer's files, as transformers reads them, with what the user overrides; and what is wrong with them is told."""

import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.data.tokenizer_files import assemble, read_files
from minisft.errors import MODEL, UserError

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
BASE = train_tokenizer(["Hello, how are you?", "I am fine, thank you."] * 5, 300)


@pytest.fixture
def folder(tmp_path):
    BASE.save(tmp_path)
    return tmp_path


def edit(folder, name, **changes):
    path = folder / name
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(table | changes))


def in_transformers(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        return transformers.AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_those_that_transformers_loads_from_the_saved_folder(folder, tmp_path):
    ours = load_tokenizer(
        folder,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        new_special_tokens=["<|pad|>", "<|tool|>", "<|im_end|>"],  # one of them is there already
        chat_template="{% for m in messages %}<|tool|>{{ m.content }}{{ eos_token }}{% endfor %}",
    )
    assert ours.vocab_size == BASE.vocab_size + 2
    assert ours.encode("<|pad|><|tool|>") == [BASE.vocab_size, BASE.vocab_size + 1]
    assert ours.pad_token_id == BASE.vocab_size
    ours.save(tmp_path / "saved")
    again, theirs = load_tokenizer(tmp_path / "saved"), in_transformers(tmp_path / "saved")
    text = "Hello<|tool|> you<|pad|><|im_end|>"
    for other in (again, theirs):
        assert (other.eos_token_id, other.pad_token_id) == (ours.eos_token_id, ours.pad_token_id)
        assert list(other.encode(text)) == ours.encode(text)
    rendered = ours.apply_chat_template(MESSAGES)
    assert rendered == "<|tool|>Hi<|endoftext|><|tool|>Hello<|endoftext|>"
    assert rendered == again.apply_chat_template(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False)
    assert again.files == ours.files  # nothing is left to override


def test_without_overrides_files_stay_as_they_were(folder):
    assert load_tokenizer(folder).files == read_files(folder) == BASE.files


def test_every_override_changes_the_fingerprint(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].content }}")
    changes = [
        {},
        {"eos_token": "<|endoftext|>"},
        {"pad_token": "<|im_end|>"},
        {"new_special_tokens": ["<x>"]},
        {"chat_template": "short"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template": "{{ strftime_now('%Y') }}", "template_date": "2024-01-01"},
        {"chat_template": "{{ strftime_now('%Y') }}", "template_date": "2025-01-01"},
    ]
    assert len({load_tokenizer(folder, **change).fingerprint() for change in changes}) == len(changes)


def test_variables_reach_every_rendering(folder):
    text = "{{ 'on' if enable_thinking else 'off' }} {{ level }}"
    tokenizer = load_tokenizer(folder, chat_template=text, chat_template_kwargs={"enable_thinking": True, "level": 3})
    assert tokenizer.apply_chat_template(MESSAGES) == "on 3"
    assert tokenizer.apply_chat_template(MESSAGES, enable_thinking=False) == "off 3"  # a row's own win


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eos_token": "<|im_ende|>"}, r"eos_token '<\|im_ende\|>' is not in the vocabulary"),
        ({"pad_token": "<pad>"}, "pad_token '<pad>' is not in the vocabulary"),
        ({"chat_template": "no such file.jinja"}, "chat_template = 'no such file.jinja'"),
        ({"template_date": "yesterday"}, "template_date = 'yesterday' is not a date"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages' is not a variable"),
        ({"chat_template_kwargs": {"a b": 1}}, "'a b' is not a variable"),
    ],
)
def test_overrides_that_do_not_fit(folder, options, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder, **options)


def test_a_near_token_is_named(folder):
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, eos_token="<|im_ende|>")
    assert "<|im_end|>" in caught.value.hint and "new_special_tokens" in caught.value.hint


# ------------------------------------------------------------------------------------------------- named templates


def test_named_templates_are_picked_as_in_transformers(folder):
    (folder / "chat_template.jinja").write_text("default {{ messages | length }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ tools | length }}")
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    ours, theirs = load_tokenizer(folder), in_transformers(folder)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
        assert ours.apply_chat_template(MESSAGES, tools=tools) == expected
    rag = load_tokenizer(folder, chat_template="rag")
    for tools in (None, TOOLS):
        assert rag.apply_chat_template(MESSAGES, tools=tools) == "rag"
    ours.save(folder / "saved")
    assert load_tokenizer(folder / "saved").template_names == ("default", "rag", "tool_use")


def test_the_older_list_of_templates(folder):
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "rag"}]
    edit(folder, "tokenizer_config.json", chat_template=named)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_chat_template(MESSAGES, tools=TOOLS) == "tools"
    with pytest.raises(UserError, match="no chat template but those named rag, tool_use"):
        tokenizer.apply_chat_template(MESSAGES)


# ------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_other_formats_are_refused_with_the_conversion(folder, name):
    (folder / "tokenizer.json").rename(folder / name)
    with pytest.raises(UserError, match=f"no tokenizer.json, only {name}") as caught:
        load_tokenizer(folder)
    assert "save_pretrained" in caught.value.hint and caught.value.exit_code == MODEL


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("eos_token", "bos_token", "pad_token", "chat_template", "added_tokens_decoder", "extra_special_tokens")


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3), JSON)
@settings(max_examples=200, deadline=None)
def test_malformed_files_are_told_without_a_traceback(changes, added_tokens):
    config = json.loads(BASE.files["tokenizer_config.json"]) | changes
    files = BASE.files | {
        "tokenizer_config.json": json.dumps(config).encode(),
        "added_tokens.json": json.dumps(added_tokens).encode(),
    }
    try:
        parts = assemble(files, "folder")
    except UserError as error:
        assert "folder" in str(error)
    else:
        assert all(isinstance(text, str) for text in (*parts.special_tokens.values(), *parts.templates.values()))
