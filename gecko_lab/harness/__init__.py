"""EleutherAI's lm-evaluation-harness over a model of the lab: ``python -m gecko_lab.harness`` (extra ``harness``)."""
