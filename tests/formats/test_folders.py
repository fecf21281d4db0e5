"""Models whose weights lie in several folders: sentence-transformers, diffusers pipelines, folders of a kind."""

import pytest
from laid import index, laid, ones

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.folders import check_folders, same_folders


def modules(*paths):
    return [{"idx": n, "name": str(n), "path": path, "type": "x"} for n, path in enumerate(paths)]


FLAT = {
    "model.safetensors": ones("encoder.weight"), "config.json": {"model_type": "bert"},
    "modules.json": modules("", "1_Pooling", "2_Dense"), "1_Pooling/config.json": {},
    "2_Dense/model.safetensors": ones("linear.weight"), "2_Dense/config.json": {},
}  # fmt: skip


def test_modules_of_sentence_transformers_are_read(tmp_path):
    model = open_checkpoint(laid(tmp_path, FLAT))
    assert set(model.tensors) == {"encoder.weight", "2_Dense/linear.weight"}
    assert [(folder.prefix, folder.name) for folder in model.folders] == [("", ""), ("2_Dense/", "2_Dense")]
    assert {"1_Pooling/config.json", "2_Dense/config.json", "modules.json"} <= set(model.side_files)
    assert model.notes == model.left_out == ()


def test_a_transformer_in_a_folder_has_plain_names(tmp_path):
    """So that experts in the old layout and in the new fit one base."""
    files = {
        "modules.json": modules("0_Transformer", "1_Pooling", "2_Dense"),
        "0_Transformer/model.safetensors": ones("encoder.weight"), "0_Transformer/config.json": {"model_type": "bert"},
        "2_Dense/model.safetensors": ones("linear.weight"),
    }  # fmt: skip
    model = open_checkpoint(laid(tmp_path, files))
    assert set(model.tensors) == {"encoder.weight", "2_Dense/linear.weight"}
    assert model.config == {"model_type": "bert"}
    assert model.folders[0].name == "0_Transformer"


def test_weights_of_a_module_that_cannot_be_read_are_told(tmp_path):
    files = {name: content for name, content in FLAT.items() if name != "2_Dense/model.safetensors"}
    model = open_checkpoint(laid(tmp_path, files | {"2_Dense/tf_model.h5": b"\x89HDF" + b"0" * 60}))
    assert "2_Dense/tf_model.h5" in model.side_files
    assert any("2_Dense/tf_model.h5: copied" in note and "not merged" in note for note in model.left_out)


def test_a_module_that_no_expert_has_is_copied(tmp_path):
    base = open_checkpoint(laid(tmp_path / "base", FLAT))
    plain = open_checkpoint(laid(tmp_path / "plain", {"model.safetensors": ones("encoder.weight", value=2)}))
    kept, experts, notes = same_folders(base, {"e": plain})
    assert experts == [plain]
    assert set(kept.tensors) == {"encoder.weight"}
    assert "2_Dense/model.safetensors" in kept.side_files
    assert "2_Dense/" in notes[0]
    assert "not merged" in notes[0]
    assert same_folders(base, {"e": base, "f": plain}) == (base, [base, plain], [])
    assert same_folders(plain, {"e": base}) == (plain, [base], [])  # its tensors are told of as others that are extra


def test_a_folder_of_an_expert_that_the_base_lacks_is_left_out_and_told(tmp_path):
    plain = open_checkpoint(laid(tmp_path / "plain", {"model.safetensors": ones("a")}))
    files = {"model.safetensors": ones("a"), "reward/model.safetensors": ones("score")}
    expert = open_checkpoint(laid(tmp_path / "more", files))
    assert set(expert.tensors) == {"a", "reward/score"}
    _, (kept,), (note,) = same_folders(plain, {"e": expert})
    assert set(kept.tensors) == {"a"}
    assert "expert 'e': reward/: not merged" in note


def test_components_of_a_pipeline_are_read(tmp_path):
    stem = "diffusion_pytorch_model"
    model = open_checkpoint(laid(tmp_path, {
        "model_index.json": {"_class_name": "P"}, "scheduler/scheduler_config.json": {},
        f"unet/{stem}-1.safetensors": ones("conv_in.weight"),
        f"unet/{stem}.safetensors.index.json": index({"conv_in.weight": f"{stem}-1.safetensors"}),
        f"vae/{stem}.safetensors": ones("decoder.weight"), f"vae/{stem}.fp16.safetensors": ones("decoder.weight"),
        "text_encoder/model.safetensors": ones("shared.weight"), "text_encoder/config.json": {"model_type": "t5"},
    }))  # fmt: skip
    assert set(model.tensors) == {"unet/conv_in.weight", "vae/decoder.weight", "text_encoder/shared.weight"}
    assert model.ties["text_encoder/encoder.embed_tokens.weight"] == "text_encoder/shared.weight"
    assert {folder.name: folder.stem for folder in model.folders} == {
        "text_encoder": "model", "unet": stem, "vae": stem
    }  # fmt: skip
    assert any("fp16" in note for note in model.notes)


def test_two_encoders_of_one_kind_are_both_read(tmp_path):
    files = {f"{n}_Transformer/model.safetensors": ones("encoder.weight", value=n) for n in range(2)}
    model = open_checkpoint(laid(tmp_path, files | {"modules.json": modules("0_Transformer", "1_Transformer")}))
    assert set(model.tensors) == {"encoder.weight", "1_Transformer/encoder.weight"}


def test_heads_that_a_merge_has_exported_are_not_part_of_its_output(tmp_path):
    model = open_checkpoint(laid(tmp_path, {"model.safetensors": ones("a"), "heads/x.safetensors": ones("score")}))
    assert set(model.tensors) == {"a"}
    assert any("heads/x.safetensors" in note for note in model.left_out)


def test_a_folder_with_a_model_of_another_kind_is_part_of_it(tmp_path):
    model = open_checkpoint(laid(tmp_path, {"model.safetensors": ones("a"), "vocoder/model.safetensors": ones("b")}))
    assert set(model.tensors) == {"a", "vocoder/b"}


@pytest.mark.parametrize("turned", [False, True])
def test_a_pipeline_and_a_component_do_not_fit(tmp_path, turned):
    unet = ones("conv_in.weight")
    files = {"model_index.json": {}, "unet/model.safetensors": unet, "vae/model.safetensors": ones("x")}
    whole = open_checkpoint(laid(tmp_path / "whole", files))
    single = open_checkpoint(laid(tmp_path / "single", {"model.safetensors": unet}))
    base, expert = (single, whole) if turned else (whole, single)
    who = "the base" if turned else "expert 'e'"
    with pytest.raises(CfmergeError, match=rf"{who} .* is one component.*whole/unet, .*whole/vae"):
        check_folders(base, {"e": expert})
    check_folders(whole, {"e": whole})
    check_folders(single, {"e": single})


@pytest.mark.parametrize("name", ["original", "checkpoint-20", "again", "lora"])
def test_folders_with_another_version_of_the_model_are_not_part_of_it(tmp_path, name):
    extra = {f"{name}/model.safetensors": ones("encoder.weight"), f"{name}/vocab.txt": "x"}
    if name == "lora":
        extra = {"lora/adapter_model.safetensors": ones("encoder.lora_A.weight"), "lora/adapter_config.json": {}}
    model = open_checkpoint(laid(tmp_path, {"model.safetensors": ones("encoder.weight"), **extra}))
    assert set(model.tensors) == {"encoder.weight"}
    assert any(name in note for note in model.left_out)
    assert f"{name}/vocab.txt" not in model.side_files


def test_a_folder_of_models_is_no_model(tmp_path):
    laid(tmp_path, {"a/model.safetensors": ones("x"), "b/model.safetensors": ones("x")})
    with pytest.raises(CfmergeError, match=r"in its folders a, b; name the one"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '[{"idx": 0}, 3]'])
def test_broken_modules(tmp_path, content):
    laid(tmp_path, {"model.safetensors": ones("x"), "modules.json": content})
    with pytest.raises(CfmergeError, match=r"modules\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("format", ["orbax", "distributed"])
def test_several_folders_are_not_written_as_one_checkpoint(tmp_path, format):
    base = laid(tmp_path / "base", FLAT)
    with pytest.raises(CfmergeError, match=rf"{format} is one directory .* its own directory, 2_Dense; write one of"):
        cfmerge.convert(base, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
