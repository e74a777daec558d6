"""schemathesis on the API as /openapi.json describes it: `python scripts/clients/openapi_cases.py URL`.

Ten thousand requests, or --cases of them, of what the description allows and of what it does not. None may be answered
with a failure of the server's, or with a status, a type or a body that is not described; what it does not allow is
refused.
"""

import argparse
import json
import sys

from checks import RUNS, TOOL_TIMEOUT_S, Checks, run_tool

CASES = 10_000
ROUTES = 33
"""So many share the cases: the description has more, but there is little to be varied in some of them."""
JUDGED = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "unsupported_method", "negative_data_rejection",
)  # fmt: skip
REQUEST_TIMEOUT_S = 60


def main() -> int:
    """Run it and read its report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of the server, such as http://127.0.0.1:30000")
    parser.add_argument("--cases", type=int, default=CASES, help="how many requests are sent at least")
    options = parser.parse_args()
    url, cases_min = options.url.rstrip("/"), options.cases
    checks = Checks("schemathesis")
    report = RUNS / "schemathesis.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    run_tool(
        "schemathesis", "run", f"{url}/openapi.json", "--checks", ",".join(JUDGED), "--phases", "coverage,fuzzing",
        "--max-examples", str(-(-cases_min // ROUTES)), "--seed", "1", "--continue-on-failure",
        "--request-timeout", str(REQUEST_TIMEOUT_S), "--suppress-health-check", "all", "--warnings", "off",
        "--report-json-path", str(report), "--no-color",
        timeout_s=TOOL_TIMEOUT_S * max(1.0, cases_min / CASES),
    )  # fmt: skip
    if not (report.exists() and report.stat().st_size):  # it is made at the start and written at the end
        checks.that(False, "schemathesis runs")
        return checks.end()
    found = json.loads(report.read_text())
    cases, routes = found["test_cases"], found["operations"]
    checks.that(routes["tested"] == routes["total"], "every route is tried", f"{routes['tested']} of {routes['total']}")
    checks.that(cases["generated"] >= cases_min, "with requests enough", f"{cases['generated']}")
    for code in JUDGED:
        failures = [failure for failure in found["failures"] if failure["code"] == code]
        shown = [f"{failure['count']} × {failure['title']}: {failure['operations']}" for failure in failures]
        checks.that(not failures, f"none fails {code}", *shown)
    others = [failure["title"] for failure in found["failures"] if failure["code"] not in JUDGED]
    checks.that(cases["with_failures"] == cases["errored"] == 0 and not found["errors"], "none fails otherwise",
                *others, *(error["title"] for error in found["errors"]))  # fmt: skip
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
