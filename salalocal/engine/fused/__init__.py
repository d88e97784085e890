"""The model on a GPU in few launches: the same layers as `model.sala`, stacked and fused; for Engine. Enter by `model`.

    model        which models can run so; a chunk of a prompt through all layers
    rows         activations on their way into a product, normed, gated or quantized only as the product asks for
    projection   linear maps that share their input, as one product of stacked weights
    layers       one sparse or lightning layer and the MLP: many rows of a chunk, and the few of a step
    head         the output matrix: hidden states into logits, or into the likeliest tokens
    step         one step of an answer, captured in a CUDA graph: token ids in, token ids out
    decoder      an answer token by token, one step ahead of its reader

The module tree of `model.sala` stays the definition, and what a CPU runs.
"""
