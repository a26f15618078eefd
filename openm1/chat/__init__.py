"""Between text and tokens: everything a conversation needs before and after the model. Torch-free.

Read in this order: `tokenizer` (bytes, words and special tokens), `format` (messages to ids and a
training mask, whatever the format), `template` (M1's format, and which format a tokenizer speaks),
`jinja_format` (any other model's), `jinja_m1` (M1's format as a template for other programs),
`wire` (messages and tools out of JSON), `thinking` (thought apart from answer), `tools` (calls out
of an answer), `reply` (the tokens of a reply to a message).
"""
