"""From conversations and documents to packed batches.

Reading order: packing, sft.
"""
