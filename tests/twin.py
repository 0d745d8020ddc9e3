"""transformers' model with the weights that a loaded model's blocks stand for."""

import numpy as np
import torch
import transformers

from tinyllama.config import tensor_names


def twin(llama) -> transformers.LlamaForCausalLM:
    """In float32; its attention gives its weights, too."""
    c = llama.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_seq_len,
        tie_word_embeddings="output.weight" not in llama.checkpoint.tensors,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    model.load_state_dict(_their_weights(llama), strict=False)
    return model


def _their_weights(llama) -> dict[str, torch.Tensor]:
    weights, tensors = {}, llama.checkpoint.tensors
    for meta, _, hugging_face in tensor_names(llama.config.n_layers):
        if meta in tensors:
            array = tensors[meta].dequantize()
            if ".wq." in meta or ".wk." in meta:
                array = _halves(array, llama.config.head_dim)
            weights[hugging_face] = torch.tensor(array)
    return weights


def _halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Meta's rows, where neighbours are a pair of RoPE, in transformers' order: all firsts, all seconds."""
    n_out, n_in = weight.shape
    pairs = weight.reshape(n_out // head_dim, head_dim // 2, 2, n_in)
    return pairs.swapaxes(1, 2).reshape(n_out, n_in)
