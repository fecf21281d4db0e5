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

FAMILIES = {
    "llama3": Family("tunix", table(DECODER), SIZES),
    "qwen2": Family("tunix", table(DECODER + QWEN2), SIZES),
    "qwen3": Family("tunix", table(DECODER + QWEN3), SIZES),
}
