"""Settings of tiny configs that no rule of `coverage_models` finds, by model type."""

from typing import Any

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
_WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2], "input_size": 1, "d_model": 32}
_NECK = {"image_size": 32, "patch_size": 8}
_TEXT = "text_config"

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {_TEXT: {"moe_num_shared_experts": 1}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "dots1": {"n_routed_experts": 4, "moe_intermediate_size": 48, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n": {
        _TEXT: {"intermediate_size": [48, 48], "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]}
    },
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16}, "context_size": 16},
    "granite_speech5_encoder": {"context_size": 16},
    "mistral4": {"head_dim": 32},
    "owlv2": {_TEXT: {"max_position_embeddings": 64}},
    "owlvit": {_TEXT: {"max_position_embeddings": 64}},
    "qwen4_exp_text": {"num_attention_heads": 4, "head_dim": 16},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "wav2vec2-bert": {"vocab_size": 99},
    "wav2vec2-conformer": {"vocab_size": 99},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba2": {"mamba_expand": 2, "n_mamba_heads": 8, "mamba_headdim": 16, "use_mem_eff_path": False},
    "autoformer": {**_SERIES, "moving_average": 3},
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": {"<image>": 81}},
    "codegen": {"rotary_dim": 4},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
    "deepseek_v2": {"topk_method": "greedy", "first_k_dense_replace": 1},
    "donut-swin": _WINDOWS,
    "emu3": {_TEXT: {}, "vocabulary_map": {"<image>": 81}},
    "esm": {"vocab_size": 99, "mask_token_id": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": {
        "intermediate_size": [48, 48],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "informer": _SERIES,
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "maskformer-swin": _WINDOWS,
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "expand": 2},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 5]},
    "swin": _WINDOWS,
    "swin2sr": {**_WINDOWS, "embed_dim": 16},
    "swinv2": _WINDOWS,
    "time_series_transformer": _SERIES,
}
