"""What drafts from the text itself bring, and what they cost where they bring nothing: one engine, on and off in turn.

    python benchmarks/bench_speculation.py [--model PATH] [--num-tokens 160] [--rounds 5] [--batch 1 4 16]

Runs the engine in this process, without a server. Three texts: `copy` (a program to be repeated with one change),
`edit` (a letter to be corrected) and `prose` (a story). For each and each batch size, every round measures `off`,
`auto` and `ngram` in turn, greedily, on prompts of its own; medians over the rounds, of the ratios too. Answers are
checked to be equal. Decode only: the time of steps that compute prompts is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time

from llmserve.config import EngineConfig
from llmserve.engine.core import EngineCore
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, SamplingParams
from llmserve.repository import embedded
from llmserve.scheduler.adaptive_drafter import make_drafter
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.tokenizer import Tokenizer
from llmserve.worker.loader import prepare_model
from llmserve.worker.model_runner import ModelRunner

MODES = ("off", "auto", "ngram")
PROGRAM = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("The amount must be positive.")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("The balance is too small.")
        self.balance -= amount
        return self.balance
"""
LETTER = """Dear Mrs. {name}, thank you for you letter of the third of May, in which you asked wether the garden behind
the town hall will be open to visitors this summer. I am pleased to tell you that it will open on the first of June, and
that the old greenhouse, which was closed for repairs last year, can be visited again. Children under twelve need no
ticket. We look forward to seeing you and you family. Yours sincerly, the office of parks and gardens."""
NAMES = ["Adams", "Baker", "Clark", "Davis", "Evans", "Frank", "Ghosh", "Hills", "Irwin", "Jones", "Klein", "Lopez"]
TOPICS = [
    "a lighthouse",
    "a clockmaker",
    "a lost dog",
    "the first winter",
    "a violin",
    "an old map",
    "two rivers",
    "bees",
]


def question(text: str, number: int) -> str:
    """The user's message; `number` makes each a little different."""
    if text == "copy":
        name = NAMES[number % len(NAMES)]
        return f"Rename the class Account to {name}Account. Repeat the whole program.\n\n```python\n{PROGRAM}```"
    if text == "edit":
        letter = LETTER.format(name=NAMES[number % len(NAMES)])
        return f"Correct the spelling of this letter and write it again:\n\n{letter}"
    return f"Write a long story about {TOPICS[number % len(TOPICS)]}, number {number}."


class Bench:
    """A loaded model; each run has a scheduler, a cache and a drafter of its own over the same runner."""

    def __init__(self, path: str, dtype: str, quantization: str, num_threads: int) -> None:
        config = EngineConfig(
            model=path,
            dtype=dtype,
            quantization=quantization,
            max_model_len=2048,
            num_threads=num_threads,
            max_num_seqs=32,
        )
        prepared = prepare_model(config)
        self.plan = prepared.plan
        self.tokenizer = Tokenizer.from_path(path)
        self._runner: ModelRunner = prepared.load()
        self._drafters = {mode: make_drafter(mode) for mode in MODES}  # kept: a server learns once
        self._num_made = 0

    def request(self, prompt: list[int], num_tokens: int) -> EngineRequest:
        self._num_made += 1
        params = SamplingParams(max_tokens=num_tokens, seed=1, temperature=0.0)
        return EngineRequest(
            request_id=str(self._num_made), prompt_token_ids=prompt, params=params, arrival_s=float(self._num_made)
        )

    def run(self, mode: str, prompts: list[list[int]], num_tokens: int) -> tuple[float, float, list[list[int]]]:
        """(tokens a second over the steps that only decode, share of tokens that were accepted drafts, answers)."""
        drafter, budget = self._drafters[mode], FixedBudget(self.plan.max_num_batched_tokens)
        scheduler = Scheduler(
            KVCacheManager(self.plan.num_blocks, self.plan.block_size, enable_prefix_caching=False),
            policy=make_policy("fcfs"),
            budget=budget,
            max_num_seqs=self.plan.max_num_seqs,
            max_model_len=self.plan.max_model_len,
            drafter=drafter,
        )
        core = EngineCore(scheduler, budget, self._runner, time.perf_counter, drafter)
        answers: dict[str, list[int]] = {}
        for prompt in prompts:
            request = self.request(prompt, num_tokens)
            answers[request.request_id] = []
            core.add(request)
        decode_s = 0.0
        num_decoded = num_accepted = 0
        while core.has_work():
            start_s = time.perf_counter()
            step = core.step()
            if not step.stats.num_prompt_tokens:
                decode_s += time.perf_counter() - start_s
                num_decoded += sum(len(output.token_ids) for output in step.outputs)
                num_accepted += step.stats.num_accepted_tokens
            for output in step.outputs:
                answers[output.request_id] += output.token_ids
        self._runner.execute(scheduler.schedule(0.0))  # the worker forgets the last ones
        return num_decoded / decode_s, num_accepted / num_decoded, list(answers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder or .gguf file; by default the embedded model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--num-tokens", type=int, default=160, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model = args.model or str(embedded.fetch(embedded.DEFAULT_LLM))
    bench = Bench(model, args.dtype, args.quantization, args.threads)
    print(f"{'':<12}{'tokens a second':>22}{'':>10}{'to off':>16}{'accepted share':>18}")
    print(f"{'text':<7}{'batch':>5}{'off':>10}{'auto':>10}{'ngram':>10}{'auto':>9}{'ngram':>9}{'auto':>9}{'ngram':>9}")
    for text in ("copy", "edit", "prose"):
        for batch in args.batch:
            rates: dict[str, list[float]] = {mode: [] for mode in MODES}
            shares: dict[str, list[float]] = {mode: [] for mode in MODES}
            for index in range(args.rounds):
                questions = [question(text, index * batch + number) for number in range(batch)]
                messages = [[{"role": "user", "content": text}] for text in questions]
                prompts = [bench.tokenizer.encode(bench.tokenizer.apply_chat_template(m), False) for m in messages]
                answers = {}
                for mode in MODES:
                    rate, share, answers[mode] = bench.run(mode, prompts, args.num_tokens)
                    rates[mode].append(rate)
                    shares[mode].append(share)
                assert answers["off"] == answers["auto"] == answers["ngram"], "drafts changed an answer"
            rate_of = {mode: statistics.median(values) for mode, values in rates.items()}
            ratios = [statistics.median(a / b for a, b in zip(rates[m], rates["off"], strict=True)) for m in MODES[1:]]
            print(
                f"{text:<7}{batch:>5}"
                + "".join(f"{rate_of[mode]:>10.1f}" for mode in MODES)
                + "".join(f"{ratio:>8.2f}x" for ratio in ratios)
                + "".join(f"{statistics.median(shares[mode]):>9.0%}" for mode in MODES[1:]),
                flush=True,
            )


if __name__ == "__main__":
    main()
