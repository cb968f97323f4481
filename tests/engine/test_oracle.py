"""The embedded model says what transformers says on the same weights: tokens and log-probabilities, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from llmserve.messages import EngineRequest
from llmserve.tokenizer import Tokenizer

MAX_TOKENS = 64

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "1. First\n\n2. Second\n\n3.",
    "Explain why the sky is blue to a child of five.",
    "def fibonacci(n):\n    if n <  2:\n",
    "Translate 'good morning' into Spanish, Italian and German.",
    "List three prime numbers greater than 100.",
    "What's the difference between TCP and UDP?",
    "Summarise the plot of Hamlet in two sentences.",
    "你好，你是谁？",
]
TEXTS = [
    "Gravity is",
    "The quick brown fox",
    "In 1969, the first humans",
    "import numpy as np\n\n",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "SELECT name, age FROM",
    "Water boils at 100 degrees Celsius because",
    "Dear Sir or Madam,\n\n",
    "2 + 2 = 4\n3 + 3 = 6\n4 + 4 =",
]


def test_greedy_answers_and_logprobs_equal_those_of_transformers(
    smollm2_path: Path, make_engine: Callable[..., Any], make_request: Callable[..., EngineRequest]
) -> None:
    """All twenty are answered in one crowded batch; each is then checked by one forward pass of transformers."""
    tokenizer = Tokenizer.from_path(smollm2_path)
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in chats + TEXTS]
    requests = [make_request(prompt, MAX_TOKENS, logprobs=0) for prompt in prompts]
    engine = make_engine(smollm2_path, "float32", num_blocks=300, budget=256)
    answers = engine.run(*requests)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    for request in requests:
        answer = answers[request.request_id]
        assert len(answer.token_ids) == MAX_TOKENS
        sequence = torch.tensor([request.prompt_token_ids + answer.token_ids])
        with torch.inference_mode():
            logits = oracle(sequence).logits[0, len(request.prompt_token_ids) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == answer.token_ids
        expected = torch.log_softmax(logits, dim=-1)[torch.arange(MAX_TOKENS), torch.tensor(answer.token_ids)]
        actual = torch.tensor([entry.logprob for entry in answer.logprobs])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
