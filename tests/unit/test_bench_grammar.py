"""`sessile bench grammar` measures what it says, on few rows and steps."""

from sessile.bench.grammar import GrammarBenchOptions, measured_grammars
from sessile.bench.grammar_schemas import SCHEMAS


def test_masks_steps_and_schemas_are_all_measured() -> None:
    times = measured_grammars(GrammarBenchOptions(rows=5, steps=12))
    assert (len(times.compile_ms), len(times.mask_us), len(times.step_us)) == (len(SCHEMAS), 6 * 5, 6)
    assert (len(times.draft_us), len(times.extend_us), len(times.host_us)) == (12, 12, 12)
    assert min(times.mask_us.min(), times.host_us.min(), times.compile_ms.min()) > 0
