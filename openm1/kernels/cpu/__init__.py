"""One decode step for the CPU as compiled Python: every layer in one call, weights read in place.

Reading order: compile (how), vector (what LLVM is told by hand), team (threads that meet at
barriers), blocks (the pieces of a layer), arguments (what a step is given), decode (the step),
sample (from logits to tokens). For prompts: softmax (a tile of scores) and tile_attention (all of
it in the tile unit). tiles says whether there is one. training/ is for gradients.
"""
