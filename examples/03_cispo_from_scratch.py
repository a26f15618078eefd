"""CISPO from scratch, in torch alone: the recipe's core on a task that is learned in a second.

The task: asked for n ticks, write exactly n ticks and then stop. Only a whole reply is right or
wrong, so the start is rare luck; what is found for small n carries over to large n.
"""

# %% The policy sees how many ticks are still to write, and has four tokens to choose from.
import torch

STOP, TICK = 0, 1
VOCAB, WINDOW = 4, 8  # Two tokens more mean nothing; a reply is cut after WINDOW tokens.
ASKED = torch.arange(1, 7)  # The prompts: 1 to 6 ticks.
GROUP, UPDATES, STEPS = 16, 16, 30
torch.manual_seed(0)
table = torch.zeros(2 * WINDOW, VOCAB, requires_grad=True)


def token_logprobs(asked: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log pi of each token [B, T] of the replies to `asked` [B]."""
    before = (tokens == TICK).cumsum(1) - (tokens == TICK).long()
    left = asked[:, None] - before + WINDOW
    return table.log_softmax(-1)[left].gather(2, tokens[:, :, None])[:, :, 0]


# %% Sampling: a token at a time, until everyone has stopped. The mask is what was really written.
@torch.no_grad()
def sample(asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.full((len(asked), WINDOW), STOP)
    mask = torch.zeros(len(asked), WINDOW, dtype=torch.bool)
    writing = torch.ones(len(asked), dtype=torch.bool)
    ticks = torch.zeros_like(asked)
    for place in range(WINDOW):
        probabilities = table[asked - ticks + WINDOW].softmax(-1)
        drawn = torch.multinomial(probabilities, 1)[:, 0]
        tokens[:, place] = torch.where(writing, drawn, STOP)
        mask[:, place] = writing
        ticks += writing & (drawn == TICK)
        writing &= drawn != STOP
    return tokens, mask


def reward(asked: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 for n ticks, a stop and nothing else."""
    ticks = (tokens == TICK).sum(1)
    stopped = ((tokens == STOP) & mask).any(1)
    return ((ticks == asked) & stopped & (mask.sum(1) == asked + 1)).float()


# %% Eq. 2: how much better than its group, in deviations. A group without spread says nothing.
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """[P, G] -> [P, G]."""
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = rewards.std(1, keepdim=True, correction=0)
    return torch.where(deviation > 0, centred / deviation.clamp(min=1e-8), 0.0)


# %% Eq. 4-5: the importance weight is clipped, from above only, and has no gradient. Every token
# keeps its log pi: PPO and DAPO would drop those whose ratio has left the trust region.
def cispo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    eps_is_high: float = 4.0,
) -> torch.Tensor:
    """Minus the mean over written tokens; all [B, T] but the advantages, [B]."""
    ratio = torch.exp(logprobs - old_logprobs)
    weight = ratio.clamp(max=1 + eps_is_high).detach()
    terms = weight * advantages[:, None] * logprobs
    return -(terms * mask).sum() / mask.sum()


# %% The loop. With one update per batch the ratio is 1 and all of this is REINFORCE; M1 did 16.
optimizer = torch.optim.AdamW([table], lr=0.05, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
history = []
for step in range(STEPS):
    asked = ASKED.repeat_interleave(GROUP)
    tokens, mask = sample(asked)
    rewards = reward(asked, tokens, mask).view(-1, GROUP)
    advantages = group_advantages(rewards).flatten()
    old_logprobs = token_logprobs(asked, tokens).detach()
    # Dynamic sampling, without its refill: groups all right or all wrong are left out.
    useful = (rewards.std(1) > 0).repeat_interleave(GROUP).nonzero()[:, 0]
    for rows in useful[torch.randperm(len(useful))].chunk(UPDATES):
        logprobs = token_logprobs(asked[rows], tokens[rows])
        loss = cispo_loss(logprobs, old_logprobs[rows], advantages[rows], mask[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    history.append(float(rewards.mean()))
    if step % 5 == 0 or step == STEPS - 1:
        solved = " ".join(f"{share:4.0%}" for share in rewards.mean(1).tolist())
        print(f"step {step:>2}  reward {history[-1]:.2f}  by number of ticks {solved}")
