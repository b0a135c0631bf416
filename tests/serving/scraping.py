# SPDX-License-Identifier: Apache-2.0
"""/metrics of a server, as numbers."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def scraped(server) -> dict[tuple, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as reply:
        return samples(reply.read().decode())


def samples(text: str) -> dict[tuple, float]:
    """{(sample, (label, value), …): number}, labels in order of their names."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "each family once"
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def total(found: dict[tuple, float], name: str, /, **labels: str) -> float:
    """The sum over all series of a sample that have these labels."""
    return sum(value for key, value in found.items() if key[0] == name and set(labels.items()) <= set(key[1:]))
