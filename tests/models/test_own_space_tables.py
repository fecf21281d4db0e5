"""Tables of permutation spaces: which one a model has, users' own, and what is said where one does not fit."""

import re

import pytest

from cfmerge.errors import CfmergeError
from cfmerge.models.space_tables import describe, read_table, spaces_of, write_table
from cfmerge.models.spaces import parse_spaces

CONFIG = {"model_type": "bert", "num_attention_heads": 4}
MLP = {
    "sizes": {"mlp{l}": 6},
    "spaces": {"blocks.{l}.up.{x=weight}": "mlp{l}, in hidden", "blocks.{l}.down.weight": "hidden, in mlp{l}"},
    "fixed": ["rope.cache"],
}
REST = "  blocks.{l}.down.weight: hidden, in mlp{l}\nfixed: [rope.cache]"
BLOCKS = {"blocks.0.up.weight": (6, 4), "blocks.0.down.weight": (4, 6), "rope.cache": (3, 4)}


def bert(prefix="bert.", hidden=16):
    """The tensors of a BERT, less its norms."""
    headers = {f"{prefix}embeddings.word_embeddings.weight": (20, hidden), f"{prefix}embeddings.position_ids": (1, 9)}
    for layer in range(2):
        at = f"{prefix}encoder.layer.{layer}."
        for part in ("query", "key", "value"):
            headers[f"{at}attention.self.{part}.weight"] = (hidden, hidden)
        headers[f"{at}attention.output.dense.weight"] = (hidden, hidden)
        headers |= {f"{at}intermediate.dense.weight": (24, hidden), f"{at}output.dense.weight": (hidden, 24)}
    return headers


def llama(layers=1):
    headers = {"model.embed_tokens.weight": (20, 16), "model.rotary_emb.inv_freq": (4,)}
    for layer in range(layers):
        at = f"model.layers.{layer}.self_attn."
        headers |= {f"{at}q_proj.weight": (32, 16), f"{at}k_proj.weight": (16, 16), f"{at}v_proj.weight": (16, 16)}
        headers |= {f"{at}o_proj.weight": (16, 32)}
    return headers


def refused(headers, config, *said, table=None):
    with pytest.raises(CfmergeError) as error:
        describe(headers, config, table and read_table(table))
    for text in said:
        assert text in str(error.value)


@pytest.fixture
def file(tmp_path):
    """Writes a table, and gives its path."""

    def write(text):
        (tmp_path / "own.yaml").write_text(text)
        return tmp_path / "own.yaml"

    return write


# --- which table a model has ------------------------------------------------------------------------------------


def test_names_alone_tell_the_family_of_a_config_without_a_model_type():
    assert spaces_of(bert(), {"num_attention_heads": 4}) == spaces_of(bert(), CONFIG)
    assert describe(bert(), {"num_attention_heads": 4}).table == "bert"


def test_buffers_do_not_permute():
    assert spaces_of(bert(), CONFIG).table()["bert.embeddings.position_ids"] == "-, -"
    headers = {
        "h.0.attn.bias": (1, 1, 9, 9),
        "h.0.attn.masked_bias": (),
        "wte.weight": (5, 8),
        "lm_head.weight": (5, 8),
    }
    table = spaces_of(headers, {"model_type": "gpt2"}).table()
    assert table["h.0.attn.bias"] == "-, -, -, -"
    assert table["h.0.attn.masked_bias"] == ""


def test_a_model_of_another_type_is_refused_though_its_names_are_known():
    """RoFormer has BERT's names, and rotates its queries and keys."""
    refused(bert(), {**CONFIG, "model_type": "roformer"}, "type 'roformer'", "names are those of table 'bert'",
            "`spaces: FILE`")  # fmt: skip


def test_a_model_without_a_table_is_told_its_first_tensors_the_families_and_the_way_out():
    headers = {f"trunk.{number}.weight": (4, 4) for number in range(7)} | {"top.weight": (3, 4)}
    refused(
        headers, {}, "no line for trunk.{0..6}.weight (7 tensors), top.weight", "bert, distilbert", "`spaces: FILE`"
    )


def test_a_model_that_has_no_name_of_a_table_is_told_of_no_nearest_one():
    with pytest.raises(CfmergeError) as told:
        describe({"conv_a.weight": (4, 1, 3, 3), "lin.weight": (3, 64)}, {})
    assert "chain_spaces" in str(told.value)
    assert "nearest" not in str(told.value)
    assert "like:" not in str(told.value)


def test_a_misspelt_line_is_told_beside_the_tensor_without_one():
    table = read_table({"spaces": {"up.weight": "h, in -", "dwon.weight": "-, in h"}})
    with pytest.raises(CfmergeError, match=r"no line for down\.weight(.|\n)*dwon\.weight.*no tensor"):
        describe({"up.weight": (4, 3), "down.weight": (2, 4)}, {}, table)


def test_a_table_that_was_written_holds_for_the_files_of_an_nnx_state(tmp_path):
    shapes = {"up/kernel": (3, 4), "up/bias": (4,), "down/kernel": (4, 2)}
    spaces = parse_spaces({"up/kernel": "in -, h", "up/bias": "h", "down/kernel": "in h, -"}, shapes)
    write_table(spaces, tmp_path / "own.yaml")
    table = read_table(tmp_path / "own.yaml")
    assert describe(shapes, {}, table).spaces.table() == spaces.table()
    of_orbax = describe({f"{name}/value": shape for name, shape in shapes.items()}, {}, table)
    assert of_orbax.spaces.table() == {f"{name}/value": line for name, line in spaces.table().items()}
    assert not of_orbax.notes


def test_a_table_of_heads_that_was_written_is_the_same_again(tmp_path):
    spaces = spaces_of(llama(), {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2,
                                 "hidden_size": 16, "head_dim": 8})  # fmt: skip
    write_table(spaces, tmp_path / "own.yaml")
    assert describe(llama(), {}, read_table(tmp_path / "own.yaml")).spaces == spaces


def test_a_model_with_tensors_more_than_its_table_is_refused():
    refused({**bert(), "bert.encoder.layer.0.adapter.up.weight": (3, 16)}, CONFIG,
            "'bert', has no line for bert.encoder.layer.0.adapter.up.weight", "`like: bert`")  # fmt: skip


def test_two_towers_of_one_family_are_not_one_model():
    refused({**bert("question."), **bert("answer.")}, CONFIG, "no line for")
    refused({**bert("bert."), **bert("")}, CONFIG, "would be one tensor 'embeddings.word_embeddings.weight'")


def test_the_modules_of_sentence_transformers_read_the_hidden_states():
    headers = {**bert("0_Transformer/"), "2_Dense/linear.weight": (5, 16), "2_Dense/linear.bias": (5,)}
    headers |= {"3_Dense/linear.weight": (6, 5)}
    table = spaces_of(headers, CONFIG).table()
    assert table["0_Transformer/encoder.layer.0.output.dense.weight"] == "hidden, in mlp0"
    assert [table[f"{number}_Dense/linear.weight"] for number in (2, 3)] == ["-, in hidden", "-, -"]


# --- sizes ------------------------------------------------------------------------------------------------------


def test_a_bare_file_does_not_tell_its_heads_and_a_table_of_three_lines_does(file):
    refused(bert(), {}, "size of 'heads0'", "no config.json", "    like: bert\n    sizes:\n      heads{l}: NUMBER")
    table = read_table(file("like: bert\nsizes:\n  heads{l}: 4\n"))
    assert table.spaces(bert(), {}).spaces == spaces_of(bert(), CONFIG)


def test_all_sizes_that_a_config_lacks_are_told():
    refused(llama(), {"model_type": "llama", "hidden_size": 16}, "which does not tell it", "kv{l}: NUMBER",
            "kv{l}.q: NUMBER", "head_dim: NUMBER")  # fmt: skip


def test_heads_that_do_not_divide_the_axis_are_refused():
    refused(bert(), {**CONFIG, "num_attention_heads": 5}, "axis 0 has 16 elements", "heads0=5",
            "'bert.encoder.layer.0.attention.self.query.weight'")  # fmt: skip
    heads = {"model_type": "llama", "num_attention_heads": 4, "head_dim": 8}
    refused(llama(), {**heads, "num_key_value_heads": 3}, "num_attention_heads / num_key_value_heads",
            "4 is no multiple of 3")  # fmt: skip
    refused(llama(), {**heads, "num_key_value_heads": 4}, "k_proj", "axis 0 has 16 elements", "kv0=4")


def test_a_config_without_key_value_heads_has_one_for_each_head():
    headers = {**llama(), **dict.fromkeys(["model.layers.0.self_attn.q_proj.weight"], (16, 16)),
               "model.layers.0.self_attn.o_proj.weight": (16, 16)}  # fmt: skip
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": None, "hidden_size": 16}
    sizes = spaces_of(headers, config).sizes
    assert (sizes["kv0"], sizes["kv0.q"], sizes["kv0.v"]) == (2, 1, 8)


# --- spaces that end ----------------------------------------------------------------------------------------------


def test_a_space_that_nothing_reads_is_an_output_and_keeps_its_order():
    headers = {**bert(), "bert.pooler.dense.weight": (16, 16), "bert.pooler.dense.bias": (16,)}
    described = describe(headers, CONFIG)
    assert "pooler" not in described.spaces.sizes
    assert described.notes == (
        "spaces: 'pooler' of 'bert.pooler.dense.weight' is read by no tensor, so that it is an output and keeps its "
        "order",
    )
    described = describe({**headers, "classifier.weight": (2, 16)}, CONFIG)
    assert described.spaces.sizes["pooler"] == 16
    assert not described.notes


def test_spaces_of_one_kind_that_end_are_told_once():
    table = {"spaces": {"blocks.{l}.up": "mpl{l}, in hidden", "blocks.{l}.down": "hidden, in mlp{l}"}}
    headers = {f"blocks.{layer}.{name}": (4, 4) for layer in range(9) for name in ("up", "down")}
    described = describe(headers, {}, read_table(table))
    assert described.spaces.sizes == {"hidden": 4}
    assert described.notes == (
        "spaces: 'mpl{0..8}' (9 spaces, such as that of 'blocks.0.up') is read by no tensor, so that it is an output "
        "and keeps its order",
        "spaces: 'mlp{0..8}' (9 spaces, such as that of 'blocks.0.down') is written by no tensor, so that it is an "
        "input and keeps its order",
    )


def test_a_token_classifier_does_not_read_the_pooler_of_its_old_file():
    headers = {**bert(), "bert.pooler.dense.weight": (16, 16), "classifier.weight": (2, 16)}
    table = spaces_of(headers, {**CONFIG, "architectures": ["BertForTokenClassification"]}).table()
    assert table["classifier.weight"] == "-, in hidden"
    assert table["bert.pooler.dense.weight"] == "-, in hidden"


# --- users' own ---------------------------------------------------------------------------------------------------


def test_a_table_is_read_from_a_file_or_a_mapping(file):
    path = file("""
sizes:
  mlp{l}: 6
spaces:
  blocks.{l}.up.{x=weight}: mlp{l}, in hidden
  blocks.{l}.down.weight: hidden, in mlp{l}
fixed: [rope.cache]
""")
    spaces = read_table(path).spaces(BLOCKS, {}).spaces
    assert spaces == read_table(MLP).spaces(BLOCKS, {}).spaces
    assert spaces.table() == {
        "blocks.0.up.weight": "mlp0, in hidden", "blocks.0.down.weight": "hidden, in mlp0", "rope.cache": "-, -",
    }  # fmt: skip


def test_lines_of_ones_own_stand_before_those_of_the_table_that_they_go_on_from():
    headers = {**bert(), "bert.encoder.layer.0.adapter.up.weight": (3, 16),
               "bert.encoder.layer.0.adapter.down.weight": (16, 3)}  # fmt: skip
    lines = {
        "encoder.layer.{l}.adapter.up.weight": "adapter{l}, in hidden",
        "bert.encoder.layer.{l}.adapter.down.weight": "hidden, in adapter{l}",
        "encoder.layer.1.intermediate.dense.weight": "-, in hidden",
        "encoder.layer.1.output.dense.weight": "hidden, in -",
        "encoder.layer.{l}.nothing.weight": "hidden",
    }
    described = describe(headers, CONFIG, read_table({"like": "bert", "spaces": lines}))
    assert described.spaces.sizes["adapter0"] == 3
    assert "mlp1" not in described.spaces.sizes
    assert described.notes == ("spaces: the table of spaces: 'encoder.layer.{l}.nothing.weight' holds for no tensor",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"spaces:\n  blocks.{{l}}.up.weight: mlp{{l}}, in hidden 3\n{REST}",
         ["line 2", "blocks.{l}.up.weight", "'blocks.0.up.weight'", "axis 1 has 4 elements"]),
        (f"spaces:\n  blocks.{{l}}.up.weight: mlp{{m}}, in -\n{REST}",
         ["line 2", "'blocks.0.up.weight'", "{m} is neither"]),
        (f"spaces:\n  blocks.{{l}}.up.weight: mlp in hidden\n{REST}",
         ["line 2", "'blocks.0.up.weight'", "is no axis"]),
        ("spaces:\n  blocks.{l}.up.weight: mlp{l}, in -",
         ["no line for blocks.0.down.weight, rope.cache", "blocks.0.down.weight: -, -"]),
        ("spaces:\n  a.weight: mlp\n  a.weight: mlp", ["line 3", "'a.weight' stands there already", "line 2"]),
        ("spaces:\n  a.{l.weight: mlp", ["line 2", "'a.{l.weight' is no pattern"]),
        ("spaces:\n  a.weight: -", ["line 2", "in quotes, '-'"]),
        ("spaces:\n  a.weight: [mlp]", ["line 2", "axes of a tensor are a text"]),
        ("spaces: mlp", ["line 1", "'spaces' is a mapping"]),
        ("space:\n  a.weight: mlp", ["line 1", "did you mean 'spaces'?"]),
        ("like: brt", ["line 1", "did you mean 'bert'?"]),
        ("sizes:\n  h: 3 + 4\nspaces:\n  a.weight: h", ["line 2", "found '3 + 4'"]),
        ("sizes:\n  h: 3", ["has no lines"]),
        ("- a", ["is no table"]),
    ],
)  # fmt: skip
def test_a_wrong_table_is_told_with_its_file_and_line(file, text, said):
    path = file(text)
    refused(BLOCKS, {}, str(path), *said, table=path)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CfmergeError, match=re.escape(f"{tmp_path / 'none.yaml'}: cannot be read")):
        read_table(tmp_path / "none.yaml")
