"""The pieces of a layer in training on a CPU, in fp32: one sweep forward and one back for each.

Where a model is small, most of a step of training goes into carrying what torch's operators leave
to each other through memory. Here little but a piece's inputs is kept for its gradient; what else
it needs is computed again. Each is differentiable once. Matrix products of whole batches stay
`kernels.product`'s.

Reading order: sharing (when, and by which threads), norm, experts, lightning, attention.
"""
