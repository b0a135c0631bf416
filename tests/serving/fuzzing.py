# SPDX-License-Identifier: Apache-2.0
"""Requests that schemathesis makes of /openapi.json, and what their answers have to keep."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import checks

from tests.serving.played_server import ADMIN

EXAMPLES = 15  # for each operation
NAMES = [
    "m0",
    "m1",
    "a0",
    "assistant",
    "fresh",
    "greeting",
    "0" * 64,
    "..",
    "a/b",
    "%2e%2e%2fetc",
    "x" * 201,
    "ä\n",
    "a\x00b",
]
ELSEWHERE = {"..", "a/b", "%2e%2e%2fetc"}  # in a path these make the address of another route, or of none
CHECKED = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


def operations(url):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return [o for o in found if o.path.startswith("/v1/merge/") and not o.path.endswith("/events")]  # it never ends


def fuzz(operation) -> int:
    """Send one operation generated requests, and ones about what is there; how many were sent."""
    sent = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(case=operation.as_strategy(), name=st.none() | st.sampled_from(NAMES))
    def ask(case, name):
        nonlocal sent
        sent += 1
        if name is not None:
            case.path_parameters = dict.fromkeys(case.path_parameters or {}, name)
        case.headers = {**(case.headers or {}), **ADMIN}
        response = case.call(timeout=60)
        case.validate_response(response, checks=CHECKED[:1] if name in ELSEWHERE else CHECKED)

    ask()
    return sent
