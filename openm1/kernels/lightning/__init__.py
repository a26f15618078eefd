"""Lightning (linear) attention with exponential decay.

naive: the recurrence token by token, the truth every other form is tested against.
chunk: the same in blocks of tokens, with autograd. op: what the model calls.
"""
