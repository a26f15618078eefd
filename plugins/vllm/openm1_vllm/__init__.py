"""MiniMax-M1 and MiniMax-Text-01 on vLLM.

Reading order: register (what vLLM is told), config and verify (what is checked before a weight is
read), attention (the two kinds of layers and the state between steps), kernels, triton_lightning
and cpu_lightning (their arithmetic), model (the rest of the network), cpu, tokenizer, parsers, gate
(the command that checks all of it against OpenM1's own model).
"""
