"""The embedded model's real weights against transformers: greedy tokens and log-probabilities in float32."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from llmserve.kernels.reference import DenseLinearWeight, ReferenceOps

PROMPTS = [
    "The capital of France is",
    "Gravity is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "1. First\n\n2. Second\n\n3.",
    "Q: What is the largest planet?\nA:",
    "The recipe needs 200 g of flour, 3 eggs and",
    "SELECT name, age FROM users WHERE",
    "Water boils at 100 degrees Celsius because",
    "Dear Sir or Madam,\n\nI am writing to",
    "Le chat est sur la table, et le chien",
    "In 1969, the first",
    "import numpy as np\n\nx = np.",
    "The three states of matter are",
    '{"name": "Ada", "born":',
    "To be, or not to be, that is",
    "Photosynthesis converts",
    "café 你好 🙂 means",
    "The mean of 2, 4 and 9 is",
    "<|im_start|>user\nTell me a joke.<|im_end|>\n<|im_start|>assistant\n",
]
NUM_TOKENS = 64


class PlainProducts(ReferenceOps):
    """Multiplies as transformers does."""

    def pack_linear(self, weight, bias=None, fmt="dense"):
        return DenseLinearWeight(weight, bias)


@pytest.fixture
def theirs(smollm2_path):
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()


def test_twenty_prompts_equal_transformers(smollm2_path, theirs, load, driver_class):
    """Ours generates all prompts in one batch; theirs must choose the same token after each prefix of each text.

    Log-probabilities are within 1e-4 where both multiply by `F.linear`: the model is the same. oneDNN's packed kernel
    sums float32 in longer chains, and over a vocabulary of 49k was seen 3e-4 off: its bound is 5e-4.
    """
    tokenizer = Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    driver = driver_class(load(smollm2_path, max_model_len=256), block_size=16)
    plain = driver_class(load(smollm2_path, ops=PlainProducts(), max_model_len=256), block_size=16)
    texts = [list(ids) for ids in prompts]
    rows = [[logits] for logits in driver.step(dict(enumerate(texts))).values()]
    for _ in range(NUM_TOKENS):
        for ids, logits in zip(texts, rows, strict=True):
            ids.append(int(logits[-1][-1].argmax()))
        for seq, logits in driver.step({seq: ids[-1:] for seq, ids in enumerate(texts)}).items():
            rows[seq].append(logits)

    for text, prompt, ids, logits in zip(PROMPTS, prompts, texts, rows, strict=True):
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert ids[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(-1).tolist(), text
        torch.testing.assert_close(torch.cat(logits).log_softmax(-1), expected, atol=5e-4, rtol=0)
        found = plain.step({text: ids})[text].log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
