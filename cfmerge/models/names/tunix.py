"""The names of tunix's models (0.1.7), beside Hugging Face's."""

from cfmerge.models.names.rules import Family, table

SIZES = {"d": "hidden_size", "n": "num_attention_heads", "k": "num_key_value_heads", "h": "head_dim"}

DECODER = """
    model.embed_tokens.weight                                  <-> embedder/input_embedding
    model.layers.{l}.self_attn.q_proj.weight                   <-> layers/{l}/attn/q_proj/w : (n h) d -> d n h
    model.layers.{l}.self_attn.{x=k|v}_proj.weight             <-> layers/{l}/attn/{x}_proj/w : (k h) d -> d k h
    model.layers.{l}.self_attn.o_proj.weight                   <-> layers/{l}/attn/o_proj/w : d (n h) -> n h d
    model.layers.{l}.mlp.{x=gate|up}_proj.weight               <-> layers/{l}/mlp/{x}_proj/kernel : f d -> d f
    model.layers.{l}.mlp.down_proj.weight                      <-> layers/{l}/mlp/down_proj/kernel : d f -> f d
    model.layers.{l}.{x=input|post_attention}_layernorm.weight <-> layers/{l}/{x}_layernorm/w
    model.norm.weight                                          <-> final_norm/w
    lm_head.weight                                             <-> lm_head/w : v d -> d v
"""
QWEN2 = """
    model.layers.{l}.self_attn.{x=q|k|v}_proj.bias             <-> layers/{l}/attn/{x}_bias
"""
QWEN3 = """
    model.layers.{l}.self_attn.{x=q|k}_norm.weight             <-> layers/{l}/attn/{x}_norm/w
    model.layers.{l}.mlp.gate.weight                           <-> layers/{l}/mlp/router/kernel : e d -> d e
    model.layers.{l}.mlp.experts.{e}.{x=gate|up}_proj.weight   <-> layers/{l}/mlp/{x}_proj : f d -> e d f
    model.layers.{l}.mlp.experts.{e}.down_proj.weight          <-> layers/{l}/mlp/down_proj : d f -> e f d
"""

GEMMA = """
    model.embed_tokens.weight                                  <-> embedder/input_embedding
    model.layers.{l}.self_attn.o_proj.weight                   <-> layers/{l}/attn/attn_vec_einsum/w : d (n h) -> n h d
    model.layers.{l}.mlp.{x=gate|up}_proj.weight               <-> layers/{l}/mlp/{x}_proj/kernel : f d -> d f
    model.layers.{l}.mlp.down_proj.weight                      <-> layers/{l}/mlp/down_proj/kernel : d f -> f d
    model.layers.{l}.input_layernorm.weight                    <-> layers/{l}/pre_attention_norm/scale
    model.layers.{l}.{x=pre|post}_feedforward_layernorm.weight <-> layers/{l}/{x}_ffw_norm/scale
    model.norm.weight                                          <-> final_norm/scale
"""
APART = """
    model.layers.{l}.self_attn.q_proj.weight                   <-> layers/{l}/attn/q_einsum/w : (n h) d -> n d h
    model.layers.{l}.self_attn.{s=k|v}_proj.weight             <-> layers/{l}/attn/kv_einsum/w : (k h) d -> s k d h
"""
ALIKE = """
    model.layers.{l}.self_attn.{s=q|k|v}_proj.weight           <-> layers/{l}/attn/qkv_einsum/w : (n h) d -> s n d h
"""
GEMMA2 = """
    model.layers.{l}.post_attention_layernorm.weight           <-> layers/{l}/post_attn_norm/scale
"""
GEMMA3 = """
    model.layers.{l}.post_attention_layernorm.weight           <-> layers/{l}/post_attention_norm/scale
    model.layers.{l}.self_attn.q_norm.weight                   <-> layers/{l}/attn/_query_norm/scale
    model.layers.{l}.self_attn.k_norm.weight                   <-> layers/{l}/attn/_key_norm/scale
"""


def gemma(norms: str) -> Family:
    return Family("tunix", table(GEMMA + norms + APART), SIZES, alike=table(GEMMA + norms + ALIKE))


FAMILIES = {
    "llama3": Family("tunix", table(DECODER), SIZES),
    "qwen2": Family("tunix", table(DECODER + QWEN2), SIZES),
    "qwen3": Family("tunix", table(DECODER + QWEN3), SIZES),
    "gemma2": gemma(GEMMA2),
    "gemma3": gemma(GEMMA3),
}
