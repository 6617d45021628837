"""The files of Hugging Face's processor: text tokenizer, image processor and chat template."""

from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import normalizers
from transformers import Emu3ImageProcessor, Emu3Processor, GPT2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from emu3.config import EMU3_VOCABULARY
from emu3.text import PIECES, QwenTokenizer
from emu3.weights.hub import IMAGE

_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""``USER: <image>text ASSISTANT:``."""


def special_names() -> list[str]:
    """Names of the ids from 151,643 on, as Hugging Face has them."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [f"<|extra_{n}|>" for n in range(205)]
    names[IMAGE - EMU3_VOCABULARY.num_text] = "<image>"
    names += ["<|image token|>", "<|image start|>", "<|image end|>"]
    return names + [f"<|visual token {n:06}|>" for n in range(EMU3_VOCABULARY.num_visual)]


def save_processor(folder: Path, text: QwenTokenizer) -> None:
    """Write what ``Emu3Processor.from_pretrained`` reads."""
    with TemporaryDirectory() as scratch:
        merges = Path(scratch, "qwen.tiktoken")
        merges.write_bytes(text.as_tiktoken())
        converter = TikTokenConverter(
            str(merges), pattern=PIECES, extra_special_tokens=special_names()
        )
        tokenizer = converter.converted()
    tokenizer.normalizer = normalizers.NFC()
    fast = GPT2Tokenizer(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
    )
    images = Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Emu3Processor(images, fast, chat_template=_CHAT).save_pretrained(folder)
