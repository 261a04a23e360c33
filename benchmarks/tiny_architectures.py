"""Tiny random models of the architectures that transformers has, made from its own default configurations, with no network.

A default configuration is shrunk by the names of its fields: they say the same things in nearly all of them. What does not fit
such a size is set in OWN.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 408
MAX_POSITIONS = 256
LAYERS = 4

LAYER_COUNTS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
]

# Fields by their size, whatever the architecture; an integer that is smaller already stays. The layers are LAYERS.
_FIELDS = {
    VOCABULARY: """
        vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size
    """,
    MAX_POSITIONS: """
        max_position_embeddings n_positions n_ctx max_target_positions max_source_positions max_seq_len
        model_max_length seq_length context_length
    """,
    64: """
        mamba_d_ssm original_max_position_embeddings
    """,
    48: """
        intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size dff dim_ff
        shared_expert_intermediate_size ffn_hidden_size shared_intermediate_size intermediate_size_mlp
        expert_ffn_hidden_size dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size
        shared_experts_intermediate_size
    """,
    32: """
        hidden_size n_embd d_model dim input_embedding_size embedding_size lru_width emb_dim attention_hidden_size
        embedding_dim word_embed_proj_dim output_embedding_size
    """,
    16: """
        qk_head_dim mamba_d_head mamba_head_dim mamba_headdim
    """,
    8: """
        head_dim v_head_dim linear_value_head_dim linear_key_head_dim linear_head_dim kv_channels d_head dim_head
        index_head_dim qk_nope_head_dim qk_rope_head_dim attention_head_dim swa_head_dim global_head_dim
        attention_head_size kv_lora_rank q_lora_rank o_lora_rank rotary_dim sliding_window local_attention
        attention_window_size window_size sliding_window_size attention_chunk_size hidden_size_per_layer_input
        laurel_rank mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank index_topk
    """,
    4: """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads
        mamba_n_heads mamba_num_heads index_n_heads linear_num_value_heads num_experts num_local_experts
        n_routed_experts moe_num_experts num_blocks
    """,
    2: """
        linear_num_key_heads num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads num_query_groups
        num_experts_per_tok moe_topk moe_k moe_top_k num_experts_per_token
    """,
    1: """
        n_group topk_group num_expert_group mamba_n_groups n_groups mamba_ngroups first_k_dense_replace
    """,
}
SIZES = {
    **dict.fromkeys(LAYER_COUNTS, LAYERS),
    **{name: size for size, names in _FIELDS.items() for name in names.split()},
}

TOKENS = [
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
    "forced_eos_token_id",
    "unk_index",
    "image_token_id",
    "audio_token_id",
    "video_token_id",
]

_LINEAR = ["linear_attention", "hybrid"] * 2
MEDIA = ("image_token_id", "audio_token_id", "video_token_id", "image_token_index", "audio_token_index")

OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": _LINEAR},
    "zamba2": {"n_mamba_heads": 4, "mamba_headdim": 16, "layers_block_type": _LINEAR},
}


def architectures() -> list[str]:
    """The names of all architectures that transformers loads as causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(name: str, **settings: Any) -> PreTrainedConfig:
    """The default configuration of an architecture, shrunk; `settings` come last."""
    kind = CONFIG_MAPPING[name]
    shrunk = _shrunk(kind().to_dict())
    target = shrunk.get("text_config") if isinstance(shrunk.get("text_config"), dict) else shrunk
    for key, value in {**OWN.get(name, {}), **settings}.items():
        target[key] = value
    return kind.from_dict(shrunk)


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(settings)
    layers = {value for name, value in settings.items() if name in LAYER_COUNTS and isinstance(value, int)}
    for name, value in settings.items():
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, dict) and name not in ("id2label", "label2id"):
            made[name] = _shrunk(value)
        elif isinstance(value, int) and name in SIZES:
            made[name] = min(value, SIZES[name]) if value >= 0 else value
        elif name in TOKENS and isinstance(value, int):
            # Tokens that stand for images and sounds are no text: the last of the vocabulary, which nobody asks about.
            made[name] = {"pad_token_id": 0, "eos_token_id": 0}.get(name, VOCABULARY - 1 if name in MEDIA else 1)
        elif name in TOKENS and isinstance(value, list):
            made[name] = [0]
        elif isinstance(value, list) and len(value) in layers:
            made[name] = _sampled(value)
    if "kv_lora_rank" in made and isinstance(made.get("num_key_value_heads"), int):
        made["num_key_value_heads"] = made["num_attention_heads"]  # latent attention has a key for each head
    made.pop("per_layer_config", None)
    return made


def _sampled(values: list[Any]) -> list[Any]:
    """One setting a layer, for LAYERS of them, with as many different ones as there are."""
    kinds = {str(value): value for value in values}
    if len(kinds) > LAYERS:
        return values[:LAYERS]
    names = sorted((list(kinds) * LAYERS)[:LAYERS], key=list(kinds).index)
    return [kinds[name] for name in names]


def tiny_model(config: PreTrainedConfig, *, seed: int = 1) -> PreTrainedModel:
    """A random model whose logits are spread as widely as a trained model's, so that what changes them is seen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
    return model
