"""What isn't supported, by name, and what it would need: for errors that say so in one line."""

import re

from ..config import FAMILIES

EXPERTS = "a mixture of experts: a router, and several feed-forward layers in place of each one"
COMPRESSED = f"{EXPERTS}; and keys and values that are compressed (MLA)"
STATES = "layers with a state in place of attention"
PICTURES = "a second model that turns pictures or sound into embeddings"
LAYER_NORMS = "LayerNorm, and a feed-forward layer without a gate"
SIDE_BY_SIDE = "attention and feed-forward layers side by side, and LayerNorm"
GEMMA = "norms that multiply by 1 + weight, GELU, and embeddings that are scaled"
GRANITE = "scales of the embeddings, the residual stream, the attention and the logits"

#: What architectures would need: GGUF's names of them and Hugging Face's model_types, in small letters and
#: digits alone. A name is of the kind that it begins with; of several, the longest.
NEEDS = {
    EXPERTS: "mixtral grok dbrx arctic olmoe phimoe qwen2moe qwen3moe glm4moe ernie45moe bailing dots1",
    COMPRESSED: "deepseek2 deepseekv2 deepseek3 deepseekv3 mistral4 kimi",
    f"{EXPERTS}; layers without RoPE, and attention in chunks": "llama4",
    f"{EXPERTS}; attention sinks, and windows in every other layer": "gptoss openaimoe",
    STATES: "mamba rwkv jamba falconh1 nemotronh recurrentgemma qwen3next qwen35",
    "convolutions in place of attention in most layers": "lfm2",
    PICTURES: "llava mllama qwen2vl qwen25vl qwen3vl pixtral idefics clip siglip internvl paligemma",
    f"{PICTURES}, or queries that grow with their position": "mistral3 ministral3",
    "windows in some layers only": "ministral",
    GEMMA: "gemma",
    f"{GEMMA}; windows in every other layer, and limits of scores and logits": "gemma2",
    f"{GEMMA}; norms of queries and keys, and windows with another RoPE in most layers": "gemma3 gemma4",
    GRANITE: "granite minicpm",
    f"{GRANITE}; {EXPERTS}": "granitemoe",
    f"{GRANITE}; {STATES}": "granitehybrid granitemoehybrid",
    "layers without RoPE, one in four": "smollm3",
    f"RoPE of a part of each head, {LAYER_NORMS}": "phi phi2 gptneox gptj stablelm",
    "one matrix for q, k and v, one for gate and up, and the RoPE scaling longrope": "phi3 phi4",
    "one matrix for q, k and v": "qwen baichuan internlm2",
    "RoPE of a part of each head, and one matrix for gate and up": "glm chatglm nemotron",
    SIDE_BY_SIDE: "cohere commandr falcon plamo",
    f"positions that are learned, {LAYER_NORMS}": "gpt2 opt starcoder",
    f"ALiBi, {LAYER_NORMS}": "bloom mpt",
    LAYER_NORMS: "starcoder2 orion olmo",
    "norms behind each step": "olmo2 olmo3 exaone4",
    "norms of queries and keys behind RoPE": "hunyuan",
    "layers of different widths": "deci openelm",
    "attention in both directions": "bert eurobert modernbert t5 llamaembed llada dream",
    "squared ReLU, and a feed-forward layer without a gate": "arcee",
    "weights of three values": "bitnet",
    "a model beside it, which it steers (--control-vector)": "controlvector",
    "names of their own for its weights": "exaone xverse seedoss apertus",
}
OTHERS = {name: need for need, names in NEEDS.items() for name in names.split()}

#: GGUF's types of blocks that aren't in quant.TYPES: what they would need, their numbers and names.
TYPES_NEED = {
    "tables of patterns: take a file in IQ4_XS, or in Q2_K to Q6_K": (
        {16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 21: "iq3_s", 22: "iq2_s", 29: "iq1_m"}
    ),
    "weights of two or three values: take a file in Q2_K or larger": (
        {34: "tq1_0", 35: "tq2_0", 41: "q1_0", 42: "q2_0"}
    ),
    "floating-point numbers of 4 bits: take a file in Q4_K_M or Q8_0": {39: "mxfp4", 40: "nvfp4"},
    "blocks in the order of one kind of processor: take a file in Q4_0": (
        {31: "q4_0_4_4", 32: "q4_0_4_8", 33: "q4_0_8_8"}
    ),
}
OTHER_TYPES = {number: (name, need) for need, names in TYPES_NEED.items() for number, name in names.items()}


def refusal(name: str) -> str:
    """What to say of a model of another architecture, GGUF's or Hugging Face's name: one line."""
    short = re.sub("[^a-z0-9]", "", name.lower())
    kinds = [kind for kind in OTHERS if short.startswith(kind)]
    need = f"it would need {OTHERS[max(kinds, key=len)]}" if kinds else "nothing is known about it"
    known = ", ".join(FAMILIES)
    return f"a model of the architecture {name[:50]!r} isn't supported, only {known}: {need}"


def type_refusal(number: int) -> str:
    """What to say of weights in a type of block that can't be read."""
    name, need = OTHER_TYPES.get(number, (f"number {number}", "a newer tinyllama, or the file is damaged"))
    return f"of type {name}, which isn't supported: it would need {need}"
