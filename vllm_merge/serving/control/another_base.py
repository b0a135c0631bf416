# SPDX-License-Identifier: Apache-2.0
"""What an adapter's folder says of the base model that it was trained on, where that is not the one it is used on."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_merge.adapters.base_model import base_model_folder
from vllm_merge.adapters.catalogue import RegisteredAdapter
from vllm_merge.adapters.words import shown
from vllm_merge.recipe.file import is_local

TEMPLATE_FILE, TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json"
MAX_BYTES = 16 << 20  # of a file that a template is looked for in


def another_base(adapter: RegisteredAdapter, base_model: str, revision: str | None = None) -> tuple[str, ...]:
    """What differs, a sentence each: the model's name and revision, where both are names of the Hub, and the chat template.

    base_model, revision: what the adapter is used on, a folder or a name of the Hub.
    """
    found = []
    trained_on = adapter.summary.base_model
    named = not is_local(base_model) and not Path(base_model).is_dir()
    if trained_on and not is_local(trained_on) and named:
        if trained_on != base_model:
            found.append(f"it was trained on {shown(trained_on)}, and is used on {base_model}")
        elif adapter.base_revision and revision and adapter.base_revision != revision:
            found.append(
                f"it was trained on revision {shown(adapter.base_revision)} of {base_model}, and is used on {revision}"
            )
    own = chat_template(adapter.path)
    folder = base_model_folder(base_model, revision)
    if own is not None and folder is not None and own != chat_template(folder):
        found.append("its folder has a chat template that is not the base model's; chats are written by the server's")
    return tuple(found)


def chat_template(folder: Path) -> str | None:
    """The chat template that a folder of a model or an adapter has, None if it has none that can be read."""
    try:
        if (file := folder / TEMPLATE_FILE).is_file() and file.stat().st_size <= MAX_BYTES:
            return file.read_text(encoding="utf-8")
        if (file := folder / TOKENIZER_FILE).is_file() and file.stat().st_size <= MAX_BYTES:
            content = json.loads(file.read_text(encoding="utf-8"))
            template = content.get("chat_template") if isinstance(content, dict) else None
            return template if isinstance(template, str) else None
    except (OSError, ValueError, RecursionError):  # what is wrong with it is for those who need it
        pass
    return None
