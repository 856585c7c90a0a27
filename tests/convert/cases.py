"""Tiny models that `transformers` builds: for each family its class, and values away from their defaults."""

BERT = {"hidden_size": 33, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 41}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 14, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
ROPE = {"rope_theta": 500.0, "factor": 3.0, "original_max_position_embeddings": 19}
ERNIE = {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 3.0}
WIDE = BERT | {"hidden_size": 48, "max_position_embeddings": 37}
ONE = WIDE | {"num_key_value_heads": 1}
CASES = {  # name: class, configuration
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 33, "n_head": 3, "n_layer": 2, "n_inner": 41, "n_positions": 29}),
    "gpt2 untied": (
        "GPT2LMHeadModel",
        {"n_embd": 22, "n_head": 2, "n_layer": 3, "n_positions": 37, "tie_word_embeddings": False},
    ),
    "bert": ("BertForPreTraining", BERT | {"max_position_embeddings": 37}),
    "bert masked": ("BertForMaskedLM", BERT | {"max_position_embeddings": 37, "hidden_act": "relu"}),
    "bert body": ("BertModel", BERT | {"max_position_embeddings": 37}),
    "roberta": ("RobertaForMaskedLM", BERT | {"max_position_embeddings": 37, "type_vocab_size": 1}),
    "modernbert": (
        "ModernBertForMaskedLM",
        BERT | {"hidden_size": 42, "num_hidden_layers": 5, "local_attention": 6, "max_position_embeddings": 37},
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama linear": ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "llama yarn": ("LlamaForCausalLM", LLAMA | {"rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 2.0}}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {"n_embd": 33, "n_head": 3, "n_layer": 2, "n_positions": 29}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 33, "n_heads": 3, "n_layers": 2, "hidden_dim": 41, "max_position_embeddings": 37},
    ),
    "distilbert body": (
        "DistilBertModel",
        {"dim": 33, "n_heads": 3, "n_layers": 2, "hidden_dim": 41, "max_position_embeddings": 37},
    ),
    "electra": ("ElectraForMaskedLM", BERT | {"embedding_size": 33, "max_position_embeddings": 37}),
    "electra guessing": ("ElectraForPreTraining", BERT | {"embedding_size": 33, "max_position_embeddings": 37}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BERT | {"max_position_embeddings": 37, "type_vocab_size": 1}),
    "camembert": ("CamembertForMaskedLM", BERT | {"max_position_embeddings": 37, "type_vocab_size": 1}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 7}),
    "mistral whole": ("MistralForCausalLM", LLAMA | {"sliding_window": None}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA),
    "phi3": ("Phi3ForCausalLM", BERT | LLAMA | {"hidden_size": 42, "head_dim": 14, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", ONE),
    "olmo2": ("Olmo2ForCausalLM", WIDE),
    "smollm3": ("SmolLM3ForCausalLM", ONE | {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    "ernie4_5": ("Ernie4_5ForCausalLM", LLAMA | {"rms_norm_eps": 1e-4, "tie_word_embeddings": False} | ERNIE),
    "ernie4_5 biased": ("Ernie4_5ForCausalLM", LLAMA | {"use_bias": True}),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        LLAMA
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"sliding_window": 5, "query_pre_attn_scalar": 23},
    ),
    "gemma3_text capped": ("Gemma3ForCausalLM", LLAMA | {"final_logit_softcapping": 0.75}),
    "gemma2": (
        "Gemma2ForCausalLM",
        LLAMA
        | {"num_hidden_layers": 3, "sliding_window": 5, "query_pre_attn_scalar": 23}
        | {"attn_logit_softcapping": 0.25, "final_logit_softcapping": 1.5},
    ),
    "gemma2 free": (
        "Gemma2ForCausalLM",
        LLAMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", ONE | {"sliding_window": 5}),
    "gpt_neox": ("GPTNeoXForCausalLM", WIDE),
    "gpt_neox in turn": ("GPTNeoXForCausalLM", WIDE | {"use_parallel_residual": False}),
    "gptj": ("GPTJForCausalLM", {"n_embd": 42, "n_head": 3, "n_layer": 2, "n_positions": 29, "rotary_dim": 6}),
    "phi": ("PhiForCausalLM", ONE),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 33, "num_attention_heads": 3, "num_hidden_layers": 2, "ffn_dim": 41}
        | {"max_position_embeddings": 37, "word_embed_proj_dim": 33},
    ),
}
CASES |= {
    "electra small": ("ElectraForMaskedLM", BERT | {"embedding_size": 14, "max_position_embeddings": 37}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 33, "n_head": 3, "n_layer": 2, "seq_length": 37}),
    "albert": (
        "AlbertForPreTraining",
        BERT | {"embedding_size": 14, "num_hidden_layers": 3, "max_position_embeddings": 37},
    ),
    "albert body": ("AlbertModel", BERT | {"embedding_size": 33, "max_position_embeddings": 37, "hidden_act": "relu"}),
    "mpnet": ("MPNetForMaskedLM", BERT | {"max_position_embeddings": 37}),
}
CASES |= {
    "modernbert-decoder": (
        "ModernBertDecoderForCausalLM",
        BERT | {"hidden_size": 42, "num_hidden_layers": 5, "local_attention": 6, "max_position_embeddings": 37},
    ),
    "modernbert-decoder untied": (
        "ModernBertDecoderForCausalLM",
        BERT
        | {"hidden_size": 42, "tie_word_embeddings": False, "decoder_bias": False, "layer_types": ["full_attention"] * 2},
    ),
    "eurobert": ("EuroBertForMaskedLM", LLAMA),
    "eurobert tied": ("EuroBertForMaskedLM", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "nomic_bert": (
        "NomicBertForMaskedLM",
        WIDE | {"type_vocab_size": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "nomic_bert body": ("NomicBertModel", WIDE | {"hidden_act": "gelu", "head_dim": 14}),
}
FALCON = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "ffn_hidden_size": 41}
FALCON |= {"max_position_embeddings": 37, "layer_norm_epsilon": 1e-4}
GROUPS = {
    "new_decoder_architecture": True,
    "num_kv_heads": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
CASES |= {  # as 7B is built, and 40B, 11B; and one sub-layer after the other
    "falcon": ("FalconForCausalLM", FALCON),
    "falcon groups": ("FalconForCausalLM", FALCON | GROUPS),
    "falcon groups one norm": ("FalconForCausalLM", FALCON | GROUPS | {"num_ln_in_parallel_attn": 1}),
    "falcon in turn": (
        "FalconForCausalLM",
        FALCON | {"parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False},
    ),
}
STABLELM = WIDE | {"num_key_value_heads": 1, "layer_norm_eps": 1e-4, "use_qkv_bias": True}
PART = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.375}}
STABLELM |= PART
NEMOTRON = WIDE | PART | {"num_key_value_heads": 1, "head_dim": 32, "norm_eps": 1e-4}
NEMOTRON |= {"intermediate_size": 23}  # of wider ones, sums of squares are beyond 1e-4 in float32, theirs too
CASES |= {
    "stablelm": ("StableLmForCausalLM", STABLELM),
    "stablelm parallel": (
        "StableLmForCausalLM",
        STABLELM | {"use_parallel_residual": True, "use_qkv_bias": False, "tie_word_embeddings": True},
    ),
    "nemotron": ("NemotronForCausalLM", NEMOTRON),
    "nemotron biased": (
        "NemotronForCausalLM",
        NEMOTRON | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True},
    ),
}
SIDES = {"d_model": 36, "max_position_embeddings": 37, "activation_function": "silu", "scale_embedding": True}
SIDES |= {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in (("layers", 2), ("attention_heads", 3))}
SIDES |= {"encoder_ffn_dim": 41, "decoder_ffn_dim": 41}
T5 = {"d_model": 33, "d_kv": 14, "d_ff": 41, "num_layers": 2, "num_heads": 3, "relative_attention_num_buckets": 10}
T5 |= {"relative_attention_max_distance": 13, "layer_norm_epsilon": 1e-5}
CASES |= {
    "bart": ("BartForConditionalGeneration", SIDES),
    "mbart": ("MBartForConditionalGeneration", SIDES | {"activation_function": "gelu"}),
    "marian": ("MarianMTModel", SIDES),
    "pegasus": ("PegasusForConditionalGeneration", SIDES | {"activation_function": "relu"}),
    "m2m_100": ("M2M100ForConditionalGeneration", SIDES | {"activation_function": "relu"}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 untied": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", T5 | {"tie_word_embeddings": False}),
}
SPECIAL_IDS = {
    "modernbert": {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    "modernbert-decoder": {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    "eurobert": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4},
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
    "t5": {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    "mt5": {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    **{
        name: {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        for name in ("bart", "mbart", "marian", "pegasus", "m2m_100")
    },
    **{
        name: {"bos_token_id": 0, "eos_token_id": 1}
        for name in ("llama", "mistral", "qwen3", "gptj", "phi", "gpt_neox", "bloom", "falcon", "stablelm", "nemotron")
    },
    **{
        name: {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        for name in (
            "phi3",
            "qwen2",
            "olmo2",
            "smollm3",
            "ernie4_5",
            "gemma",
            "gemma2",
            "gemma3_text",
            "starcoder2",
            "opt",
        )
    },
}
