"""The model.

Reading order: config, size, rope, layers, lightning_attention, softmax_attention, moe, cache, m1,
names, hf, gguf.
"""
