"""An API that OpenAI's and Anthropic's clients accept, and a page to chat on. Torch-free.

The server knows the engine through what it is given (`served`). Read in this order: `served` (what
it is given), `config` (limits), `protocol` and `anthropic` (what clients send), `thinking` (how
much thought they allow), `grammar` (answers that must have a form), `orders` (requests to orders),
`replies` (orders to pieces of text), `chat`, `completions`, `responses`, `messages` (pieces in each
API's words), `stream` (server-sent events), `gate`, `guard`, `metrics`, `usage` (operations),
`serving` and `app` (all of it together), `run` (the process).
"""
