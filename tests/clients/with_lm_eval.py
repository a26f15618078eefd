"""lm-eval's local-chat-completions against a server: a task of its own with an exact score."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

BASE = sys.argv[1]
SAMPLES = [("4 -9 +8 *9 +1", "8"), ("6 -9 -4 -6", "7"), ("3 +6 *9 +3 -8 +0 *7", "2")]
TASK = """
task: chain
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 64, do_sample: false}}
metric_list:
  - metric: exact_match
"""

folder = Path(tempfile.mkdtemp())
data = folder / "chain.jsonl"
data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in SAMPLES))
(folder / "chain.yaml").write_text(TASK.format(file=data))
results = lm_eval.simple_evaluate(
    model="local-chat-completions",
    model_args={
        "model": "nano",
        "base_url": BASE + "/v1/chat/completions",
        "num_concurrent": 3,
        "tokenizer_backend": None,
    },
    tasks=["chain"],
    task_manager=TaskManager(include_path=str(folder)),
    apply_chat_template=True,
)
score = results["results"]["chain"]["exact_match,none"]
assert score == 1.0, results["results"]
print("lm-eval: exact_match 1.0 on three samples")
