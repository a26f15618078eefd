"""Generation: tokens in, tokens out, many sequences at a time.

Reading order: request, thinking, stopping, sampler, engine (the loop), client (async), llm (text).
"""
