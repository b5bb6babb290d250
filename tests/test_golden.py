"""Numbers of the smoke run, so that a change of results is never unnoticed.

UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py        # writes them anew
"""

import json
import os
from pathlib import Path

import pytest
from conftest import metrics_of

GOLDEN = Path(__file__).with_name("golden_twm_dyna_craftax.json")
KEYS = {
    24: [
        "losses/real_policy_loss", "losses/real_value_loss", "losses/real_grad_norm",
        "world_model/heldout_token_loss", "world_model/codes",
        "losses/world_model_token_loss", "losses/world_model_reward_loss", "losses/world_model_done_loss",
        "losses/world_model_grad_norm",
    ],
    48: ["losses/imagined_value_loss", "losses/imagined_grad_norm"],
}  # fmt: skip


def test_the_numbers_of_the_first_iterations(smoke_run):
    lines = {line["step"]: line for line in metrics_of(smoke_run.folder)}
    found = {f"{key} at {step}": lines[step][key] for step, keys in KEYS.items() for key in keys}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
    how = "UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py"
    assert GOLDEN.exists(), f"{GOLDEN.name} is missing; write it with\n    {how}"
    expected = json.loads(GOLDEN.read_text())
    # Other processors sum in another order: 1e-3 leaves room for that, and for no real change.
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), (
        "The smoke run gives other numbers. Updating them is right only if this change was meant to alter the "
        "algorithm, its settings, its random draws, or the versions it runs on, and the reason is in the commit "
        f"message; a change that was to make it faster or shorter has a bug. To update:\n    {how}"
    )
