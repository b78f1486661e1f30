"""Templates of model cards. Installed as `hf_focus.model_cards`."""
