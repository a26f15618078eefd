"""The inner loops, each with a plain version that is the truth.

Reading order: packing (how sequences lie in memory), lightning/naive, lightning/chunk,
lightning/op, paged_attention, product; cpu (what numba compiles).
"""
