"""Why the head computes in fp32: large activations, and what bf16 makes of them.

M1's trainer and sampler disagreed on probabilities until the head was computed in fp32
(arXiv 2506.13585, section 3.2). Here the same is seen on nano. A vector is added to every row of
its head, which adds the same amount to all logits of a place: softmax, and so the model, is what
it was. But logits are now near 6,000, where neighbouring bf16 numbers are 32 apart.
"""

# %%
import asyncio
from typing import Any

import torch

from openm1.engine.config import EngineConfig
from openm1.engine.llm import LLM
from openm1.envs.chain import ChainTaskset
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.batch import BatchConfig, group_samples
from openm1.rl.losses import CISPO, RatioAnchor
from openm1.rl.monitor import agreement_metrics
from openm1.rl.update import UpdatePlan, recompute_logprobs
from openm1.rollout.run import run_group
from openm1.types import RolloutGroup, SamplingParams

NUM_PROMPTS, GROUP_SIZE, MAX_TOKENS = 96, 4, 40
LARGE = 6000.0
# At 1 nano is so sure that nearly every probability is 1, and those correlate with nothing.
TEMPERATURE = 1.2


# %% The head as many models have it: weights, products and logits in the model's own bf16.
class Bf16Head(M1ForCausalLM):
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        short = torch.nn.functional.linear(hidden.bfloat16(), self.head_weight.bfloat16())
        return short.float()


# %% Every logit rises by about LARGE: the vector points along the mean hidden state.
@torch.no_grad()
def raise_logits(model: M1ForCausalLM, ids: list[int]) -> None:
    hidden: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda _, __, out: hidden.append(out.float()))
    model(torch.tensor([ids]))
    hook.remove()
    mean = hidden[0].mean(0)
    model.lm_head.weight += LARGE * mean / mean.square().sum()


# %% Rollouts by the engine, then the trainer's probabilities of the same tokens.
def measure(kind: type[M1ForCausalLM]) -> dict[str, float]:
    model = kind.from_pretrained("nano", dtype=torch.bfloat16)
    # One way of computing for both, so that the head alone makes the difference.
    nano = LLM("nano")
    llm = LLM(model, tokenizer=nano.tokenizer, config=EngineConfig(kernels="torch"))
    mixture = Mixture([ChainTaskset()], seed=1)
    tasks = [mixture.task(i) for i in range(NUM_PROMPTS)]
    raise_logits(model, llm.chat_format.encode(tasks[0][1].prompt))

    async def play() -> list[RolloutGroup]:
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=TEMPERATURE)
        seeds = range(GROUP_SIZE)
        return await asyncio.gather(
            *(
                run_group(llm.policy, taskset, task, llm.chat_format, params, seeds=seeds)
                for taskset, task in tasks
            )
        )

    groups = asyncio.run(play())
    rewards = [rollout.reward or 0.0 for group in groups for rollout in group.rollouts]
    samples: list[Any] = []
    for number, group in enumerate(groups):
        samples += group_samples(group, number, BatchConfig(), MAX_TOKENS)
    plan = UpdatePlan(
        loss=CISPO(),
        num_updates=1,
        max_tokens=2048,
        temperature=TEMPERATURE,
        learning_rate=1e-4,
        max_grad_norm=1.0,
        anchor=RatioAnchor(),
        vocab_size=llm.chat_format.tokenizer.vocab_size,
    )
    trainer = torch.cat(recompute_logprobs(model, samples, plan))
    sampler = torch.tensor([p for sample in samples for p in sample.old_logprobs])
    return {"reward": sum(rewards) / len(rewards)} | agreement_metrics(trainer, sampler)


# %%
results = {kind.__name__: measure(kind) for kind in (Bf16Head, M1ForCausalLM)}
for name, row in results.items():
    print(name, {key.removeprefix("rl/"): round(value, 4) for key, value in row.items()})
