# SPDX-License-Identifier: Apache-2.0
"""How far answers are from others to the same prompts, and how far they may be."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HALF = 0.05  # nats: what roundings of bfloat16 may make; the merge in the worker and the one here need not have the same bits
# Nats: a step of bfloat16 for logits between 16 and 32, where the largest of the demo's model are. The same bytes in the same
# kernels give the same numbers, but for sums that atomic additions make in any order: those may move a logit by a step.
STEP = 0.125
MEAN = 0.003  # nats: such a step for one token in forty

# The tokens of prompts and answers, and their log-probabilities from the second on.
Answers = tuple[list[list[int]], list[torch.Tensor]]


def differences(some: Answers, others: Answers) -> torch.Tensor:
    """|Δ log p| of all tokens up to the first that differs."""
    found = []
    for ids, theirs, a, b in zip(some[0], others[0], some[1], others[1], strict=True):
        pairs = list(zip(ids, theirs, strict=True))
        same = next((i for i, (mine, its) in enumerate(pairs) if mine != its), len(pairs))
        found.append((a[: same - 1] - b[: same - 1]).abs())
    return torch.cat(found)


def distance(some: Answers, others: Answers) -> float:
    """Largest |Δ log p| up to the first token that differs."""
    return float(differences(some, others).max())


def in_another_basis(folder: Path, target: Path) -> None:
    """The adapter of a PEFT folder with its factors turned: the same weight changes, other numbers to round."""
    target.mkdir()
    (target / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    turned = {}
    for key in sorted(key for key in tensors if ".lora_A." in key):
        other = key.replace(".lora_A.", ".lora_B.")
        a, b = tensors[key], tensors[other]
        basis = torch.linalg.qr(torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)).Q
        turned |= {key: (basis @ a.double()).to(a.dtype), other: (b.double() @ basis.T).to(b.dtype)}
    save_file(turned, target / "adapter_model.safetensors")


def judge(
    ours: Mapping[str, Answers],
    again: Mapping[str, Answers],
    same: Mapping[str, Answers],
    exported: Mapping[str, Answers],
    turned: Mapping[str, Answers],
    record: Callable[[str, object], None],
) -> list[str]:
    """What is further off than it may be. All figures are recorded, by name.

    ours: what is served; again: asked once more; same: vLLM's own LoRA of the bytes that are served; exported: of another
    merge, made elsewhere in float32; turned: of that in another basis.

    The bytes that are served give what is served, but for what asking again gives too: at most a quarter, on the mean, of what
    rounding the same adapter differently gives, which `turned` measures. The other merge differs from ours as one
    rounding does from another; on the mean, as the largest of some hundred differences is the luck of one token.
    """
    noise = torch.stack([_figures(ours[name], again[name]) for name in ours]).amax(0)
    rounding = torch.stack([_figures(exported[name], turned[name]) for name in ours]).amax(0)
    highest, most = max(STEP, 2 * noise[0], rounding[0] / 2), max(2 * noise[1], rounding[1] / 4)
    wrong: list[str] = []
    for name in ours:
        pairs = {
            "asked again": (ours, again),
            "vLLM's own LoRA of the same bytes": (ours, same),
            "a merge on the CPU": (ours, exported),
            "that merge in two bases": (exported, turned),
        }
        found = {what: _figures(some[name], others[name]) for what, (some, others) in pairs.items()}
        told = {what: [round(float(value), 5) for value in figures] for what, figures in found.items()}
        record(f"|Δ log p| of {name}, largest, mean and share that is not 0", json.dumps(told))
        largest, mean, _ = found["vLLM's own LoRA of the same bytes"]
        if largest > highest or mean > most:
            wrong.append(f"{name}: not what vLLM makes of the same bytes: largest {largest:.4f}, mean {mean:.5f}")
        if (mean := found["a merge on the CPU"][1]) > 3 * rounding[1]:
            wrong.append(f"{name}: mean {mean:.5f} from a merge on the CPU, two roundings differ by {rounding[1]:.5f}")
    return wrong


def _figures(some: Answers, others: Answers) -> torch.Tensor:
    found = differences(some, others)
    return torch.stack([found.max(), found.mean(), (found > 0).float().mean()])


def joined(parts: Sequence[Answers]) -> Answers:
    """Answers to several prompts that were asked one at a time."""
    return [ids for part in parts for ids in part[0]], [values for part in parts for values in part[1]]
