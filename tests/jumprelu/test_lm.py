"""Loading: folders in every layout, refusals, fingerprints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from jumprelu import lm as lm_module
from jumprelu.files import read_json, write_json
from jumprelu.lm import EMBEDDED, LM, load_lm
from tests.models import (
    D_MODEL,
    FAMILIES,
    LAYERS,
    random_ids,
    save_tiny,
    tiny_lm,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_model_that_was_saved(family, tmp_path):
    lm = load_lm(save_tiny(family, tmp_path / "some-model"), device="cpu")
    ids = random_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, tiny_model(family)(ids).logits)
    assert (lm.d_model, lm.n_layers, lm.name, lm.tokenizer) == (D_MODEL, LAYERS, "some-model", None)
    assert lm.device.type == "cpu" and lm.dtype == torch.float32 and not lm.model.training
    assert lm.config._attn_implementation == "eager"
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_tokenizer_is_loaded_where_there_is_one(tmp_path):
    lm = load_lm(str(save_tiny("gemma2", tmp_path, tokenizer=True)), device="cpu")
    assert lm.tokenizer.bos_token_id == 2
    ids = lm.tokenizer("naïve code", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("naïve code".encode()) and lm.tokenizer.decode(ids) == "naïve code"


def test_dtype_is_float32_on_a_cpu_unless_asked(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_lm(tmp_path, device="cpu").dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        assert load_lm(tmp_path, device="cpu", dtype=dtype).dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match="unknown dtype 'int4': expected one of float32, bfloat16, float16"
    ):
        load_lm(tmp_path, dtype="int4")


def test_the_embedded_model_or_the_way_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lm_module, "SUBJECT", tmp_path / "lm")
    with pytest.raises(FileNotFoundError, match="`make lm` trains it"):
        load_lm()
    tiny_model("gemma2").to(torch.bfloat16).save_pretrained(tmp_path / "lm")
    for lm in (load_lm(device="cpu"), load_lm(EMBEDDED, device="cpu")):
        assert lm.name == EMBEDDED and lm.dtype == torch.float32


def test_special_ids_come_from_configuration_and_tokenizer():
    assert tiny_lm().special_ids == (0, 1, 2)
    assert tiny_lm(bos_token_id=7, eos_token_id=[8, 9], pad_token_id=None).special_ids == (7, 8, 9)
    assert tiny_lm(bos_token_id=None, eos_token_id=None, pad_token_id=None).special_ids == ()
    model = tiny_model(bos_token_id=5, eos_token_id=None, pad_token_id=None, family="llama")
    assert LM(model, tiny_tokenizer()).special_ids == (0, 1, 2, 5)


def test_fingerprint_tells_weights_configurations_and_types_apart(tmp_path):
    same = [tiny_lm().fingerprint, tiny_lm().fingerprint]
    others = [
        tiny_lm(seed=1).fingerprint,
        tiny_lm(sliding_window=5).fingerprint,
        LM(tiny_model("gemma2").bfloat16()).fingerprint,
    ]
    assert same[0] == same[1] and len({same[0], *others}) == 4
    one, two = save_tiny("gemma2", tmp_path / "one"), save_tiny("gemma2", tmp_path / "two")
    first = load_lm(one, device="cpu").fingerprint
    assert (
        first
        == load_lm(two, device="cpu").fingerprint
        != load_lm(two, device="cpu", dtype="bfloat16").fingerprint
    )
    tiny_model("gemma2", seed=1).save_pretrained(two)
    assert first != load_lm(two, device="cpu").fingerprint


def test_a_model_in_several_files(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(lm_module.weight_files(tmp_path)) > 1
    lm = load_lm(tmp_path, device="cpu")
    assert (
        torch.equal(lm.model.lm_head.weight, tiny_model("llama").lm_head.weight) and lm.fingerprint
    )
    lost = lm_module.weight_files(tmp_path)[1]
    lost.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"lacks {lost.name}: the download or copy is incomplete"
    ):
        load_lm(tmp_path)


def test_damaged_and_incomplete_folders_are_named(tmp_path):
    folder = save_tiny("llama", tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"lack 1 tensors of a LlamaForCausalLM, first model.layers.1.mlp.up_proj.weight",
    ):
        load_lm(folder)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors is truncated or not safetensors"):
        load_lm(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors"):
        load_lm(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_lm(folder)


def test_pickles_are_refused(tmp_path):
    folder = save_tiny("llama", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"as pickles \(pytorch_model.bin\).*refused. Choose a copy with model.safetensors",
    ):
        load_lm(folder)


def test_code_in_a_repository_is_refused_and_not_run(tmp_path):
    folder = save_tiny("llama", tmp_path)
    config = read_json(folder / "config.json")
    config |= {
        "model_type": "unheard-of",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    write_json(folder / "config.json", config)
    (folder / "code.py").write_text("open('ran', 'w').write('x')")
    with pytest.raises(ValueError, match="brings its own Python code.*refused"):
        load_lm(folder)


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing", "~/nothing", "a/b/c", ""])
def test_a_path_that_is_no_folder_does_not_go_to_the_hub(name):
    with pytest.raises(
        FileNotFoundError,
        match="Expected a folder with config.json and model.safetensors, a hub id",
    ):
        load_lm(name)
