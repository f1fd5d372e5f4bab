"""The lab: papers' claims, run again as small experiments."""
