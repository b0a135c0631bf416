# SPDX-License-Identifier: Apache-2.0
"""The demo's tokenizer: one token per printable ASCII character, and a newline that ends every answer."""

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "\n", "<unk>")
PAD, BOS, EOS, UNK = range(4)
CHARACTERS = tuple(chr(code) for code in range(32, 127))
VOCABULARY = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}"  # the last message is the prompt, as it stands

_IDS = np.full(256, UNK, dtype=np.uint8)
for _token, _index in VOCABULARY.items():
    if len(_token) == 1:
        _IDS[ord(_token)] = _index


def encode(text: str) -> NDArray[np.uint8]:
    """The token ids of ASCII text, without BOS: what the saved tokenizer gives, but fast."""
    return _IDS[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as transformers and vLLM load it."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNK],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
