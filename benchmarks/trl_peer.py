"""TRL's GRPOTrainer with `loss_type="cispo"`, in an interpreter of its own.

It imports nothing of this project. Jobs come as one JSON line each, answers go out likewise:

    python trl_peer.py                       made by `make test-trl` in .venv/clients/trl
    {"loss": FILE, "model": FOLDER, "cap": 1.5, "gradient": FOLDER}   ->  OPENM1 {"loss": 0.3}
    {"train": {"model": FOLDER, "prompts": [..], "answers": [..], "group_size": 16, ...}}
                                             ->  OPENM1 {"ready": true}
    {"step": 1}            ->  OPENM1 {"seconds": 4.2, "cpu_s": 4.1, "tokens": 5120,
                                                       "reward": 0.9}

FILE holds the tensors of one batch as torch.save writes them. A step is one batch of rollouts and
all updates on it, from the weights that FOLDER holds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

MARK = "OPENM1 "
"""Starts the lines that hold answers."""


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "loss" in job:
            answer(loss_and_gradient(job))
        else:
            train(job["train"])


def answer(content: dict[str, Any]) -> None:
    print(MARK + json.dumps(content), flush=True)


def make_trainer(model: Any, tokenizer: Any, dataset: Any, rewards: Any, **settings: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="cispo",
        beta=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
    )


def load(folder: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    # The grouped product of experts has no fp64.
    experts = {"experts_implementation": "eager"} if dtype == "float64" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **experts)
    with open(os.path.join(folder, "config.json")) as file:
        eos = json.load(file)["eos_token_id"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(folder, "tokenizer.json"))
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(eos)
    return model, tokenizer


def repair_cache(model: Any) -> None:
    """transformers asks its cache of MiniMax how long it is at the first layer, which keeps no keys
    and so says 0: tokens after a padded prompt then see the padding instead of the prompt. Asked
    at the first layer that has keys, it samples from the model's own distribution."""
    from transformers.cache_utils import DynamicCache
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    first = model.config.layer_types.index("full_attention")

    def length(self: Any, layer_idx: int = 0) -> int:
        return DynamicCache.get_seq_length(self, max(layer_idx, first))

    def mask_sizes(self: Any, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return DynamicCache.get_mask_sizes(self, query_length, max(layer_idx, first))

    MiniMaxCache.get_seq_length = length
    MiniMaxCache.get_mask_sizes = mask_sizes


def loss_and_gradient(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's own `_compute_loss` in fp64; the gradient is written as a checkpoint of weights."""
    import torch
    from datasets import Dataset

    model, tokenizer = load(job["model"], "float64")
    batch = torch.load(job["loss"])
    size = len(batch["prompt_ids"])
    trainer = make_trainer(
        model,
        tokenizer,
        Dataset.from_dict({"prompt": ["1"] * size}),
        lambda completions, **_: [0.0] * len(completions),
        epsilon_high=job["cap"],
        per_device_train_batch_size=size,
        num_generations=size,
        steps_per_generation=1,
    )
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.copy_(gradient)
    model.save_pretrained(job["gradient"])
    return {"loss": float(loss)}


def train(job: dict[str, Any]) -> None:
    """Answers {"step": 1} until standard input ends."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    torch.set_num_threads(job["threads"])
    model, tokenizer = load(job["model"], "float32")
    repair_cache(model)
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.shape == (len(job["frequencies"]),)
    rotary.inv_freq.copy_(torch.tensor(job["frequencies"]))
    num_tokens = 0
    rewards: list[float] = []

    def reward(completions: list[str], answer: list[str], completion_ids: Any, **_: Any) -> Any:
        nonlocal num_tokens
        num_tokens += sum(map(len, completion_ids))
        said = [text.rsplit("</think>", 1)[-1].strip() for text in completions]
        rewards[:] = [float(a == b) for a, b in zip(said, answer, strict=True)]
        return rewards.copy()

    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    orders = wait_for_orders()

    class Steps(TrainerCallback):
        began = cpu_began = 0.0

        def on_step_begin(
            self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any
        ) -> None:
            nonlocal num_tokens
            if state.global_step % job["num_updates"]:
                return
            if state.global_step:
                seconds = time.perf_counter() - self.began
                cpu_s = time.process_time() - self.cpu_began
                mean = sum(rewards) / len(rewards)
                done = {"seconds": seconds, "cpu_s": cpu_s, "tokens": num_tokens, "reward": mean}
                answer(done)
            else:
                answer({"ready": True})
            if next(orders, None) is None:
                os._exit(0)
            model.load_state_dict(initial)
            optimizer.state.clear()
            num_tokens, self.began = 0, time.perf_counter()
            self.cpu_began = time.process_time()

    data = Dataset.from_dict({"prompt": job["prompts"], "answer": job["answers"]})
    batch = job["num_prompts"] * job["group_size"]
    trainer = make_trainer(
        model,
        tokenizer,
        data,
        reward,
        epsilon_high=job["cap"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-15,
        max_completion_length=job["max_tokens"],
        num_generations=job["group_size"],
        per_device_train_batch_size=batch // job["num_updates"],
        steps_per_generation=job["num_updates"],
        gradient_accumulation_steps=1,
        max_steps=10_000 * job["num_updates"],
        shuffle_dataset=False,
    )
    trainer.add_callback(Steps())
    trainer.train()


def wait_for_orders() -> Iterator[str]:
    yield from sys.stdin


if __name__ == "__main__":
    main()
