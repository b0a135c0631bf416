# SPDX-License-Identifier: Apache-2.0
"""Score merges of the demo's adapters on validation prompts, over a grid of λ and density: how configs/demo.yaml was tuned.

python examples/demo/tune.py ties --space delta --lambda 1.8 2 2.25 --density 0.1 0.2
python examples/demo/tune.py task_arithmetic --lambda 0.9 --weight reverse=1.5 double=1.2
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence

import torch
from measure import accuracy
from tasks import HERE, TASKS, Example, examples
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_merge import Adapter, MergedAdapter, merge

SEED = 0
MAX_RANK = 64


def apply(model: PreTrainedModel, weights: Mapping[str, Tensor], merged: MergedAdapter) -> None:
    """Set the model to its own weights plus the merged change of each module."""
    changed = dict(weights)
    for module in merged.factors:
        name = f"{module}.weight"
        changed[name] = weights[name] + merged.delta(module)
    model.load_state_dict(changed)


def scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, Sequence[Example]]
) -> dict[str, float]:
    """The accuracy on each task, and their mean."""
    by_task = {name: accuracy(model, tokenizer, task) for name, task in prompts.items()}
    return {"mean": sum(by_task.values()) / len(by_task), **by_task}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help="merge method")
    parser.add_argument("--space", help="delta, core or knots; each method has a default")
    parser.add_argument("--lambda", dest="scales", type=float, nargs="+", default=[1.0], help="values of λ to try (1)")
    parser.add_argument("--density", type=float, nargs="+", default=[], help="values of density to try")
    parser.add_argument("--weight", nargs="+", default=[], metavar="TASK=X", help="weights other than 1")
    parser.add_argument("--prompts", type=int, default=40, help="validation prompts of each task (40)")
    args = parser.parse_args()
    given = dict(pair.split("=") for pair in args.weight)
    weights = [float(given.get(name, 1.0)) for name in TASKS]
    adapters = [Adapter.from_peft(HERE / "adapters" / name) for name in TASKS]
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = {task.name: examples(task, "validation", args.prompts, SEED) for task in TASKS.values()}
    densities = [{"density": density} for density in args.density] or [{}]
    for density, scale in itertools.product(densities, args.scales):
        parameters = {**density, "lambda": scale}
        merged = merge(
            adapters,
            merge_method=args.method,
            space=args.space,
            weights=weights,
            parameters=parameters,
            max_rank=MAX_RANK,
        )
        apply(model, base, merged)
        row = scores(model, tokenizer, prompts)
        print(parameters, "  ".join(f"{name} {100 * value:.0f}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
