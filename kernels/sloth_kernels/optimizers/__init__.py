"""Steps of optimizers over many tensors in one launch; they work in place and have no gradient, hence are no Ops."""
