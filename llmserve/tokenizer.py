"""A model's tokenizer: text to ids, ids to text, conversations to prompts. Knows no requests, imports no torch.

It stands directly on Hugging Face's Rust library: the server process starts fast and stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llmserve.chat_template import ChatTemplate, Message
from llmserve.detokenizer import ByteDetokenizer, IncrementalDetokenizer, WindowDetokenizer
from llmserve.errors import InvalidRequestError, ModelLoadError
from llmserve.gguf_tokenizer import template_processor
from llmserve.token_bytes import ByteTable, build_byte_table
from llmserve.tokenizer_files import TokenizerFiles, read_tokenizer_files

# Tokens that end an answer in the models that have them, whatever their configuration says: as llama.cpp does, it is
# better to stop than to run on into the next turn.
_END_TOKENS = frozenset(
    (
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<eos>",
        "</s>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
    )
)
_HARMONY = frozenset({"<|return|>", "<|call|>"})  # where these end an answer, <|end|> only ends one of its messages


class Tokenizer:
    """Immutable after loading, and safe to use from several threads: encoding releases the GIL.

    `vocab_size` counts ids with added tokens; a model's embedding may have more rows. `eos_token_ids` holds every token
    that ends an answer, the model's own first.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Takes over `files.backend`. Use `from_path`."""
        backend = files.backend
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = {name: text for name, text in files.special_tokens.items() if self._known(text)}
        _mark_special(backend, {*self.special_tokens.values(), *files.extra_special_tokens})
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_ids = self._end_ids(files.eos_token_ids, added)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._wrap(files.add_bos_token, files.add_eos_token)
        self._templates = {
            name: ChatTemplate(source, self.special_tokens) for name, source in files.chat_templates.items()
        }

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """From a Hugging Face folder or a .gguf file. Raises ModelLoadError, naming the file, if it cannot be had."""
        return cls(read_tokenizer_files(Path(path)))

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template, if the model has one."""
        template = self._templates.get("default")
        return template.source if template is not None else None

    def is_same_as(self, other: Tokenizer) -> bool:
        """Whether token ids mean the same to both, and end the same answers. Takes a while where the vocabulary is
        large."""
        return self.eos_token_ids == other.eos_token_ids and self._backend.to_str() == other._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written in the text become those tokens.

        `add_special_tokens` puts the model's beginning (and end) token around it, where the model wants one.
        Raises InvalidRequestError if the text is not Unicode (a lone surrogate).
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; see `encode`."""
        try:
            # of the library's ways to encode, the batched ones release the GIL, even for a batch of one
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            for text in texts:
                _require_unicode(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids. Bytes that are no UTF-8 become U+FFFD; ids no token has say nothing."""
        if (table := self._byte_table) is not None:
            return table.join(list(token_ids), skip_special_tokens).decode("utf-8", "replace")
        known = [token_id for token_id in token_ids if token_id >= 0]
        text: str = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(
        self, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> IncrementalDetokenizer:
        """A decoder for one sequence that follows the prompt.

        With the prompt given, its output is `decode(prompt + output)` less `decode(prompt)`: with SentencePiece the
        first space is shown if the prompt had any text. Without it, the output is a text of its own.
        """
        table = self._byte_table
        if table is None:
            return WindowDetokenizer(
                lambda token_ids: self.decode(token_ids, skip_special_tokens),
                [token_id for token_id in prompt_token_ids if token_id < self.vocab_size],
            )
        selected = table.select(skip_special_tokens)
        first = table.strips_first_space and not any(
            selected[token_id] for token_id in prompt_token_ids if token_id < len(selected)
        )
        return ByteDetokenizer(selected, strip_first_space=first)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, special tokens included; b"" for an id no token has."""
        if (table := self._byte_table) is not None:
            return table.all[token_id] if 0 <= token_id < len(table.all) else b""
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; U+FFFD stands for part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written so in the vocabulary."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> str:
        """The prompt of a conversation, special tokens written out: encode it with `add_special_tokens=False`.

        `messages` and `tools` are OpenAI's, as plain JSON data. `chat_template` names one of the model's templates or
        is a template itself. Raises InvalidRequestError if there is no template or it refuses the messages.
        """
        return self._template(chat_template, bool(tools)).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=chat_template_kwargs or {},
        )

    def warm_up(self) -> None:
        """Makes what all detokenizers share: tens of milliseconds that the first requests would wait for."""
        for skip_special_tokens in (True, False):
            self.detokenizer(skip_special_tokens=skip_special_tokens)

    @cached_property
    def _byte_table(self) -> ByteTable | None:
        return build_byte_table(self._backend, self.special_token_ids)

    def _template(self, chat_template: str | None, has_tools: bool) -> ChatTemplate:
        if chat_template is None:
            name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
            if name in self._templates:
                return self._templates[name]
            named = f" Choose one of {sorted(self._templates)} as chat_template." if self._templates else ""
            raise InvalidRequestError(
                f"The model has no default chat template.{named} Use the completions endpoint or give a chat_template.",
                param="chat_template" if named else "messages",
            )
        if chat_template in self._templates:
            return self._templates[chat_template]
        try:
            return ChatTemplate(chat_template, self.special_tokens)
        except ModelLoadError as error:  # here the template is the client's
            raise InvalidRequestError(error.message, param="chat_template") from error

    def _known(self, text: str) -> bool:
        return self._backend.token_to_id(text) is not None

    def _special_id(self, name: str) -> int | None:
        return self.token_id(self.special_tokens[name]) if name in self.special_tokens else None

    def _end_ids(self, configured: Iterable[int], added: Mapping[int, Any]) -> tuple[int, ...]:
        own = self._special_id("eos_token")
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        ends = set(_END_TOKENS & special.keys())
        if ends >= _HARMONY:
            ends.discard("<|end|>")
        found = [own] * (own is not None) + list(configured) + sorted(special[text] for text in ends)
        return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))

    def _wrap(self, add_bos: bool | None, add_eos: bool | None) -> None:
        """Makes the post-processor agree with `add_bos_token` and `add_eos_token`, where the files say them."""
        bos, eos = self._wrapper("bos_token"), self._wrapper("eos_token")
        empty = self.encode("")
        has_bos = bos is not None and empty[:1] == [bos[1]]
        has_eos = eos is not None and empty[-1:] == [eos[1]] and len(empty) > has_bos * (bos == eos)
        want_bos = has_bos if add_bos is None or bos is None else add_bos
        want_eos = has_eos if add_eos is None or eos is None else add_eos
        if (want_bos, want_eos) != (has_bos, has_eos):
            self._backend.post_processor = template_processor(bos if want_bos else None, eos if want_eos else None)

    def _wrapper(self, name: str) -> tuple[str, int] | None:
        token_id = self._special_id(name)
        return (self.special_tokens[name], token_id) if token_id is not None else None


def _mark_special(backend: Backend, texts: Iterable[str]) -> None:
    """Makes tokens of the vocabulary special that only the configuration calls so. Ids do not change."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    unmarked = sorted(text for text in set(texts) - special if backend.token_to_id(text) is not None)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in unmarked])


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"The text is not valid Unicode: {error.reason} at {error.start}.") from error
