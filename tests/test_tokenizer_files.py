"""A tokenizer's files, as transformers reads them, with what the user overrides; and what is wrong with them is told."""

import json
import warnings
from datetime import date

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

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


def in_transformers(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        return transformers.AutoTokenizer.from_pretrained(folder, **options)


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
        ({"chat_template_kwargs": {"day": date(2026, 1, 31)}}, "chat_template_kwargs = .*not JSON serializable"),
        ({"chat_template_kwargs": {"x": float("nan")}}, "chat_template_kwargs = .*not JSON compliant"),
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


# ------------------------------------------------------------------------------------------------- beside transformers

NEXT = BASE.vocab_size
PROBE = "Hello <t>  you<X>\n<|im_end|> are <Y> fine<img> HELLO <T>"


def listed(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}


CASES = {
    "a token that tokenizer.json lacks": {
        "tokenizer_config": {"added_tokens_decoder": {str(NEXT): listed("<t>", rstrip=True, special=False)}}
    },
    "flags of the list win": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                str(BASE.eos_token_id): listed("<|im_end|>", lstrip=True, special=True),
                str(NEXT): listed("<t>", special=True),
            }
        }
    },
    "extra tokens as a list": {"tokenizer_config": {"extra_special_tokens": ["<X>", "<|im_end|>", "<Y>"]}},
    "extra tokens by name": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<img>"}}},
    "a token of this model alone": {"tokenizer_config": {"image_token": "<img>"}},
    "additional special tokens": {"tokenizer_config": {"additional_special_tokens": ["<Y>", "<X>"]}},
    "named tokens without a place": {"tokenizer_config": {"pad_token": "<t>", "unk_token": "<X>", "mask_token": "<Y>"}},
    "a word of the vocabulary as a special token": {"tokenizer_config": {"sep_token": "H"}},
    "the older map wins": {
        "tokenizer_config": {"eos_token": "<|endoftext|>", "added_tokens_decoder": None},
        "special_tokens_map": {"eos_token": listed("<|im_end|>"), "pad_token": "<|im_start|>"},
    },
    "the older map is not read beside the list": {
        "tokenizer_config": {
            "eos_token": "<|endoftext|>",
            "added_tokens_decoder": {str(NEXT): listed("<t>", special=False)},
        },
        "special_tokens_map": {"eos_token": "<|im_end|>"},
        "added_tokens": {"<X>": NEXT},
    },
    "the older list of tokens": {
        "tokenizer_config": {"mask_token": "<X>"},
        "added_tokens": {"<X>": NEXT + 1, "<t>": NEXT},
    },
}


def with_case(folder, case):
    for name, changes in CASES[case].items():
        edit(folder, f"{name}.json", **changes)
        path = folder / f"{name}.json"
        table = {key: value for key, value in json.loads(path.read_text()).items() if value is not None}
        path.write_text(json.dumps(table))
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ pad_token }}{{ image_token }}{{ unk_token }}")
    return folder


@pytest.mark.parametrize("override", [{}, {"eos_token": "<|endoftext|>"}, {"new_special_tokens": ["<T>"]}])
@pytest.mark.parametrize("case", CASES)
def test_files_mean_what_they_mean_to_transformers(folder, tmp_path, case, override):
    """Ids and special tokens; and again after we saved them, with an override and without."""
    ours = load_tokenizer(with_case(folder, case), **override)
    if "new_special_tokens" not in override:
        theirs = in_transformers(folder, **override)
        assert ours.encode(PROBE) == theirs.encode(PROBE, add_special_tokens=False)
        assert ours.apply_chat_template(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False)
        assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    ours.save(tmp_path / "saved")
    theirs, again = in_transformers(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")
    for other in (theirs, again):
        assert list(other.encode(PROBE)) == ours.encode(PROBE)
        assert (other.eos_token_id, other.bos_token_id) == (ours.eos_token_id, ours.bos_token_id)
    assert theirs.pad_token == ours.special_tokens.get("pad_token")
    assert again.special_tokens == ours.special_tokens and again.fingerprint() == ours.fingerprint()
    if "new_special_tokens" in override:
        assert ours.encode("<T>") == [ours.vocab_size - 1] and "<T>" in theirs.all_special_tokens


def test_template_files_replace_those_in_the_config(folder):
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    edit(folder, "tokenizer_config.json", chat_template=named)
    ours, theirs = load_tokenizer(folder), in_transformers(folder)
    for tools in (None, TOOLS):
        assert ours.apply_chat_template(MESSAGES, tools=tools) == theirs.apply_chat_template(
            MESSAGES, tools=tools, tokenize=False
        )


def test_a_chosen_template_is_the_only_one_that_is_saved(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    load_tokenizer(folder, chat_template="mine {{ 1 }}").save(folder / "saved")
    for tools in (None, TOOLS):
        loaded = in_transformers(folder / "saved")
        assert loaded.apply_chat_template(MESSAGES, tools=tools, tokenize=False) == "mine 1"


def test_the_file_for_this_version_of_transformers_is_taken(folder):
    other = train_tokenizer(["completely different"] * 5, 300)
    (folder / "tokenizer.4.0.0.json").write_bytes(other.files["tokenizer.json"])
    (folder / "tokenizer.99.0.json").write_bytes(b"{}")
    versions = ["tokenizer.99.0.json", "tokenizer.json", "tokenizer.4.0.0.json"]
    edit(folder, "tokenizer_config.json", fast_tokenizer_files=versions)
    ours, theirs = load_tokenizer(folder), in_transformers(folder)
    assert ours.encode("different") == theirs.encode("different") == other.encode("different")
    ours.save(folder / "saved")
    assert in_transformers(folder / "saved").encode("different") == ours.encode("different")


def test_ids_with_holes(folder):
    """vocab_size is the highest id + 1; a token that would take the id of another is refused."""
    vocab = {"a": 0, "b": 1, "<|im_end|>": 2, "c": 5}  # four tokens, so the library thinks that 4 is the next id
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", pad_token="<|im_end|>")
    assert load_tokenizer(folder).vocab_size == 6
    assert load_tokenizer(folder, new_special_tokens=["<x>"]).encode("<x>") == [4]
    with pytest.raises(UserError, match="'<y>' cannot be added: it would get the id 5 of another token"):
        load_tokenizer(folder, new_special_tokens=["<x>", "<y>"])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"added_tokens_decoder": {"5": listed("<t>")}}, "'<t>' has id None in tokenizer.json and 5 beside it"),
        ({"added_tokens_decoder": {"x": listed("<t>")}}, "malformed"),
        ({"added_tokens_decoder": {str(NEXT): {"special": True}}}, "malformed"),
        ({"extra_special_tokens": 7}, "malformed"),
        ({"extra_special_tokens": [""]}, "malformed"),
        ({"eos_token": ["</s>"]}, "malformed"),
        ({"chat_template": [{"name": "default"}]}, "malformed"),
        ({"bos_token": "<s>"}, "bos_token '<s>' is not in the vocabulary"),
    ],
)
def test_contradictions(folder, config, message):
    (folder / "chat_template.jinja").unlink()
    edit(folder, "tokenizer_config.json", **config)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", " "])
def test_new_tokens_have_a_text(folder, text):
    with pytest.raises(UserError, match="new_special_tokens"):
        load_tokenizer(folder, new_special_tokens=[text])


@pytest.mark.parametrize("versions", [["../tokenizer.4.0.json"], ["tokenizer.4.0.json/../../x"], [3], "no list", {}])
def test_versioned_files_lie_in_the_folder(folder, versions):
    (folder.parent / "tokenizer.4.0.json").write_text("{}")
    edit(folder, "tokenizer_config.json", fast_tokenizer_files=versions)
    assert load_tokenizer(folder).encode("Hello") == BASE.encode("Hello")
