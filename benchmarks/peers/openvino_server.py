"""OpenVINO GenAI's continuous batching behind `/v1/completions`, as thin as it goes: it has no server of its own.

Runs in the peer's own environment (openvino-genai, tokenizers and the standard library; nothing of llmserve). One
thread owns the pipeline: it adds what has arrived, steps, and writes each new token to its client's socket at once.
Text is one table lookup a token, so the figures are the pipeline's own.

    python openvino_server.py MODEL --port 8000 [--threads 2] [--kv-precision bf16]
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from tokenizers import Tokenizer


@dataclass
class Request:
    """One completion: what was asked, where its answer goes, and how far it is."""

    prompt_ids: list[int]
    max_tokens: int
    ignore_eos: bool
    handler: CompletionHandler
    handle: Any = None
    num_tokens: int = 0
    done: threading.Event = field(default_factory=threading.Event)


class Engine:
    """The pipeline and the one thread that steps it."""

    def __init__(self, options: argparse.Namespace) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = options.cache_gib
        scheduler.max_num_seqs = options.max_num_seqs
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": options.threads}
        if options.kv_precision:
            properties["KV_CACHE_PRECISION"] = options.kv_precision
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)
        self.tokenizer = Tokenizer.from_file(str((options.tokenizer or options.model) / "tokenizer.json"))
        vocabulary = [[token_id] for token_id in range(self.tokenizer.get_vocab_size())]
        self._texts = self.tokenizer.decode_batch(vocabulary, skip_special_tokens=False)
        self.arrivals: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def run(self) -> None:
        """Steps while there is work, waits while there is none."""
        running: list[Request] = []
        next_id = 0
        while True:
            while not running or not self.arrivals.empty():
                request = self.arrivals.get()
                request.handle = self._pipeline.add_request(
                    next_id, openvino.Tensor(np.array([request.prompt_ids], np.int64)), self._config(request)
                )
                next_id += 1
                running.append(request)
            self._pipeline.step()
            running = [request for request in running if not self._deliver(request)]

    def _config(self, request: Request) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request.max_tokens
        config.ignore_eos = request.ignore_eos
        config.eos_token_id = self._pipeline.get_config().eos_token_id
        return config

    def _deliver(self, request: Request) -> bool:
        """Sends what is new. Returns whether the answer is complete."""
        finished = False
        while request.handle.can_read():
            for output in request.handle.read().values():
                texts = [self._texts[token_id] for token_id in output.generated_ids]
                request.num_tokens += len(texts)
                request.handler.send_text("".join(texts))
                finished = output.finish_reason != openvino_genai.GenerationFinishReason.NONE
        if finished:
            request.handler.send_end(len(request.prompt_ids), request.num_tokens)
            request.done.set()
        return finished


class CompletionHandler(BaseHTTPRequestHandler):
    """HTTP on one connection: reads requests; the engine's thread writes the answers through it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    engine: Engine

    def do_GET(self) -> None:
        self._answer_json({"data": [{"id": "openvino", "object": "model"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        prompt = body["prompt"]
        prompt_ids = self.engine.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        self._streaming, self._text = bool(body.get("stream")), ""
        if self._streaming:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        request = Request(prompt_ids, body.get("max_tokens", 16), bool(body.get("ignore_eos")), self)
        self.engine.arrivals.put(request)
        request.done.wait()

    def send_text(self, text: str) -> None:
        if self._streaming:
            self._send_event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
        else:
            self._text += text

    def send_end(self, num_prompt_tokens: int, num_tokens: int) -> None:
        usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens}
        choice = {"index": 0, "text": "" if self._streaming else self._text, "finish_reason": "length"}
        if self._streaming:
            self._send_event({"choices": [choice], "usage": usage})
            self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            self._answer_json({"choices": [choice], "usage": usage})

    def _send_event(self, event: dict[str, Any]) -> None:
        data = f"data: {json.dumps(event)}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _answer_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a line a request would be part of the measurement."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported folder or a .gguf file")
    parser.add_argument("--tokenizer", type=Path, help="the folder of tokenizer.json, if it is not the model's")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--kv-precision", help="u8 (the pipeline's default), bf16, f16 or f32")
    parser.add_argument("--cache-gib", type=int, default=2)
    options = parser.parse_args()
    engine = Engine(options)
    CompletionHandler.engine = engine
    server = Server(("127.0.0.1", options.port), CompletionHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    engine.run()


if __name__ == "__main__":
    main()
