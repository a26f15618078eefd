"""Who has which page and which slot. Ids only: the tensors are `openm1.model.cache`'s.

Reading order: ids (counted references), prefix (the radix tree), hybrid (the one the scheduler
speaks to).
"""
