"""The embedded world: flat shapes on an off-white ground, their prompts, an exact detector and small trained models."""
