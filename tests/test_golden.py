"""twm_dyna_craftax.py: numbers of the smoke run. Those of the EMD scripts are in their own files, beside their runs."""

from conftest import assert_golden

KEYS = {
    24: [
        "losses/real_policy_loss", "losses/real_value_loss", "losses/real_grad_norm",
        "world_model/heldout_token_loss", "world_model/codes",
        "losses/world_model_token_loss", "losses/world_model_reward_loss", "losses/world_model_done_loss",
        "losses/world_model_grad_norm",
    ],
    48: ["losses/imagined_value_loss", "losses/imagined_grad_norm"],
}  # fmt: skip


def test_golden_numbers_of_the_first_iterations(smoke_run):
    assert_golden("twm_dyna_craftax", smoke_run.folder, KEYS)
