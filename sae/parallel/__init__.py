"""One dictionary over many processes: their mesh, and what they agree on. The one room for torch.distributed."""
