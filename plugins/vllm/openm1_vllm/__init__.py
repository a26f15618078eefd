"""MiniMax-M1 and MiniMax-Text-01 on vLLM.

Reading order: register (what vLLM is told), config, attention (the two kinds of layers and the
state between steps), prefill (its arithmetic), model (the rest of the network), parsers, gate (the
command that checks all of it against OpenM1's own model).
"""
