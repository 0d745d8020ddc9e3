"""What each step of the forward pass is called, its axes, what happens in it and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A step as every layer does it.

    Attributes:
        title: what it is called.
        axes: of its value, by the names of config.py.
        sentence: what happens and why.
    """

    title: str
    axes: tuple[str, ...]
    sentence: str


DIM, HIDDEN = ("n_tokens", "dim"), ("n_tokens", "hidden_dim")
QUERIES, KEYS = ("n_tokens", "n_heads", "head_dim"), ("n_tokens", "n_kv_heads", "head_dim")
PAIRS = ("n_heads", "n_tokens", "n_past")

KINDS = {
    "embedding": Kind(
        "Embedding",
        DIM,
        "Every token's number picks a row of a table: from here on a token is a list of numbers, the "
        "residual stream, because numbers can be added to and a word can't.",
    ),
    "attention.norm": Kind(
        "RMSNorm before attention",
        DIM,
        "Each token's numbers are divided by their root mean square and weighted one by one, so that "
        "this layer meets the same scale however much the layers before it have added.",
    ),
    "attention.q": Kind(
        "Queries",
        QUERIES,
        "A matrix turns each token into one query for every head: what the token is looking for among "
        "those before it.",
    ),
    "attention.k": Kind(
        "Keys",
        KEYS,
        "A second matrix turns each token into keys: what it can be found by. Neighbouring heads may "
        "share one, which makes the cache smaller.",
    ),
    "attention.v": Kind(
        "Values",
        KEYS,
        "A third matrix turns each token into values: what it hands over to those that find it, which "
        "needn't be what they looked for.",
    ),
    "attention.q_rope": Kind(
        "RoPE turns the queries",
        QUERIES,
        "Every pair of a query's numbers is turned by an angle that grows with the token's position, so "
        "that its product with a key tells how far apart the two are.",
    ),
    "attention.k_rope": Kind(
        "RoPE turns the keys",
        KEYS,
        "The keys are turned by the same angles, so that only distances count. Values aren't turned: "
        "what is handed over doesn't depend on where.",
    ),
    "attention.scores": Kind(
        "Attention scores",
        PAIRS,
        "Every query is multiplied with every key and divided by √head_dim, lest larger heads give "
        "larger scores. The future is −∞ (grey): no token may see what comes after it.",
    ),
    "attention.weights": Kind(
        "Attention weights",
        PAIRS,
        "Softmax makes shares of each row of scores, together 1: how much this token takes from every "
        "token before it. A row is a token that looks, a column one that is looked at.",
    ),
    "attention.heads": Kind(
        "What the heads have found",
        DIM,
        "Each head adds up the values by its weights, and all heads are put side by side: now a token "
        "holds something of those before it.",
    ),
    "attention.output": Kind(
        "Attention's output",
        DIM,
        "A matrix mixes what the heads have found into one list of numbers, which is added to the "
        "residual stream: attention writes, it doesn't replace.",
    ),
    "feed_forward.norm": Kind(
        "RMSNorm before the feed-forward network",
        DIM,
        "The residual stream is scaled once more, because attention has just added to it.",
    ),
    "feed_forward.gate": Kind(
        "The gates",
        HIDDEN,
        "A matrix makes one number for each of many neurons: how wide each is to be opened by this token.",
    ),
    "feed_forward.up": Kind(
        "What is at the gates",
        HIDDEN,
        "Another matrix makes as many numbers: what each neuron has to say, which counts only where its "
        "gate is open.",
    ),
    "feed_forward.hidden": Kind(
        "SwiGLU",
        HIDDEN,
        "silu lets open gates pass and holds the negative ones near 0; multiplied with what is at the "
        "gates, only a few neurons speak for any one token.",
    ),
    "feed_forward.output": Kind(
        "The feed-forward network's output",
        DIM,
        "A matrix turns what the neurons say back into the width of the residual stream, so that it can "
        "be added to it.",
    ),
    "residual": Kind(
        "The residual stream after this layer",
        DIM,
        "Both outputs have been added to what was there, so later layers still find all that earlier "
        "ones wrote. Below: what the model would say if it stopped here.",
    ),
    "norm": Kind(
        "The last RMSNorm",
        DIM,
        "After the last layer the stream is scaled once more, since the output matrix was trained on "
        "that scale.",
    ),
    "logits": Kind(
        "Logits",
        ("n_tokens", "vocab_size"),
        "The output matrix gives every token of the vocabulary one number, how well it would follow; "
        "softmax makes the probabilities of them from which sampling draws.",
    ),
}
