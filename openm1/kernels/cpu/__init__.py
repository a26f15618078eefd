"""One decode step for the CPU as compiled Python: every layer in one call, weights read in place.

Reading order: vector (what LLVM is told by hand), team (threads that meet at barriers), blocks (the
pieces of a layer), decode (the step), sample (from logits to tokens).
"""
