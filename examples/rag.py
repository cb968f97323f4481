"""Answers a question from a few texts: embeddings find candidates, rerank orders them, the chat model answers.

Start `llmserve serve`, then: pip install openai cohere; python examples/rag.py [url]
"""

import sys

import cohere
import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
EMBEDDING, CHAT = "all-minilm-l6-v2", "smollm2-135m-instruct"
TEXTS = [
    "The bakery on Mill Lane opens at six in the morning and closes at noon.",
    "Dogs are welcome in the town library on Thursdays only.",
    "The library lends each reader up to twelve books for three weeks.",
    "The swimming pool is heated from May to September.",
    "Bus 42 goes from the station to the swimming pool every ten minutes.",
]
QUESTION = "How many books does the library lend to a reader?"

llm = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
co = cohere.ClientV2(api_key="none", base_url=URL)
vectors = [entry.embedding for entry in llm.embeddings.create(model=EMBEDDING, input=[QUESTION, *TEXTS]).data]
near = [sum(a * b for a, b in zip(vectors[0], vector, strict=True)) for vector in vectors[1:]]
found = sorted(range(len(TEXTS)), key=lambda i: -near[i])[:3]
ranked = co.rerank(model=EMBEDDING, query=QUESTION, documents=[TEXTS[i] for i in found], top_n=1)
context = TEXTS[found[ranked.results[0].index]]
prompt = f"{context} {QUESTION}"
chat = llm.chat.completions.create(model=CHAT, messages=[{"role": "user", "content": prompt}], temperature=0)
print(context)
print(chat.choices[0].message.content)
