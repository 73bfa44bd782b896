"""`python -m gecko_lab.bench`: operations, blocks and models timed beside their peers and their floors."""
