"""The operations a training step is made of; `reference` is their specification in plain torch."""
