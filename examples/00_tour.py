"""A tour: configs, the model, generation, thought and its budget. Run it, or read its cells."""

# %% A config is a frozen dataclass with the published names. This one is the 456 B original.
import torch

from openm1 import LLM, M1Config, M1ForCausalLM, Message, SamplingParams
from openm1.model.size import model_size

m1 = M1Config.from_pretrained("m1-80k")
print(m1.num_hidden_layers, "layers, softmax in", m1.softmax_layers)
print(model_size(m1))

# %% The shipped nano has the same structure, small enough for a laptop.
llm = LLM("nano")
config = llm.model.config
print(len(config.lightning_layers), "lightning and", len(config.softmax_layers), "softmax layers")

# %% It thinks, then answers.
question = [Message(role="user", content="4 -9 +8 *9 +1")]
reply = llm.chat(question, SamplingParams(max_tokens=64, temperature=0.0))
print("thought:", reply.reasoning)
print("answer: ", reply.text)

# %% Thinking costs tokens, and pays: the same question under growing budgets.
for budget in (0, 4, 8, 12):
    params = SamplingParams(max_tokens=64, temperature=0.0, thinking_budget=budget)
    reply = llm.chat(question, params)
    print(f"budget {budget:>2}: {reply.text!r} after {reply.num_reasoning_tokens} tokens")

# %% Many prompts at once; each gets the tokens it would get alone.
prompts = [llm.chat_format.encode([Message(role="user", content=f"{d} +5 *3")]) for d in range(10)]
groups = llm.generate(prompts, SamplingParams(max_tokens=64, temperature=1.0, seed=1, n=2))
print([[completion.text for completion in group] for group in groups])

# %% The model itself: ids [B, T] in, fp32 logits [B, T, V] out.
model: M1ForCausalLM = llm.model
with torch.inference_mode():
    logits = model(torch.tensor([prompts[0]]))
print(tuple(logits.shape), logits.dtype)
