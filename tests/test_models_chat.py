"""Chat templates: same text as transformers, and no way out of the sandbox."""

import datetime

import pytest
from model_files import write_json
from smollm2 import smollm2_path

from jchameleon.errors import InvalidRequestError, ModelLoadError
from jchameleon.models.chat import ChatTemplate
from jchameleon.models.loader import load_model

USER = [{"role": "user", "content": "hi"}]
CHATS = [
    USER,
    [{"role": "system", "content": "Be brief.\n"}, *USER],
    [
        *USER,
        {"role": "assistant", "content": "Hello! <|im_end|> {{ 1 }}"},
        {"role": "user", "content": "  déjà vu 🦎\n\n<tag>&amp;"},
    ],
]


@pytest.fixture(scope="module")
def smollm2():
    return load_model(str(smollm2_path()), dtype="bfloat16")


@pytest.fixture(scope="module")
def smollm2_oracle():
    transformers = pytest.importorskip(
        "transformers", reason="oracle: Python 3.11 only"
    )
    path = smollm2_path()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm2_prompt_is_as_published(smollm2):
    assert smollm2.chat_template.render(USER) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [True, False])
def test_smollm2_prompt_equals_transformers(smollm2, smollm2_oracle, chat, generation):
    expected = smollm2_oracle.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=generation
    )
    ours = smollm2.chat_template.render(chat, add_generation_prompt=generation)
    assert ours == expected
    ids = smollm2.tokenizer.encode(ours)
    assert ids == smollm2_oracle(expected, add_special_tokens=False).input_ids
    assert ids[0] == 1  # <|im_start|>, as one token


# What templates on the hub use: whitespace control, loop controls, filters, bos.
RICH = """{{ bos_token }}
{%- if not tools is none %}tools{% endif %}
{%- set ns = namespace(n=0) %}
{%- for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {% if m['role'] == 'assistant' %}
    {% generation %}{{ m.content | trim }}{% endgeneration %}
    {% endif %}
[{{ ns.n }}:{{ m.role.upper() }}]{{ m.content | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ {'a': '<é>', 'b': [1, 2]} | tojson(indent=2) }}
{% endif %}
{{ dict(x=1) }} {{ range(3) | list }} {{ ', '.join(['a', 'b']) }}
"""


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation", [True, False])
def test_rich_template_equals_transformers(smollm2_oracle, chat, generation):
    chat = [*chat, {"role": "skip", "content": "x"}]
    expected = smollm2_oracle.apply_chat_template(
        chat, chat_template=RICH, tokenize=False, add_generation_prompt=generation
    )
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    template = ChatTemplate(RICH, special_tokens=tokens)
    assert template.render(chat, add_generation_prompt=generation) == expected


def test_strftime_now_is_today():
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}")
    before = datetime.date.today()
    text = template.render(USER)
    assert text in (before.isoformat(), datetime.date.today().isoformat())


def test_raise_exception_becomes_one_line_error():
    template = ChatTemplate("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(InvalidRequestError, match="refuses .*: roles must alternate"):
        template.render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ messages | attr('__class__') }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{x.__class__}'.format_map({'x': messages}) }}",
        "{{ self._TemplateReference__context }}",
        "{{ range(10000000000) | list }}",
    ],
)
def test_hostile_template_cannot_leave_the_sandbox(source):
    template = ChatTemplate(source)
    try:
        text = template.render(USER)
    except InvalidRequestError as error:
        assert "\n" not in str(error)
    else:  # the sandbox may also answer with an undefined value
        assert text == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% do messages.append({'role': 'x', 'content': 'y'}) %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.clear() }}",
    ],
)
def test_hostile_template_cannot_change_the_messages(source):
    messages = [dict(USER[0])]
    with pytest.raises((InvalidRequestError, ModelLoadError)):
        ChatTemplate(source).render(messages)
    assert messages == USER


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% include 'x' %}{% end %}"])
def test_template_that_does_not_compile_is_a_load_error(source):
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate(source)


def test_template_including_files_finds_none():
    with pytest.raises(InvalidRequestError):
        ChatTemplate("{% include '/etc/hostname' %}").render(USER)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("hi", "list"),
        ({"role": "user"}, "list"),
        (["hi"], r"messages\[0\]"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'"),
        ([*USER, {"content": "x"}], r"messages\[1\] has no 'role'"),
        ([{"role": "user", "content": None}], "content.*string"),
        ([{"role": "user", "content": "x", "name": []}], "name.*string"),
    ],
)
def test_render_malformed_messages_are_refused(messages, words):
    with pytest.raises(InvalidRequestError, match=words):
        ChatTemplate("{{ messages }}").render(messages)


def test_directory_without_template_has_none(tmp_path):
    assert ChatTemplate.from_directory(tmp_path) is None
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>"})
    assert ChatTemplate.from_directory(tmp_path) is None


def test_directory_string_template_sees_special_tokens(tmp_path):
    config = {
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
    }
    write_json(tmp_path / "tokenizer_config.json", config)
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None
    assert template.render(USER) == "<s>|</s>|hi"


def test_directory_named_templates_take_default(tmp_path):
    named = [
        {"name": "rag", "template": "rag"},
        {"name": "default", "template": "plain"},
    ]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None
    assert template.render(USER) == "plain"
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named[:1]})
    with pytest.raises(ModelLoadError, match="default"):
        ChatTemplate.from_directory(tmp_path)


def test_directory_jinja_file_goes_first(tmp_path):
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "config"})
    write_json(tmp_path / "chat_template.json", {"chat_template": "json"})
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None and template.render(USER) == "json"
    (tmp_path / "chat_template.jinja").write_text("file")
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None and template.render(USER) == "file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja"):
        ChatTemplate.from_directory(tmp_path)


def test_directory_template_of_other_type_is_refused(tmp_path):
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": 3})
    with pytest.raises(ModelLoadError, match="chat_template"):
        ChatTemplate.from_directory(tmp_path)
