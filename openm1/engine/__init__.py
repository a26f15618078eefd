"""Generation: tokens in, tokens out, many sequences at a time.

Reading order: request, cache (what a sequence has, what is shared), scheduler (what runs next),
admission, thinking, adjustment and sampler (which token), stopping, runner (who computes), engine
(the loop), client (async), llm (text).
"""
